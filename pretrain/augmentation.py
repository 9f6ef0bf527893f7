"""FLSL's photometric augmentation of a view: the draws, and their application by opencv.

Drawing and applying are separate, so that the same draws can be applied on the CPU, image by
image, or on a GPU, batch by batch (``pretrain/device_views.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

JITTERS = ("brightness", "contrast", "saturation", "hue")


class Augmentation(NamedTuple):
    """The draws for one view, or arrays of those for a view of B images.

    Attributes:
        order: indexes of the :data:`JITTERS` in the order in which they are applied; empty for
            none. Of a batch (B, 4) int64, -1 for none.
        factors: factors of brightness, contrast and saturation, and the shift of the hue in turns.
        grey: whether the view is turned grey.
        sigma: standard deviation of the blur in pixels; 0 for none.
        solarise: whether values from 128 up are inverted.
    """

    order: Any
    factors: Any
    grey: Any
    sigma: Any
    solarise: Any


def draw_augmentation(rng: np.random.Generator, strength: float = 1.0) -> Augmentation:
    """Draw the augmentation of BYOL (arXiv 2006.07733) and DINO (arXiv 2104.14294), without flips.

    Colour jitter (p 0.8: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1, in random order),
    greyscale (p 0.2), then at even odds either blur (p 0.5) or blur (p 0.1) and solarise (p 0.2).
    The blur's standard deviation is uniform in 0.1 to 2 pixels. ``strength``, 0 to 1, scales the
    jitter's deviations from 1, its hue, and the probabilities of greyscale and solarise.
    """
    order: tuple[int, ...] = ()
    factors = (1.0, 1.0, 1.0, 0.0)
    if rng.random() < 0.8:
        widths = [strength * width for width in (0.4, 0.4, 0.2)]
        brightness, contrast, saturation = (rng.uniform(1 - w, 1 + w) for w in widths)
        factors = (brightness, contrast, saturation, rng.uniform(-0.1, 0.1) * strength)
        order = tuple(int(i) for i in rng.permutation(4))
    grey = rng.random() < 0.2 * strength
    blur_only = rng.random() < 0.5
    blurred = rng.random() < (0.5 if blur_only else 0.1)
    sigma = rng.uniform(0.1, 2.0) if blurred else 0.0
    solarise = not blur_only and rng.random() < 0.2 * strength
    return Augmentation(order, factors, grey, sigma, solarise)


def stack_augmentations(drawn: Sequence[Augmentation]) -> Augmentation:
    """Join the augmentations of B images into arrays, with an order of -1 for no jitter.

    Arrays stay on the CPU, where the images of each operation are selected, and travel from the
    workers without shared memory.
    """
    _, factors, grey, sigma, solarise = zip(*drawn, strict=True)
    order = [each.order or (-1,) * len(JITTERS) for each in drawn]
    return Augmentation(
        np.array(order),
        np.array(factors, np.float32),
        np.array(grey),
        np.array(sigma, np.float32),
        np.array(solarise),
    )


def blur_radius(sigma: float) -> int:
    """Radius in pixels of the blur's kernel, as opencv chooses it for 8-bit images."""
    return (round(6 * sigma + 1) | 1) // 2


def apply_augmentation(image: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    """Apply an augmentation to an (S, S, 3) uint8 RGB image.

    Stored values, (S, S, C) float32, get brightness, contrast and blur; the rest is for RGB alone.
    """
    if image.dtype != np.uint8:
        return _augment_stored_values(image, augmentation)
    jitters = (_brightness, _contrast, _saturation, _hue)
    for index in augmentation.order:
        image = jitters[index](image, augmentation.factors[index])
    if augmentation.grey:
        image = _grey(image)
    if augmentation.sigma:
        image = cv2.GaussianBlur(image, (0, 0), augmentation.sigma)
    if augmentation.solarise:
        image = np.where(image >= 128, 255 - image, image)
    return image


def _augment_stored_values(image: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    brightness, contrast, _, _ = augmentation.factors
    mean = image.mean(axis=(0, 1), dtype=np.float32)
    for index in augmentation.order:
        if JITTERS[index] == "brightness":
            image, mean = image * np.float32(brightness), mean * np.float32(brightness)
        elif JITTERS[index] == "contrast":
            image = (image - mean) * np.float32(contrast) + mean
    if augmentation.sigma:
        image = cv2.GaussianBlur(image, (0, 0), augmentation.sigma).reshape(image.shape)
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
    hsv[..., 0] += np.uint8(round(shift * 255) % 256)  # the hue has 256 steps and wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
