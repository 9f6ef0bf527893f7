"""The views of one image: nested crops, their augmentation, and which tokens are queries.

Everything random comes from one ``numpy.random.Generator`` per image, so a view depends on the
seed, the epoch and the image alone, not on workers, their number, or where a run was resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError

__all__ = ["NestedViews", "Views", "augment", "crop_box", "pooled_queries", "resized_crop"]

ASPECT_RATIOS = (3 / 4, 4 / 3)


@dataclass
class Views:
    """What one image becomes.

    Attributes:
        images: uint8 (3, S, S) RGB, the teacher's view first, then the student's.
        queries: for every student view (N,) bool over its tokens, True = query.
        crops: like ``images`` before augmentation, where they are kept; else empty.
    """

    images: list[Tensor]
    queries: list[Tensor]
    crops: list[Tensor] = field(default_factory=list)


def crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Box of a random resized crop (Inception's, arXiv 1409.4842).

    The area is uniform in ``scale`` of the image's, the aspect ratio log-uniform in 3/4 to 4/3.
    After ten boxes that do not fit, the largest central one of a permitted ratio is taken.

    Returns:
        top, left, height, width in pixels.
    """
    log_ratios = np.log(ASPECT_RATIOS)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_ratios))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return int(top), int(left), h, w
    h = min(height, max(1, round(width / ASPECT_RATIOS[0])))
    w = min(width, max(1, round(height * ASPECT_RATIOS[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Cut ``box`` out of an image and resample it bicubically, antialiased, to ``size`` squared.

    Args:
        image: (H, W, 3) uint8.
        box: top, left, height, width.
        size: side of the result in pixels.
    """
    top, left, height, width = box
    crop = torch.from_numpy(image)[top : top + height, left : left + width]
    crop = crop.permute(2, 0, 1)[None]  # channels last in memory, the kernel's fast path
    out = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


def pooled_queries(rng: np.random.Generator, grid: int, window: int, random: bool) -> np.ndarray:
    """Random pooling: one query a window of the token grid.

    Windows that do not fill the grid leave a strip over, on a random side along each axis.

    Args:
        rng: source of randomness.
        grid: tokens along each side.
        window: tokens along each side of a window.
        random: draw the token of each window; otherwise it is the first.

    Returns:
        (grid * grid,) bool, True = query; ``(grid // window) ** 2`` of them.
    """
    count = grid // window
    # As many draws whatever the arguments, so that they change the queries of a view and not the
    # views that come after it.
    inside = np.floor(window * random * rng.random((2, grid, grid))[:, :count, :count])
    margin = rng.integers(0, 2, 2) * (grid - count * window)
    corner = np.arange(count) * window
    rows = (margin[0] + corner[:, None] + inside[0]).astype(int)
    columns = (margin[1] + corner[None, :] + inside[1]).astype(int)
    mask = np.zeros((grid, grid), dtype=bool)
    mask[rows, columns] = True
    return mask.reshape(-1)


def augment(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """FLSL's photometric augmentation of one view (method of BYOL and DINO, without flips).

    Colour jitter (p 0.8: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order),
    greyscale (p 0.2), then at even odds either blur (p 0.5) or blur (p 0.1) and solarise (p 0.2).
    The blur's standard deviation is uniform in 0.1 to 2 pixels.

    Args:
        rng: source of randomness.
        image: (S, S, 3) uint8 RGB.
    """
    if rng.random() < 0.8:
        jitters = (_brightness, _contrast, _saturation, _hue)
        factors = (rng.uniform(0.6, 1.4), rng.uniform(0.6, 1.4), rng.uniform(0.8, 1.2))
        factors += (rng.uniform(-0.1, 0.1),)
        for index in rng.permutation(4):
            image = jitters[index](image, factors[index])
    if rng.random() < 0.2:
        image = _grey(image)
    blur_only = rng.random() < 0.5
    if rng.random() < (0.5 if blur_only else 0.1):
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, 2.0))
    if not blur_only and rng.random() < 0.2:
        image = np.where(image >= 128, 255 - image, image)
    return image


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=factor)


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    ramp = np.arange(256) * factor + round(mean) * (1 - factor)
    return cv2.LUT(image, np.clip(ramp, 0, 255).astype(np.uint8))


def _saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, _grey(image), 1 - factor, 0)


def _hue(image: np.ndarray, shift: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(shift * 255) % 256)  # a circle of 256 steps, wraps by itself
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


class NestedViews:
    """The teacher's crop of an image, and the student's crops of that crop.

    Args:
        patch_size: side of a patch in pixels; divides both sizes.
        global_size: side in pixels of the teacher's view and of the student's global view.
        local_size: side of the student's local views.
        num_local: how many of them.
        teacher_scale: share of the image's area that the teacher's crop covers.
        global_scale: share of the teacher's crop that the global view covers.
        local_scale: share of the teacher's crop that a local view covers.
        global_window: tokens along each side of a pooling window in the global view.
        local_window: likewise in local views.
        random_pooling: draw a window's query at random; otherwise it is its first token.
        keep_crops: return the views before augmentation as well, which multi-stage training
            shows to the teacher of the previous stage.

    Raises:
        InputError: a size that the patch does not divide, or a window larger than the grid.
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
        keep_crops: bool = False,
    ) -> None:
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
        self.patch_size, self.random_pooling = patch_size, random_pooling
        self.keep_crops = keep_crops
        self.global_size, self.teacher_scale = global_size, tuple(teacher_scale)
        self.student_views = [(global_size, tuple(global_scale), global_window)]
        self.student_views += [(local_size, tuple(local_scale), local_window)] * num_local

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Views:
        """Views of an (H, W, 3) uint8 RGB image."""
        box = crop_box(rng, *image.shape[:2], self.teacher_scale)
        teacher = resized_crop(image, box, self.global_size)
        crops, images, queries = [teacher], [augment(rng, teacher)], []
        for size, scale, window in self.student_views:
            box = crop_box(rng, self.global_size, self.global_size, scale)
            crops.append(resized_crop(teacher, box, size))
            images.append(augment(rng, crops[-1]))
            grid = size // self.patch_size
            mask = pooled_queries(rng, grid, window, self.random_pooling)
            queries.append(torch.from_numpy(mask))
        return Views(_channels_first(images), queries, _channels_first(crops * self.keep_crops))


def _channels_first(images: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]
