"""Where tests find data, and what they say when there is none."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

# Tests run beside each other, and threads that wait for a core slow one another down many times.
# Set before PyTorch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

GOLDEN = Path(os.environ.get("FLSL_GOLDEN", "../shared/golden"))
GOLDEN_FILES = sorted(GOLDEN.glob("*.npz")) if GOLDEN.is_dir() else []


@pytest.fixture(scope="session")
def datasets_root() -> Path:
    """The folder of real data sets that DETECTRON2_DATASETS names."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root or not Path(root).is_dir():
        pytest.skip("DETECTRON2_DATASETS names no folder of data sets")
    return Path(root).resolve()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_main(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the ``main`` of a tool in this process, which has imported everything already.

    Returns status, standard output and standard error.
    """
    # A tool adds to this variable and to the filters of warnings.
    monkeypatch.setenv("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS", ""))

    def run(main: Callable[[list[str]], None], *arguments: str) -> tuple[int, str, str]:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    return run
