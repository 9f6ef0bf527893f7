"""The notebook of the guides, run at a reduced size."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest
from forked import run_forked

FILE = Path(__file__).resolve().parents[1] / "docs" / "first_detector.ipynb"


@pytest.fixture
def cells() -> list[nbformat.NotebookNode]:
    return nbformat.read(FILE, as_version=4).cells


def test_outputs_are_shipped_and_small(cells):
    assert FILE.stat().st_size < 300_000
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert {"stream", "execute_result"} <= {output.output_type for output in outputs}
    assert all(cell.get("outputs") for cell in cells if cell.source.startswith("%run"))
    text = FILE.read_text()
    assert not re.search(r"Traceback|/(home|root|tmp|work)/|Cannot find the hook", text)


def test_it_goes_the_whole_way(cells, tmp_path):
    """In IPython, as in a notebook's kernel."""
    (parameters,) = (c for c in cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = (
        f"WORK = Path({str(tmp_path / 'work')!r})\n"
        "NUM_TRAIN, NUM_VAL, PRETRAIN_STEPS, DETECTION_STEPS = 8, 4, 2, 2"
    )
    (tmp_path / "run.py").write_text(
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        f"for cell in {[cell.source for cell in cells if cell.cell_type == 'code']!r}:\n"
        "    shell.run_cell(cell).raise_error()\n"
    )
    done = run_forked([sys.executable, tmp_path / "run.py"], cwd=FILE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("pretrain/preset.py", "tokens.png", "detector/model_final.pth"):
        assert (tmp_path / "work" / name).is_file(), name
    assert len(list((tmp_path / "work/found/drawn").iterdir())) == 4
    assert (tmp_path / "work/detector.onnx.md").is_file()
    assert "objects; the best has score" in done.stdout
