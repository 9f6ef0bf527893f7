"""The notebook of the guides, run at a reduced size."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FILE = Path(__file__).resolve().parents[1] / "docs" / "first_detector.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(FILE, as_version=4)


def test_outputs_are_stripped(notebook):
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_goes_the_whole_way(notebook, tmp_path):
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = (
        f"WORK = Path({str(tmp_path / 'work')!r})\n"
        "NUM_TRAIN, NUM_VAL, PRETRAIN_STEPS, DETECTION_STEPS = 8, 4, 2, 2"
    )
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FILE.parent}}
    ).execute()
    for name in ("pretrain/preset.py", "tokens.png", "detector/model_final.pth"):
        assert (tmp_path / "work" / name).is_file(), name
    assert len(list((tmp_path / "work/found/drawn").iterdir())) == 4
    assert (tmp_path / "work/detector.onnx.md").is_file()
    last = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "objects; the best has score" in last
