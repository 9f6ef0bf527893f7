"""Label images: one reader for training and evaluation, and the check of a semantic data set."""

from __future__ import annotations

import os

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.opening import (
    decoder_errors,
    open_picture,
    open_regular,
    orientation,
    printable,
    upright,
)
from flsl_d2.images.reader import picture_size

_PREPARATION = (
    "Detectron2's datasets/prepare_ade20k_sem_seg.py and prepare_panoptic_fpn.py make those of "
    "ADE20K and of COCO"
)
# Number of label images that are read; a wrong preparation shows in the first ones.
_LOOKED_AT = 20


def read_labels(
    path: str,
    copy: bool = False,
    dtype: np.dtype | str | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a label image: the number of the class at every pixel, (H, W), upright.

    A palette is not applied, because its indexes are the numbers. Of colours whose channels are
    equal one channel is taken.

    Args:
        path: path or URL that Detectron2's ``PathManager`` knows.
        copy: not used; part of the interface of Detectron2's ``SemSegEvaluator``.
        dtype: type of the array; by default uint8, or int32 for numbers above 255.
        size: height and width of the picture, upright.

    Raises:
        InputError: the file cannot be read, holds colours, or has another size than its picture.
    """
    labels = indexed_pixels(path)[0]
    if size is not None and labels.shape != tuple(size):
        raise InputError(
            f"the label image '{printable(path)}' has {labels.shape[0]} x {labels.shape[1]} pixels "
            f"and its picture {size[0]} x {size[1]}; both must have one size."
        )
    return labels.astype(dtype) if dtype else labels


def indexed_pixels(path: str) -> tuple[np.ndarray, bool]:
    """Read numbers (H, W) as :func:`read_labels` does, and whether the file has a palette."""
    local = PathManager.get_local_path(path)
    try:
        with decoder_errors(local), open_regular(local) as file:
            image = open_picture(file)
            pixels = np.asarray(image)  # before the orientation, which decoding changes
            turned = upright(pixels, orientation(image))
    except OSError as error:
        raise InputError(
            f"the label image '{printable(path)}' cannot be read ({error}); put it there anew."
        ) from None
    if image.format in ("JPEG", "MPO"):
        raise InputError(
            f"the label image '{printable(path)}' is a JPEG, whose compression changes numbers; "
            "write it as PNG."
        )
    if turned.ndim == 3:
        turned = _one_channel(turned, image, path)
    if turned.dtype == np.float32:
        raise InputError(f"the label image '{printable(path)}' holds floats; write whole numbers.")
    is_small = turned.dtype in (np.dtype(bool), np.dtype(np.uint8))
    return np.array(turned, np.uint8 if is_small else np.int32), image.mode in ("P", "PA")


def _one_channel(pixels: np.ndarray, image: Image.Image, path: str) -> np.ndarray:
    names = image.getbands()
    if names[-1] in "Aa":
        alpha, pixels = pixels[..., -1], pixels[..., :-1]
        if (alpha != 255).any():
            raise InputError(
                f"the label image '{printable(path)}' has transparent pixels; write their class."
            )
    if image.mode not in ("PA", "LA") and (pixels != pixels[..., :1]).any():
        raise InputError(
            f"the label image '{printable(path)}' has colours (pixels of mode {image.mode}), not "
            f"one channel of class numbers; write a PNG with a palette or in grey. {_PREPARATION}."
        )
    return pixels[..., 0]


def check_label_images(name: str) -> int:
    """Check that pictures and label images are there and labels in range; return the class count.

    The first label images are read, because images that were not prepared have other numbers, which
    would train wrong classes without an error. The metadata of the data set have ``stuff_classes``,
    and for Detectron2's own ones ``image_root`` and ``sem_seg_root``.
    """
    metadata = MetadataCatalog.get(name)
    for key in ("image_root", "sem_seg_root"):
        folder = metadata.get(key)
        if folder is not None and not os.path.isdir(folder):
            raise InputError(
                f"the folder {folder} of the data set {name!r} does not exist: put it there or set "
                f"DETECTRON2_DATASETS to the folder that holds the data sets ({_PREPARATION})."
            )
    records = DatasetCatalog.get(name)
    _check_pairs(name, metadata.get("image_root"), {record["file_name"] for record in records})
    num_classes, ignored = len(metadata.stuff_classes), metadata.get("ignore_label", 255)
    for record in records[:_LOOKED_AT]:
        try:
            size = picture_size(record["file_name"])[0]
        except OSError as error:
            raise InputError(f"the image {record['file_name']} cannot be read ({error}).") from None
        _check_range(record["sem_seg_file_name"], size, num_classes, ignored)
    return num_classes


def _check_pairs(name: str, folder: str | None, used: set[str]) -> None:
    """Check that no picture lacks its label image; Detectron2 would leave it out silently."""
    pictures = sorted(e.path for e in os.scandir(folder) if e.is_file()) if folder else []
    without = [path for path in pictures if path not in used]
    if without or not used:
        raise InputError(
            f"the data set {name!r} has {len(without)} pictures without a label image"
            f"{''.join(f', {path}' for path in without[:1])}; {_PREPARATION}."
        )


def _check_range(path: str, size: tuple[int, int], num_classes: int, ignored: int) -> None:
    wrong = np.setdiff1d(read_labels(path, size=size), [*range(num_classes), ignored])
    if wrong.size:
        raise InputError(
            f"{path} has the label {wrong[0]}, but there are the classes 0 to {num_classes - 1} "
            f"and {ignored} for none; {_PREPARATION}."
        )
