"""Check this machine and its environment: ``flsl-d2 doctor`` or ``python -m flsl_d2.doctor``.

Every line is one finding, ``ok``, ``note`` or ``FAIL``, with what to do. The exit status is 0 when
nothing failed and 1 otherwise. PyTorch and Detectron2 may be missing.
"""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

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
    """One line of the report: state, what was looked at, and what was found and is to be done."""

    state: str
    topic: str
    text: str


def check_versions() -> Iterator[Finding]:
    """Compare the interpreter and the packages with what the project supports."""
    state = OK if sys.version_info >= (3, 10) else FAIL
    text = f"{platform.python_version()} on {platform.platform(True, True)}"
    yield Finding(state, "Python", text)
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Finding(FAIL, package, f"is not installed; run pip install {package}")
    yield Finding(OK, "packages", ", ".join(found))
    for package, loss in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(NOTE, package, f"is not installed: {loss}; run pip install {package}")
    if importlib.util.find_spec("cv2") is None:
        yield Finding(FAIL, "cv2", "is missing; run pip install opencv-python-headless")


def check_detectron2() -> Iterator[Finding]:
    """Say where Detectron2 is and whether its compiled operators load."""
    try:
        import detectron2
    except ImportError as error:
        yield Finding(FAIL, "Detectron2", f"{error}; run flsl-d2 install-detectron2")
        return
    where = Path(detectron2.__file__).parent
    yield Finding(OK, "Detectron2", f"{detectron2.__version__} in {where}")
    try:
        importlib.import_module("detectron2._C")
    except ImportError:  # none, or for another PyTorch
        text = (
            "are not compiled: rotated boxes, deformable convolution and the fast COCO evaluator "
            "are missing, Mask R-CNN and plain evaluation work; build Detectron2 from source to "
            "have them"
        )
        yield Finding(NOTE, "Detectron2's operators", text)


def check_gpus() -> Iterator[Finding]:
    """Compare the cards and their driver with what the installed PyTorch needs."""
    import torch

    from flsl_d2.engine.gpus import unusable_driver

    if not torch.cuda.is_available():
        reason = unusable_driver()
        text = "none is visible; add --device cpu to commands"
        yield Finding(FAIL if reason else NOTE, "GPU", reason or text)
        return
    numbers = [int(n.split("_")[1].rstrip("af")) for n in torch.cuda.get_arch_list()]
    oldest = min(numbers, default=0)
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        text = (
            f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
            f"{card.major}.{card.minor}, PyTorch for CUDA {torch.version.cuda}"
            f"{', bf16' if card.major >= 8 else ', fp16, no bf16'}"
        )
        fits = 10 * card.major + card.minor >= oldest
        if not fits:
            text += f"; this PyTorch needs {oldest / 10:.1f}, install one for an older CUDA"
        yield Finding(OK if fits else FAIL, f"GPU {index}", text)


def check_workers() -> Iterator[Finding]:
    """Look at cores and at the shared memory through which data workers hand over batches."""
    from flsl_d2.engine.gpus import usable_cores

    cores = usable_cores()
    yield Finding(OK, "CPU cores", f"{cores} may be used; dataloader.num_workers up to {cores}")
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    free, needed = shutil.disk_usage(shared).free, 2 * cores * WORKER_BYTES
    text = f"{free / 2**30:.1f} GiB free in {shared}"
    if free < needed:
        text += (
            f", {cores} workers may need {needed / 2**30:.1f}; start the container with "
            "--shm-size=8g or --ipc=host, or set dataloader.num_workers=0"
        )
    yield Finding(FAIL if free < needed else OK, "shared memory", text)


def check_decoding() -> Iterator[Finding]:
    """Measure how fast one core decodes a JPEG file of 500 x 375 pixels."""
    import numpy as np
    from PIL import Image

    from flsl_d2.images.reader import read_rgb

    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((500, 375)).save(buffer, "JPEG", quality=90)
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
    """Say which well-known data sets have their files."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    known = {"coco/train2017": "COCO", "imagenet/train": "ImageNet", "lvis": "LVIS"}
    there = [name for place, name in known.items() if (root / place).is_dir()]
    text = f"{', '.join(there) or 'none of COCO, ImageNet, LVIS'} below '{root}'"
    if not root.is_dir():
        text = f"DETECTRON2_DATASETS is '{root}', no folder; own files need no data set name"
    yield Finding(OK if root.is_dir() else NOTE, "data sets", text)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(check_versions, check_detectron2, check_gpus),
    *(check_workers, check_decoding, check_datasets),
)


def main() -> int:
    """Print every finding; return the exit status."""
    worst = 0
    for check in CHECKS:
        try:
            findings = list(check())
        except ImportError as error:  # an earlier finding says what to install
            topic = check.__name__.removeprefix("check_")
            findings = [Finding(NOTE, topic, f"cannot be looked at ({error})")]
        for finding in findings:
            print(f"{finding.state:<5} {finding.topic}: {finding.text}", flush=True)
            worst = max(worst, finding.state == FAIL)
    print("Something needs mending: see FAIL above." if worst else "Everything needed is in place.")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
