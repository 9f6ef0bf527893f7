"""The views of an image: nested crops, and the tokens of them that are queries.

Everything random comes from one ``numpy.random.Generator`` for each image, so a view depends on
the seed, the epoch and the image alone, not on the workers or on where a run was resumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.images.reader import ImageFile
from pretrain.augmentation import apply_augmentation, draw_augmentation
from pretrain.step_inputs import StepInputs

ASPECT_RATIOS = (3 / 4, 4 / 3)
_LOG_RATIOS = (math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1]))
# Work that is left to the training device: none, the augmentation, or that and the student's crops.
DEVICE_WORK = ("nothing", "augmentation", "crops")


class CutViews(Protocol):
    """An object that cuts the views of an image, such as NestedViews or MultiCropViews.

    ``keep_crops`` says whether the views before augmentation are returned as well.
    """

    keep_crops: bool

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> StepInputs:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file, with draws from ``rng``."""
        ...


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop (arXiv 1409.4842): top, left, height, width in pixels.

    The area is uniform in ``scale`` of the image's, the aspect ratio log-uniform in 3/4 to 4/3.
    After ten boxes that do not fit, the largest central one of a permitted ratio is taken.
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
    """Cut a box out of an image (H, W, 3) uint8 and resample it bicubically, antialiased.

    ``size`` is the side of a square result in pixels, or height and width.
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

    Windows that do not fill the grid leave a strip, on a random side along each axis. ``random``
    draws the token of a window; otherwise it is the first.

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


def region_of_box(
    box: tuple[int, int, int, int], mirrored: bool, height: int, width: int
) -> np.ndarray:
    """Return a view's box in an image as ``StepInputs.regions`` has it, (4,) float32."""
    top, left, rows, columns = box
    if mirrored:
        left, columns = left + columns, -columns
    return np.array([top / height, left / width, rows / height, columns / width], np.float32)


def check_sizes(patch_size: int, sizes: Iterable[tuple[str, int]]) -> None:
    """Raise an InputError where a patch does not divide a size, given with its key of ``views``."""
    for name, size in sizes:
        if size < patch_size or size % patch_size:
            raise InputError(
                f"views.{name} is {size} pixels, which patches of {patch_size} do not divide; "
                f"use a multiple of {patch_size}."
            )


class NestedViews:
    """The teacher's crop of an image, and the student's crops of that crop.

    Args:
        patch_size: side of a patch in pixels; divides both sizes.
        global_size: side in pixels of the teacher's view and of the student's global view.
        local_size: side of the ``num_local`` local views of the student.
        teacher_scale: share of the image's area that the teacher's crop covers, smallest and
            largest.
        global_scale: share of the teacher's crop that the global view covers.
        local_scale: share of the teacher's crop that a local view covers.
        global_window: number of tokens along each side of a pooling window in the global view.
        local_window: number of tokens along each side of a pooling window in local views.
        random_pooling: whether a window's query is drawn; otherwise it is its first token.
        flip: probability that a view is mirrored, drawn for each view by itself. With
            ``model.partner=place`` a token's place in its own view then says less about where it
            lies in the teacher's.
        photometry: strength of :func:`pretrain.augmentation.draw_augmentation`, 0 to 1.
        keep_crops: whether the views before augmentation are returned as well, which multi-stage
            training shows to the teacher of the previous stage.
        on_device: work that is left to the training device, one of :data:`DEVICE_WORK`; the draws
            are the same wherever they are applied.
        reduced_decoding: whether a JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where the
            teacher's crop stays at least as large as its view; the crop's corners are rounded to
            the reduced pixels.
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
            check_sizes(patch_size, [(name, size)])
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

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> StepInputs:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file; OSError if it is damaged."""
        teacher = self._teacher_crop(image, rng)
        views = StepInputs()
        boxes, augmentations = [], [draw_augmentation(rng, self.photometry)]
        for size, scale, window in self.student_views:
            boxes.append(crop_box(rng, self.global_size, self.global_size, scale))
            augmentations.append(draw_augmentation(rng, self.photometry))
            grid = size // self.patch_size
            mask = pooled_queries(rng, grid, window, self.random_pooling)
            views.queries.append(torch.from_numpy(mask.nonzero()[0]))
        # Drawn last and whatever the probability, so that nothing else changes with it.
        flip_teacher, *flips = (rng.random(1 + len(boxes)) < self.flip).tolist()
        teacher = np.ascontiguousarray(teacher[:, ::-1]) if flip_teacher else teacher
        side, sizes = self.global_size, [size for size, _, _ in self.student_views]
        pairs = zip(boxes, flips, strict=True)
        views.regions = [region_of_box(box, flip, side, side) for box, flip in pairs]
        crops = [teacher]
        if self.on_device == "crops":
            views.sizes = sizes
        else:
            for box, flip, size in zip(boxes, flips, sizes, strict=True):
                crop = resized_crop(teacher, box, size)
                crops.append(np.ascontiguousarray(crop[:, ::-1]) if flip else crop)
        if self.on_device == "nothing":
            views.views = _channels_first(map(apply_augmentation, crops, augmentations))
            views.crops = _channels_first(crops * self.keep_crops)
        else:
            views.views, views.augmentations = _channels_first(crops), augmentations
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
