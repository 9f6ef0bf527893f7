"""Settings of every test: folders of data, seeds, and how examples of property tests are drawn."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run beside each other, and threads that wait for a core slow one another down many times.
# Set before PyTorch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import setuptools  # noqa: F401  (it refuses to be imported after distutils)
import torch
from browser import CHROMIUM, Browser
from hypothesis import settings

# The default run draws the same examples each time, however fast the machine is. `make fuzz` draws
# new ones and keeps those that fail in .hypothesis, so that it tries them first the next time.
settings.register_profile(
    "default", derandomize=True, database=None, deadline=None, print_blob=True
)
settings.register_profile(
    "fuzz", derandomize=False, max_examples=500, deadline=None, print_blob=True
)
settings.load_profile("default")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("FLSL_GOLDEN") or Path(__file__).parent / "golden")
GOLDEN_FILES = sorted(GOLDEN.glob("*.npz"))
if not GOLDEN_FILES:
    raise pytest.UsageError(f"FLSL_GOLDEN={GOLDEN} has no *.npz: name a folder of golden values")


@pytest.fixture(scope="session")
def datasets_root() -> Path:
    """Return the folder of real data sets that DETECTRON2_DATASETS names."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root or not Path(root).is_dir():
        pytest.skip("DETECTRON2_DATASETS names no folder of data sets")
    return Path(root).resolve()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package's wheel, built from a copy so that the checkout gets no build folder."""
    shipped = ("flsl_d2", "flsl_d2_cli.py", "pretrain", "configs")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", *shipped],
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("git does not know this tree, so which files belong to it is unknown")
    folder = tmp_path_factory.mktemp("wheel")
    named = ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md")
    for name in (*listed.stdout.splitlines(), *named):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(folder / "tree")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "tree" / "flsl_d2" / "model_zoo" / "configs").exists()
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a headless Chromium."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian, Ubuntu: apt install chromium)")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the workers of ``launch``, here and in forked tools; tests of it start fresh ones."""
    from forked import start_forked  # imports Detectron2, which some rooms do not need

    monkeypatch.setattr("flsl_d2.engine.launch.start_processes", start_forked)


@pytest.fixture
def run_main(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the ``main`` of a tool in this process, which has imported everything already.

    Returns status, standard output and standard error.
    """
    # A tool adds to this variable and to the filters of warnings.
    monkeypatch.setenv("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS", ""))
    # Handlers of earlier tests write to streams that are closed, which logging would print.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(main: Callable[[list[str]], None], *arguments: str) -> tuple[int, str, str]:
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main(list(arguments))
        return end.value.code, *capsys.readouterr()

    return run
