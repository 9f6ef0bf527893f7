"""What the user chose to look at: images, tokens of them, and encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flsl_d2.errors import InputError
from flsl_d2.evaluation.frozen_encoder import RANDOM, frozen_encoder, usable_device
from flsl_d2.modeling import FLSLViT
from pretrain.centroids import read_head
from pretrain.images import find_images, image_files, read_rgb
from pretrain.model import FLSLHead

__all__ = ["NamedEncoder", "chosen_encoders", "chosen_images", "chosen_points", "read_image"]


class NamedEncoder(NamedTuple):
    """An encoder, how pages call it, and its projection head where the file has one."""

    name: str
    backbone: FLSLViT
    head: FLSLHead | None


def chosen_images(images: Sequence[str], dataset: str, max_images: int) -> list[str]:
    """The files that paths and a registered data set stand for.

    Args:
        images: files, all of which are taken, and folders.
        dataset: name of a registered data set; empty for none.
        max_images: of each folder and data set.

    Raises:
        InputError: there is no image, or no such path or data set.
    """
    if not images and not dataset:
        raise InputError("there are no images to draw; give --images or --dataset.")
    files = []
    for path in images:
        if not Path(path).exists():
            raise InputError(f"--images {path!r} does not exist; give image files or folders.")
        if not Path(path).is_dir():
            files.append(path)
            continue
        try:
            found = find_images(path)
        except InputError:
            raise InputError(
                f"--images {path!r} is a folder without image files; give one that holds some."
            ) from None
        files += _evenly(found, max_images, path)
    if dataset:
        found = image_files(name=dataset)
        if not found:
            raise InputError(f"the data set {dataset!r} has no images; give another --dataset.")
        files += _evenly(found, max_images, dataset)
    return files


def _evenly(files: list[str], count: int, source: str) -> list[str]:
    """At most `count` files, spread over all; always the same ones."""
    if len(files) <= count:
        return files
    print(f"{count} of the {len(files)} images of {source}; --max-images takes more")
    return [files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int)]


def read_image(file: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB; an InputError names the file that cannot be read, and why."""
    try:
        return read_rgb(file)
    except OSError as error:
        raise InputError(
            f"the image {file!r} cannot be read ({error}); repair it or leave it out."
        ) from None


def chosen_points(
    points: Sequence[tuple[float, float]], images: Sequence[np.ndarray], files: Sequence[str]
) -> list[list[tuple[float, float]]]:
    """Of each image the points (x, y) in pixels as shares of its width and height; without any, its
    middle.

    Raises:
        InputError: a point lies outside an image.
    """
    shares = []
    for image, file in zip(images, files, strict=True):
        height, width = image.shape[:2]
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(
                    f"--token {x:g},{y:g} lies outside {file!r}, which is {width} x {height} "
                    "pixels; give X from 0 on to the right and Y from 0 on downwards."
                )
        shares.append([(x / width, y / height) for x, y in points] or [(0.5, 0.5)])
    return shares


def chosen_encoders(
    weights: Sequence[str], names: Sequence[str], device: str
) -> list[NamedEncoder]:
    """The encoders of weight files, on a device, with names that differ.

    Raises:
        InputError: weights or device cannot be used.
    """
    names = list(names) or [_name(path) for path in weights]
    place = usable_device(device)
    encoders = []
    for i, (name, path) in enumerate(zip(names, weights, strict=True)):
        unique = name if names.count(name) == 1 else f"{name} ({i + 1})"
        head = None if path == RANDOM else read_head(path)
        encoders.append(NamedEncoder(unique, frozen_encoder(path).to(place), head))
    return encoders


def _name(path: str) -> str:
    """A file by its name and that of its folder, since many are called alike."""
    if path == RANDOM:
        return "random ViT-S/16"
    return "/".join(Path(path).with_suffix("").parts[-2:])
