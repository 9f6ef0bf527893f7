"""The scenes as a data set on disk: pictures and COCO annotations."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.scenes.layout import CLASS_NAMES
from flsl_d2.scenes.render import Scene, render_scene

# A contour goes through the centres of the border pixels, half a pixel inside the mask. On a mask
# enlarged by this factor that loss is 1/4 px, which no rasteriser rounds to a whole pixel.
_ENLARGE = 2


def _split_at_holes(mask: np.ndarray) -> list[np.ndarray]:
    """Cut a mask (H, W) uint8 with vertical lines until no part has a hole.

    COCO's polygons are united, so a hole cannot be a polygon of its own.
    """
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if tree is None:
        return []
    holes = [c for c, (*_, parent) in zip(contours, tree[0], strict=True) if parent >= 0]
    if not holes:
        return [mask]
    # A hole's contour lies on the pixels around it, so the mean column is inside the hole.
    column = round(float(holes[0][:, 0, 0].min() + holes[0][:, 0, 0].max()) / 2)
    left, right = mask.copy(), mask.copy()
    left[:, column:] = 0
    right[:, :column] = 0
    return _split_at_holes(left) + _split_at_holes(right)


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        Polygons `[x0, y0, x1, y1, ...]` in COCO's convention (pixel (i, j) covers [j, j + 1) x
        [i, i + 1)), none with fewer than three points, whose union is the mask. Empty for an empty
        mask.
    """
    rows, columns = np.any(mask, axis=1).nonzero()[0], np.any(mask, axis=0).nonzero()[0]
    if len(rows) == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    tight = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    polygons = []
    for part in _split_at_holes(tight):
        fine = part.repeat(_ENLARGE, axis=0).repeat(_ENLARGE, axis=1)
        contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        for contour in contours:
            points = (contour[:, 0] + 0.5) / _ENLARGE + (left, top)
            polygons.append([float(x) for x in points.ravel()])
    return polygons


SCENES_VERSION = 2  # raised whenever the same seed gives other pictures or annotations
SPLITS = ("train", "val")
SMALLEST_SIDE = 64
_PARAMETERS = "scenes.json"
_JPEG_QUALITY = 92

logger = logging.getLogger(__name__)


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """Write one scene's objects as COCO entries, numbered from ``first_id`` on."""
    entries = []
    for number, (mask, category) in enumerate(zip(scene.masks, scene.categories, strict=True)):
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        left, top = float(columns[0]), float(rows[0])
        entries.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": category + 1,
                "iscrowd": 0,
                "area": float(mask.sum()),
                "bbox": [left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top],
                "segmentation": mask_to_polygons(mask),
            }
        )
    return entries


def scenes_of_split(
    split: str, count: int, image_size: tuple[int, int], seed: int
) -> Iterator[Scene]:
    """Draw the scenes of a split; scene i depends on (seed, split, i) and the size alone."""
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield render_scene(rng, image_size)


def _write_split(
    root: Path, split: str, count: int, image_size: tuple[int, int], seed: int
) -> None:
    (root / split).mkdir()
    width, height = image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes_of_split(split, count, image_size, seed)):
        name = f"{index:06d}.jpg"
        path = root / split / name
        quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
        if not cv2.imwrite(str(path), scene.image[..., ::-1], quality):
            raise OSError(f"cannot write {path}")
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        annotations += coco_annotations(scene, index + 1, len(annotations) + 1)
        if (index + 1) % 100 == 0 or index + 1 == count:
            logger.info("scenes: %d of %d %s images", index + 1, count, split)
    content = {
        "info": {"description": f"flsl-d2 scenes {SCENES_VERSION}, seed {seed}, {split}"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)],
    }
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content))


def _complete(root: Path, parameters: dict[str, Any]) -> bool:
    """Whether root holds exactly these scenes."""
    try:
        if json.loads((root / _PARAMETERS).read_text()) != parameters:
            return False
        return all(
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
    if min(image_size) < SMALLEST_SIDE:
        raise InputError(
            f"image_size={tuple(image_size)} is too small for the scenes: give width and height of "
            f"{SMALLEST_SIDE} pixels or more."
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
    """Make the scenes, unless `root` already holds exactly them.

    Writes `root/{train,val}/*.jpg` and `root/annotations/instances_{train,val}.json` (COCO format,
    polygons). Equal arguments give bit-identical files with equal versions of numpy and OpenCV.
    Scenes of other parameters at `root` are replaced, as are those whose making was interrupted.

    Args:
        root: the data set's folder; it may not exist yet.
        num_train, num_val: how many images.
        image_size: width and height in pixels.
        seed: any number from 0 on.

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
