"""Nested views that keep the aspect ratio of the image, within a number of tokens (NaViT).

Views of a batch have several sizes, so each lies in the upper left corner of a square canvas, and
its grid of tokens is given beside it.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from flsl_d2.images.reader import ImageFile
from pretrain.augmentation import apply_augmentation, draw_augmentation
from pretrain.step_inputs import StepInputs
from pretrain.views import check_sizes, resized_crop

MAX_ASPECT = 4.0  # of a grid; of a longer image a part is taken


class NativeViews:
    """The teacher's crop of an image, and the student's crops of that crop, none of them square.

    A view has at most as many tokens as a square of the given side, and no more pixels than it had
    in the image. The arguments are those of :class:`pretrain.views.NestedViews`.
    """

    # There are no views before augmentation to keep, and no square crops for a device.
    keep_crops = False

    def __init__(
        self,
        patch_size: int = 16,
        global_size: int = 224,
        local_size: int = 96,
        num_local: int = 2,
        teacher_scale: tuple[float, float] = (0.8, 1.0),
        global_scale: tuple[float, float] = (0.5, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
    ) -> None:
        check_sizes(patch_size, [("global_size", global_size), ("local_size", local_size)])
        self.patch_size, self.global_size = patch_size, global_size
        self.teacher_scale = tuple(teacher_scale)
        self.student_views = [(global_size, tuple(global_scale))]
        self.student_views += [(local_size, tuple(local_scale))] * num_local

    @property
    def most_tokens(self) -> int:
        return (max(size for size, _ in self.student_views) // self.patch_size) ** 2

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> StepInputs:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file; OSError if it is damaged."""
        pixels = image.pixels() if isinstance(image, ImageFile) else image
        teacher = _cut(pixels, rng, self.teacher_scale)
        views = StepInputs()
        for size, scale in [(self.global_size, None), *self.student_views]:
            crop = teacher if scale is None else _cut(teacher, rng, scale)
            budget = (size // self.patch_size) ** 2
            grid = native_grid(crop.shape[0], crop.shape[1], self.patch_size, budget)
            shape = grid[0] * self.patch_size, grid[1] * self.patch_size
            view = resized_crop(crop, (0, 0, *crop.shape[:2]), shape)
            view = apply_augmentation(view, draw_augmentation(rng))
            side = _canvas(budget) * self.patch_size
            canvas = torch.zeros(3, side, side, dtype=torch.uint8)
            canvas[:, : shape[0], : shape[1]] = torch.from_numpy(view).permute(2, 0, 1)
            views.views.append(canvas)
            views.grids.append(np.array(grid))
        return views


def native_grid(height: int, width: int, patch_size: int, budget: int) -> tuple[int, int]:
    """Rows and columns of patches for an image of a size in pixels, within a budget of tokens.

    It is the grid of the image's aspect ratio, as far as whole patches allow: the largest within
    the budget, or that of the image's own size where that is smaller.
    """
    aspect = min(max(height / width, 1 / MAX_ASPECT), MAX_ASPECT)
    rows = min(math.sqrt(budget * aspect), height / patch_size)
    rows = min(max(math.floor(rows), 1), budget)
    columns = max(round(rows / aspect), 1)
    return rows, max(min(columns, budget // rows, _canvas(budget)), 1)


def _canvas(budget: int) -> int:
    """Return the number of tokens along each side of a canvas for every grid of a budget."""
    return math.ceil(math.sqrt(budget * MAX_ASPECT))


def _cut(image: np.ndarray, rng: np.random.Generator, scale: tuple[float, ...]) -> np.ndarray:
    """Cut a box of the image's aspect ratio, whose share of the area is uniform in ``scale``."""
    side = math.sqrt(rng.uniform(scale[0], scale[1]))
    height, width = (max(round(side * n), 1) for n in image.shape[:2])
    top = int(rng.integers(0, image.shape[0] - height + 1))
    left = int(rng.integers(0, image.shape[1] - width + 1))
    return image[top : top + height, left : left + width]
