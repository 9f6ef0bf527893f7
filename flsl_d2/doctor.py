"""Check this machine and its environment: ``python -m flsl_d2.doctor``.

Every line is one finding, ``ok``, ``note`` or ``FAIL``, with what to do. The exit status is 0 when
nothing failed and 1 otherwise.
"""

from __future__ import annotations

import importlib.util
import io
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import detectron2
import numpy as np
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

import flsl_d2
from flsl_d2.annotations.datasets import datasets_root
from flsl_d2.engine.gpus import unusable_driver
from flsl_d2.engine.launch import has_native_bf16, usable_cores
from flsl_d2.images.reader import read_rgb

OK, NOTE, FAIL = "ok", "note", "FAIL"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow", "fvcore", "iopath", "pycocotools")
OPTIONAL = {
    "simplejpeg": "JPEG files are decoded more slowly without it",
    "tensorboard": "runs write no TensorBoard events without it",
    "shapely": "Detectron2's polygon crops need it",
}
# Bytes of shared memory that a worker's batch of 64 images with four views of 224 pixels takes.
WORKER_BYTES = 64 * 4 * 3 * 224 * 224


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        state: ``ok``, ``note`` (works, but could be better) or ``FAIL``.
        topic: what was looked at.
        text: what was found, and what to do.
    """

    state: str
    topic: str
    text: str


def check_versions() -> Iterator[Finding]:
    """Compare the interpreter and the packages with what the project supports."""
    version = platform.python_version()
    state = OK if sys.version_info >= (3, 10) else FAIL
    yield Finding(state, "Python", f"{version} on {platform.platform(terse=True)}")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Finding(FAIL, package, f"is not installed; run pip install {package}")
    yield Finding(OK, "packages", f"flsl-d2 {flsl_d2.__version__}, {', '.join(found)}")
    for package, loss in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(NOTE, package, f"is not installed: {loss}; run pip install {package}")
    if importlib.util.find_spec("cv2") is None:
        yield Finding(FAIL, "cv2", "is missing; run pip install opencv-python-headless")


def check_detectron2() -> Iterator[Finding]:
    """Say where Detectron2 is and whether its compiled operators load."""
    folder = Path(detectron2.__file__).parent
    if folder.parent.name == "detectron2-wheel":
        how = "the wheel of tools/install_detectron2.py"
    elif "site-packages" in folder.parts:
        how = "installed in this environment"
    else:
        how = "a source folder on the path"
    yield Finding(OK, "Detectron2", f"{detectron2.__version__}, {how}: {folder}")
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        yield Finding(
            NOTE,
            "Detectron2's operators",
            "are not compiled: rotated boxes, deformable convolution and the fast COCO evaluator "
            "are missing, Mask R-CNN and plain evaluation work; build Detectron2 from source to "
            "have them",
        )
    else:
        yield Finding(OK, "Detectron2's operators", "load")


def check_gpus() -> Iterator[Finding]:
    """Compare the cards and their driver with what the installed PyTorch needs."""
    built_for = torch.version.cuda
    if torch.cuda.is_available():
        architectures = torch.cuda.get_arch_list()
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            text = (
                f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
                f"{card.major}.{card.minor}, PyTorch for CUDA {built_for}"
            )
            numbers = [int(name.split("_")[1].rstrip("af")) for name in architectures]
            oldest = min(numbers, default=0)
            if 10 * card.major + card.minor < oldest:
                text += f"; this PyTorch needs {oldest / 10:.1f}, install one for an older CUDA"
                yield Finding(FAIL, f"GPU {index}", text)
            else:
                precision = "bf16" if has_native_bf16() else "fp16, no bf16"
                yield Finding(OK, f"GPU {index}", f"{text}, {precision}")
        return
    reason = unusable_driver()
    if reason:
        yield Finding(FAIL, "GPU", reason)
    else:
        yield Finding(NOTE, "GPU", "none is visible; add train.device=cpu to commands")


def check_workers() -> Iterator[Finding]:
    """Look at cores and at the shared memory through which data workers hand over batches."""
    cores = usable_cores()
    yield Finding(OK, "CPU cores", f"{cores} may be used; dataloader.num_workers up to {cores}")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    needed = 2 * cores * WORKER_BYTES
    text = f"{free / 2**30:.1f} GiB free in {shared}"
    if free < needed:
        yield Finding(
            FAIL,
            "shared memory",
            f"{text}, {cores} workers may need {needed / 2**30:.1f}; start the container with "
            "--shm-size=8g or --ipc=host, or set dataloader.num_workers=0",
        )
    else:
        yield Finding(OK, "shared memory", text)


def check_decoding() -> Iterator[Finding]:
    """Measure how fast one core decodes a JPEG file of 500 x 375 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "decode.jpg")
        file.write_bytes(buffer.getvalue())
        read_rgb(str(file))
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 0.5:
            read_rgb(str(file))
            count += 1
    rate = count / (time.perf_counter() - start)
    yield Finding(OK, "decoding", f"{rate:.0f} images of 500 x 375 pixels a second on one core")


def check_datasets() -> Iterator[Finding]:
    """Say which registered data sets have their files."""
    root = Path(datasets_root()).expanduser()
    if not root.is_dir():
        yield Finding(
            NOTE,
            "data sets",
            f"DETECTRON2_DATASETS is '{root}', which is no folder; own files need no data set name",
        )
        return
    places = {"coco/train2017": "COCO", "imagenet/train": "ImageNet", "lvis": "LVIS"}
    there = [name for place, name in places.items() if (root / place).is_dir()]
    listed = ", ".join(there) if there else "none of COCO, ImageNet, LVIS"
    known = len(DatasetCatalog.list())
    yield Finding(OK, "data sets", f"{listed} below '{root}'; {known} names are registered")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_versions,
    check_detectron2,
    check_gpus,
    check_workers,
    check_decoding,
    check_datasets,
)


def main() -> int:
    """Print every finding; return the exit status."""
    worst = 0
    for check in CHECKS:
        for finding in check():
            print(f"{finding.state:<5} {finding.topic}: {finding.text}")
            worst = max(worst, finding.state == FAIL)
    print("Something needs mending: see FAIL above." if worst else "Everything needed is in place.")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
