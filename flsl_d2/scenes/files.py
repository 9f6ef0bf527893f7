"""The scenes as a data set on disk: pictures and COCO annotations."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask

from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.scenes.render import CLASS_NAMES, Scene, render_scene

SCENES_VERSION = 3  # raised whenever the same seed gives other pictures or annotations
SPLITS = ("train", "val")
_SMALLEST_SIDE = 64
_PARAMETERS = "scenes.json"
_JPEG_QUALITY = 92

logger = logging.getLogger(__name__)


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """Write one scene's objects as COCO entries, numbered from ``first_id`` on."""
    codes = [pycocotools.mask.encode(np.asfortranarray(mask, np.uint8)) for mask in scene.masks]
    return [
        {
            "id": first_id + number,
            "image_id": image_id,
            "category_id": category + 1,
            "iscrowd": 0,
            "area": float(pycocotools.mask.area(code)),
            "bbox": pycocotools.mask.toBbox(code).tolist(),
            "segmentation": {**code, "counts": code["counts"].decode()},
        }
        for number, (code, category) in enumerate(zip(codes, scene.categories, strict=True))
    ]


def _write_split(
    root: Path, split: str, count: int, image_size: tuple[int, int], seed: int
) -> None:
    (root / split).mkdir()
    width, height = image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):  # scene i depends on (seed, split, i) and the size alone
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        scene = render_scene(rng, image_size)
        path = root / split / f"{index:06d}.jpg"
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        if not cv2.imwrite(str(path), scene.image[..., ::-1], quality):
            raise OSError(f"cannot write {path}")
        images.append({"id": index + 1, "file_name": path.name, "width": width, "height": height})
        annotations += coco_annotations(scene, index + 1, len(annotations) + 1)
        if (index + 1) % 100 == 0 or index + 1 == count:
            logger.info("scenes: %d of %d %s images", index + 1, count, split)
    content = {
        "info": {"description": f"flsl-d2 scenes {SCENES_VERSION}, seed {seed}, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)],
    }
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content))


def _complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether root holds exactly these scenes."""
    try:
        return json.loads((root / _PARAMETERS).read_text()) == parameters and all(
            len(os.listdir(root / split)) == parameters[f"num_{split}"]
            and (root / "annotations" / f"instances_{split}.json").is_file()
            for split in SPLITS
        )
    except (OSError, ValueError):
        return False


def _check(root: Path, counts: dict[str, int], image_size: tuple[int, int], seed: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name}={value} makes no data set: give at least one image.")
    if min(image_size) < _SMALLEST_SIDE:
        raise InputError(
            f"image_size={tuple(image_size)} is too small for the scenes: give width and height of "
            f"{_SMALLEST_SIDE} pixels or more."
        )
    if seed < 0:
        raise InputError(f"seed={seed} is negative: give 0 or a positive number.")
    usable = not root.exists() or (root / _PARAMETERS).is_file()
    if not usable and (not root.is_dir() or any(root.iterdir())):
        raise InputError(
            f"{root} already holds something that is not a set of scenes: name an empty or new "
            "folder for them."
        )


def make_scenes(
    root: str | os.PathLike[str],
    num_train: int = 320,
    num_val: int = 80,
    image_size: tuple[int, int] = (192, 160),
    seed: int = 0,
) -> None:
    """Make scenes of this width and height, unless `root` already holds exactly them.

    Writes `root/{train,val}/*.jpg` and `root/annotations/instances_{train,val}.json` (COCO format,
    run-length masks). Equal arguments give bit-identical files with equal versions of numpy and
    OpenCV. Scenes of other parameters at `root` are replaced, as are those whose making was
    interrupted.

    Raises:
        InputError: a parameter makes no sense, or `root` holds something else.
    """
    root = Path(root).expanduser().resolve()
    counts = {"num_train": num_train, "num_val": num_val}
    parameters = {"version": SCENES_VERSION, **counts, "image_size": list(image_size), "seed": seed}
    _check(root, counts, image_size, seed)
    if _complete(root, parameters):
        logger.info("scenes: %s is already made", root)
        return
    if root.exists():
        shutil.rmtree(root)
    # These come first, so that an interrupted folder is known as one of scenes.
    write_text(root / _PARAMETERS, json.dumps(parameters))
    for split in SPLITS:
        _write_split(root, split, counts[f"num_{split}"], image_size, seed)
    logger.info("scenes: %d training and %d validation images in %s", num_train, num_val, root)
