"""Settings of every test: folders of data, seeds, the order, examples of property tests."""

from __future__ import annotations

import itertools
import json
import logging
import os
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
# Files that take the longest. With two workers, each starts with every other one of them.
SLOW = """
    demo notebook train_net methods golden measures cluster launch predictor compare finetune
    install benchmark export_model processes stock_project trackers sweep pretrain_net every_config
""".split()


@pytest.fixture(scope="session")
def datasets_root() -> Path:
    """Return the folder of real data sets that DETECTRON2_DATASETS names."""
    root = os.environ.get("DETECTRON2_DATASETS")
    if not root or not Path(root).is_dir():
        pytest.skip("DETECTRON2_DATASETS names no folder of data sets")
    return Path(root).resolve()


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of data sets that holds ``flsl_scenes``: 8 pictures to train on, 4 to validate."""
    from flsl_d2.scenes import make_scenes

    root = tmp_path_factory.mktemp("datasets")
    make_scenes(root / "flsl_scenes", num_train=8, num_val=4, image_size=(96, 96))
    return root


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a headless Chromium."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian, Ubuntu: apt install chromium)")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start slow files first: xdist gives each of two workers one half of the list."""
    if not config.getoption("random_order_bucket", "default:").startswith("default:"):
        return
    slow = [[item for item in items if item.path.stem == f"test_{name}"] for name in SLOW]
    fast = [item for item in items if item.path.stem.removeprefix("test_") not in SLOW]
    front, middle = (list(itertools.chain(*files)) for files in (slow[::2], slow[1::2]))
    before = max(0, len(items) // 2 - len(front))
    items[:] = [*front, *fast[:before], *middle, *fast[before:]]


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


@pytest.fixture
def run_study(scenes_root, monkeypatch, run_main) -> Callable[..., tuple[int, str, str]]:
    """Run a tool of studies on the scenes in this process, and its jobs in forked ones."""
    from forked import FORKED_SUBPROCESS

    from flsl_d2.annotations import register_scenes

    monkeypatch.setattr("flsl_d2.studies.machine.subprocess", FORKED_SUBPROCESS)
    register_scenes(scenes_root / "flsl_scenes")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(scenes_root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return run_main


@pytest.fixture(scope="session")
def few_images(datasets_root, tmp_path_factory) -> Callable[..., Path]:
    """Make a folder of data sets with the first annotated images of real ones, under their names.

    Every split is the training split where ``same`` is true.
    """

    def make(*names: str, count: int = 4, same: bool = False) -> Path:
        root = tmp_path_factory.mktemp("datasets")
        for name in names:
            source, folder = datasets_root / name, root / name / "annotations"
            if not source.is_dir():
                pytest.skip(f"DETECTRON2_DATASETS has no {name}")
            folder.mkdir(parents=True)
            for images in source.iterdir():
                if images.name != "annotations":
                    (root / name / images.name).symlink_to(images)
            year = "2017" if name == "coco" else ""
            for split in ("train", "val"):
                read = "train" if same else split
                file = source / "annotations" / f"instances_{read}{year}.json"
                content = json.loads(file.read_text())
                annotated = {a["image_id"] for a in content["annotations"]}
                kept = [i for i in content["images"] if i["id"] in annotated][:count]
                ids = {image["id"] for image in kept}
                found = [a for a in content["annotations"] if a["image_id"] in ids]
                content |= {"images": kept, "annotations": found}
                (folder / f"instances_{split}{year}.json").write_text(json.dumps(content))
        return root

    return make
