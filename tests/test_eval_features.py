"""tools/eval_features.py as a command."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from forked import run_tool

from flsl_d2.errors import InputError
from flsl_d2.evaluation.measures import report_features

DATA = ("--train", "pennfudan_train", "--val", "pennfudan_val")


def test_table_and_json_with_a_failed_measure(datasets_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    few = "--max-images 2 --short-side 48 --measures knn_box knn_segmentation --json".split()
    done = run_tool("eval_features", "--weights", "random", *DATA, *few, file)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 of 2 measures failed (knn_box)")
    written = json.loads(file.read_text())
    assert list(written["failures"]) == ["knn_box"]
    assert written["settings"]["max_images"] == 2
    assert f"knn_box failed: {written['failures']['knn_box']}" in done.stdout
    for name, value in written["results"].items():
        assert re.search(rf"{name.split('/')[1]}.*{value:.2f}", done.stdout)
    assert os.listdir(tmp_path) == ["scores.json"]


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    done = run_tool("eval_features", "--weights", tmp_path / "absent.pth", *DATA)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "absent.pth" in done.stderr
    assert not done.stdout


def test_a_place_that_cannot_be_written_is_found_first() -> None:
    with pytest.raises(InputError, match="'/proc/no' cannot be written"):
        report_features("absent.pth", "a", "b", json_file=Path("/proc/no/scores.json"))
