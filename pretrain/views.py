"""The views of an image: nested crops, and the tokens of them that are queries.

Everything random comes from one ``numpy.random.Generator`` for each image, so a view depends on
the seed, the epoch and the image alone, not on the workers or on where a run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.images.reader import ImageFile
from pretrain.augmentation import Augmentation, apply_augmentation, draw_augmentation

ASPECT_RATIOS = (3 / 4, 4 / 3)
_LOG_RATIOS = (math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]))
# Work that is left to the training device: none, the augmentation, or that and the student's crops.
DEVICE_WORK = ("nothing", "augmentation", "crops")


@dataclass
class Views:
    """The views of one image.

    Attributes:
        images: uint8 (3, S, S) RGB, the teacher's view first, then the student's. Where the
            augmentation is left to the device, they are not augmented; where the crops are, the
            teacher's is the only one.
        queries: for each student view (N,) bool over its tokens, True = query.
        boxes: for each student view its box in the teacher's view in pixels (top, left, height,
            width).
        flips: for each student view, whether it is mirrored.
        sizes: side in pixels of each student view.
        crops: the images before augmentation, where they are kept; else empty.
        augmentations: for each view, where they are left to the device; else empty.
        regions: for each view (4,) float32, its place in the image, where views are cut from the
            whole image; else empty. See :class:`pretrain.methods.protocol.StepInputs`.
        num_global: number of views, the first ones, that are global.
        segments: for each view (N,) int64, the label of the segment at each token, where segments
            are wanted; else empty.
        grids: for each view (2,) its rows and columns of tokens, where it fills only the upper left
            of its image; else empty.
    """

    images: list[Tensor]
    queries: list[Tensor]
    boxes: list[tuple[int, int, int, int]]
    flips: list[bool]
    sizes: list[int]
    crops: list[Tensor] = field(default_factory=list)
    augmentations: list[Augmentation] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    num_global: int = 1
    segments: list[Tensor] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)


class CutViews(Protocol):
    """An object that cuts the views of an image: NestedViews, or MultiCropViews.

    Attributes:
        keep_crops: whether the views before augmentation are returned as well.
    """

    keep_crops: bool

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> Views:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file, with draws from ``rng``."""
        ...


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop (arXiv 1409.4842).

    The area is uniform in ``scale`` of the image's, the aspect ratio log-uniform in 3/4 to 4/3.
    After ten boxes that do not fit, the largest central one of a permitted ratio is taken.

    Returns:
        top, left, height, width in pixels.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*_LOG_RATIOS))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return int(top), int(left), h, w
    h = min(height, max(1, round(width / ASPECT_RATIOS[0])))
    w = min(width, max(1, round(height * ASPECT_RATIOS[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(
    image: np.ndarray, box: tuple[int, int, int, int], size: int | tuple[int, int]
) -> np.ndarray:
    """Cut ``box`` out of an image and resample it bicubically, antialiased.

    Args:
        image: (H, W, 3) uint8.
        box: top, left, height, width.
        size: side of a square result in pixels, or height and width.
    """
    top, left, height, width = box
    shape = (size, size) if isinstance(size, int) else size
    # The image becomes a batch before it is cut; otherwise PyTorch does not see that the channels
    # come last, and takes twice as long.
    crop = torch.from_numpy(image)[None, top : top + height, left : left + width]
    crop = crop.permute(0, 3, 1, 2)
    out = F.interpolate(crop, size=shape, mode="bicubic", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def pooled_queries(rng: np.random.Generator, grid: int, window: int, random: bool) -> np.ndarray:
    """Random pooling: one query for each window of the token grid.

    Windows that do not fill the grid leave a strip, on a random side along each axis.

    Args:
        rng: source of randomness.
        grid: number of tokens along each side.
        window: number of tokens along each side of a window.
        random: whether the token of a window is drawn; otherwise it is the first.

    Returns:
        (grid * grid,) bool, True = query; ``(grid // window) ** 2`` of them.
    """
    count = grid // window
    # The number of draws does not depend on the arguments, so that they change the queries of a
    # view and not the views that come after it.
    inside = window * random * rng.random((2, grid, grid))[:, :count, :count]
    margin = rng.integers(0, 2, 2) * (grid - count * window)
    corner = np.arange(count) * window
    rows, columns = inside.astype(np.intp) + margin[:, None, None]
    mask = np.zeros(grid * grid, dtype=bool)
    mask[(rows + corner[:, None]) * grid + columns + corner] = True
    return mask


class NestedViews:
    """The teacher's crop of an image, and the student's crops of that crop.

    Args:
        patch_size: side of a patch in pixels; divides both sizes.
        global_size: side in pixels of the teacher's view and of the student's global view.
        local_size: side of the student's local views.
        num_local: number of local views.
        teacher_scale: share of the image's area that the teacher's crop covers, smallest and
            largest.
        global_scale: share of the teacher's crop that the global view covers.
        local_scale: share of the teacher's crop that a local view covers.
        global_window: number of tokens along each side of a pooling window in the global view.
        local_window: number of tokens along each side of a pooling window in local views.
        random_pooling: whether a window's query is drawn; otherwise it is its first token.
        flip: probability that a view is mirrored horizontally, drawn for each view by itself.
            With ``model.partner=place`` a token's place in its own view then says less about where
            it lies in the teacher's.
        photometry: strength of the photometric augmentation, 0 to 1; see
            :func:`pretrain.augmentation.draw_augmentation`.
        keep_crops: whether the views before augmentation are returned as well, which multi-stage
            training shows to the teacher of the previous stage.
        on_device: work that is left to the training device, one of :data:`DEVICE_WORK`; the draws
            are the same wherever they are applied.
        reduced_decoding: whether a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where the
            teacher's crop stays at least as large as its view; the crop's corners are rounded to
            the reduced pixels.

    Raises:
        InputError: ``on_device`` is unknown, the patch does not divide a size, a window is larger
            than the grid, or ``flip`` or ``photometry`` lies outside 0 to 1.
    """

    def __init__(
        self,
        patch_size: int = 16,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 2,
        teacher_scale: tuple[float, float] = (0.8, 1.0),
        global_scale: tuple[float, float] = (0.5, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        global_window: int = 3,
        local_window: int = 2,
        random_pooling: bool = True,
        flip: float = 0.0,
        photometry: float = 1.0,
        keep_crops: bool = False,
        on_device: str = "nothing",
        reduced_decoding: bool = False,
    ) -> None:
        if on_device not in DEVICE_WORK:
            raise InputError(
                f"views.on_device is '{on_device}'; use one of {', '.join(DEVICE_WORK)}."
            )
        for name, value in (("flip", flip), ("photometry", photometry)):
            if not 0 <= value <= 1:
                raise InputError(f"views.{name} is {value}; use a value from 0 to 1.")
        for name, size, window in (
            ("global_size", global_size, global_window),
            ("local_size", local_size, local_window),
        ):
            if size % patch_size:
                raise InputError(
                    f"views.{name} is {size} pixels, which patches of {patch_size} do not divide; "
                    f"use a multiple of {patch_size}."
                )
            if not 1 <= window <= size // patch_size:
                raise InputError(
                    f"the pooling window of views.{name} is {window} tokens, but that view is "
                    f"{size // patch_size} tokens wide; use 1 to {size // patch_size}."
                )
        self.patch_size, self.random_pooling, self.flip = patch_size, random_pooling, flip
        self.photometry = photometry
        self.keep_crops, self.on_device = keep_crops, on_device
        self.reduced_decoding = reduced_decoding
        self.global_size, self.teacher_scale = global_size, teacher_scale
        views = [(global_size, global_scale, global_window)]
        views += [(local_size, local_scale, local_window)] * num_local
        self.student_views: list[tuple[int, tuple[float, float], int]] = [
            (size, (smallest, largest), window) for size, (smallest, largest), window in views
        ]

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> Views:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file.

        Raises:
            OSError: the file cannot be decoded; the text is the reason.
        """
        teacher = self._teacher_crop(image, rng)
        boxes, queries, augmentations = [], [], [draw_augmentation(rng, self.photometry)]
        for size, scale, window in self.student_views:
            boxes.append(crop_box(rng, self.global_size, self.global_size, scale))
            augmentations.append(draw_augmentation(rng, self.photometry))
            grid = size // self.patch_size
            mask = pooled_queries(rng, grid, window, self.random_pooling)
            queries.append(torch.from_numpy(mask))
        # Drawn last and whatever the probability, so that nothing else changes with it.
        flip_teacher, *flips = (rng.random(1 + len(boxes)) < self.flip).tolist()
        teacher = np.ascontiguousarray(teacher[:, ::-1]) if flip_teacher else teacher
        sizes = [size for size, _, _ in self.student_views]
        views = Views([], queries, boxes, flips, sizes)
        crops = [teacher]
        if self.on_device != "crops":
            for box, flip, size in zip(boxes, flips, sizes, strict=True):
                crop = resized_crop(teacher, box, size)
                crops.append(np.ascontiguousarray(crop[:, ::-1]) if flip else crop)
        if self.on_device == "nothing":
            views.images = _channels_first(map(apply_augmentation, crops, augmentations))
            views.crops = _channels_first(crops * self.keep_crops)
        else:
            views.images, views.augmentations = _channels_first(crops), augmentations
        return views

    def _teacher_crop(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        box = crop_box(rng, height, width, self.teacher_scale)
        if isinstance(image, ImageFile):
            reduction = 1
            if self.reduced_decoding:
                largest = min(box[2:]) // self.global_size
                reduction = max((n for n in image.reductions if n <= largest), default=1)
            pixels = image.pixels(reduction)
            top, left = round(box[0] / reduction), round(box[1] / reduction)
            bottom = round((box[0] + box[2]) / reduction)
            right = round((box[1] + box[3]) / reduction)
            return resized_crop(pixels, (top, left, bottom - top, right - left), self.global_size)
        return resized_crop(image, box, self.global_size)


def _channels_first(images: Iterable[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]
