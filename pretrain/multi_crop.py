"""Views of an image that are cut independently of each other: global ones, then local ones."""

from __future__ import annotations

import importlib
from typing import Any

import cv2
import numpy as np
import torch

from flsl_d2.errors import InputError
from flsl_d2.images.reader import ImageFile
from pretrain.augmentation import Augmentation, apply_augmentation
from pretrain.step_inputs import StepInputs
from pretrain.views import DEVICE_WORK, check_sizes, crop_box, region_of_box, resized_crop

SEGMENTS = ("none", "grid", "felzenszwalb")


class MultiCropViews:
    """Global and local random resized crops of an image, each augmented by itself.

    The defaults are two global views with DINO's augmentation (arXiv 2104.14294). Tuples of three
    hold a value for the first global view, for further global views, and for local ones.

    Args:
        patch_size: side of a patch in pixels; divides both sizes.
        global_size: side in pixels of ``num_global`` views that cover ``global_scale`` of the
            image's area, smallest and largest share; the same for local views.
        flip: probability that a view is mirrored.
        jitter: largest change of brightness, contrast, saturation and hue (in turns).
        jitter_probability: probability of that colour jitter.
        grey: probability of greyscale.
        blur: probability of a blur whose standard deviation is uniform in 0.1 to 2 pixels.
        solarise: probability that values from 128 up are inverted.
        on_device: work that is left to the training device, ``nothing`` or ``augmentation``.
        segments: segments of the image whose labels the tokens of the views get: ``none``;
            ``grid``, a grid of 10 x 10 cells; or ``felzenszwalb`` (Felzenszwalb and Huttenlocher,
            IJCV 2004) by scikit-image, on the image with a shorter side of at most 224 pixels.
        segment_scale: scale of Felzenszwalb's segments; larger ones for a larger scale.
        segment_size: least number of pixels of Felzenszwalb's segments, in the whole image.
    """

    # The views before augmentation are not kept; only FLSL's multi-stage training asks for them.
    keep_crops = False

    def __init__(
        self,
        patch_size: int = 16,
        global_size: int = 224,
        local_size: int = 96,
        num_global: int = 2,
        num_local: int = 0,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_probability: float = 0.8,
        grey: float = 0.2,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        solarise: tuple[float, float, float] = (0.0, 0.2, 0.0),
        on_device: str = "nothing",
        segments: str = "none",
        segment_scale: float = 1000.0,
        segment_size: int = 1000,
    ) -> None:
        if segments not in SEGMENTS:
            raise InputError(f"views.segments is '{segments}'; use one of {', '.join(SEGMENTS)}.")
        if segments == "felzenszwalb":
            _segmentation()
        self.segments, self.segment_scale = segments, segment_scale
        self.segment_size = segment_size
        if on_device not in DEVICE_WORK[:2]:
            raise InputError(
                f"views.on_device is '{on_device}', and views that are cut from the whole image "
                f"leave at most the augmentation; use one of {', '.join(DEVICE_WORK[:2])}."
            )
        if num_global < 1 or num_local < 0:
            raise InputError(
                f"views.num_global is {num_global} and views.num_local {num_local}; use at least "
                "one global view, and no negative number."
            )
        sizes = [("global_size", global_size), ("local_size", local_size)]
        check_sizes(patch_size, sizes[: 2 if num_local else 1])
        single = {"flip": flip, "jitter_probability": jitter_probability, "grey": grey}
        probabilities = {name: (value,) for name, value in single.items()}
        for name, values in {**probabilities, "blur": blur, "solarise": solarise}.items():
            if not all(0 <= value <= 1 for value in values):
                raise InputError(
                    f"views.{name} is {', '.join(map(str, values))}; use probabilities, 0 to 1."
                )
        self.patch_size, self.global_size, self.on_device = patch_size, global_size, on_device
        self.num_global, self.num_local = num_global, num_local
        self.flip, self.grey = flip, grey
        self.jitter, self.jitter_probability = tuple(jitter), jitter_probability
        kinds = [0, *[1] * (num_global - 1), *[2] * num_local]
        self.kinds = [
            (
                local_size if kind == 2 else global_size,
                tuple(local_scale if kind == 2 else global_scale),
                blur[kind],
                solarise[kind],
            )
            for kind in kinds
        ]

    def __call__(self, image: np.ndarray | ImageFile, rng: np.random.Generator) -> StepInputs:
        """Cut the views of an (H, W, 3) uint8 RGB image, or of a file; OSError if it is damaged."""
        pixels = image.pixels() if isinstance(image, ImageFile) else image
        height, width = pixels.shape[:2]
        views = StepInputs(num_global=self.num_global)
        labels = self._labels(pixels) if self.segments != "none" else None
        for size, (smallest, largest), blur, solarise in self.kinds:
            box = crop_box(rng, height, width, (smallest, largest))
            mirrored = bool(rng.random() < self.flip)
            drawn = self._draw(rng, blur, solarise)
            view = resized_crop(pixels, box, size)
            view = np.ascontiguousarray(view[:, ::-1]) if mirrored else view
            if self.on_device == "nothing":
                view = apply_augmentation(view, drawn)
            else:
                views.augmentations.append(drawn)
            views.views.append(torch.from_numpy(view).permute(2, 0, 1))
            views.regions.append(region_of_box(box, mirrored, height, width))
            if labels is not None:
                region = views.regions[-1]
                views.segments.append(labels_of_tokens(labels, region, size // self.patch_size))
        return views

    def _labels(self, pixels: np.ndarray) -> np.ndarray:
        """Label the segments of an image: int64, at least as large as its grid of cells."""
        if self.segments == "grid":
            return np.arange(100).reshape(10, 10)
        factor = min(224 / min(pixels.shape[:2]), 1.0)
        if factor < 1:
            pixels = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        options = {"sigma": 0.8 * factor, "min_size": round(self.segment_size * factor**2)}
        return np.asarray(_segmentation().felzenszwalb(pixels, self.segment_scale, **options))

    def _draw(self, rng: np.random.Generator, blur: float, solarise: float) -> Augmentation:
        """Draw an augmentation; the number of draws depends on no probability."""
        jittered = rng.random() < self.jitter_probability
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * self.jitter
        order = tuple(int(i) for i in rng.permutation(4))
        grey, blurred, solarised = rng.random(3) < (self.grey, blur, solarise)
        sigma = rng.uniform(0.1, 2.0)
        factors = (max(1 + brightness, 0), max(1 + contrast, 0), max(1 + saturation, 0), hue)
        return Augmentation(
            order if jittered else (),
            factors if jittered else (1.0, 1.0, 1.0, 0.0),
            bool(grey),
            float(sigma) if blurred else 0.0,
            bool(solarised),
        )


def labels_of_tokens(labels: np.ndarray, region: np.ndarray, side: int) -> torch.Tensor:
    """Labels (side * side,) int64 at the centres of a view's patches, row-major.

    ``labels`` (H, W) are those of the image at any size, ``region`` is the view's
    :func:`region_of_box`.
    """
    top, left, rows, columns = region.astype(np.float64)
    centres = (np.arange(side) + 0.5) / side
    y = ((top + centres * rows) * labels.shape[0]).astype(np.int64)
    x = ((left + centres * columns) * labels.shape[1]).astype(np.int64)
    y, x = y.clip(0, labels.shape[0] - 1), x.clip(0, labels.shape[1] - 1)
    return torch.from_numpy(labels[y][:, x].astype(np.int64).ravel())


def _segmentation() -> Any:
    try:
        return importlib.import_module("skimage.segmentation")
    except ImportError as error:
        raise InputError(
            f"views.segments=felzenszwalb needs the package scikit-image ({error}); install it "
            "with pip install 'flsl-d2[methods]', or set views.segments=grid."
        ) from None
