"""Textures of the scenes: patterns in [0, 1] that two colours are mixed by.

A pattern is a function of u and v, float32 arrays (H, W) of coordinates in pixels that turn with
the object, so that a striped disc that is rotated has rotated stripes.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Pattern = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _soft_step(x: np.ndarray) -> np.ndarray:
    """A step at 0 that takes one pixel: hard edges would only be aliasing."""
    return np.clip(x + 0.5, 0.0, 1.0)


def _fold(x: np.ndarray, period: float) -> np.ndarray:
    """Signed distance of x to the nearest edge of stripes of that period, in pixels."""
    return np.abs(np.mod(x, period) - period / 2) - period / 4


def octaves(rng: np.random.Generator, height: int, width: int, coarsest: float) -> np.ndarray:
    """Noise of several scales, each half as coarse and 0.6 times as strong, (H, W) in [0, 1].

    Args:
        coarsest: the size of the largest features in pixels.
    """
    total = np.zeros((height, width), np.float32)
    strength, cell = 1.0, coarsest
    while cell >= 1.5:
        grid = (int(np.ceil(height / cell)) + 2, int(np.ceil(width / cell)) + 2)
        noise = rng.random(grid, dtype=np.float32)
        total += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
        strength, cell = strength * 0.6, cell / 2
    low, high = float(total.min()), float(total.max())
    return (total - low) / max(high - low, 1e-6)


def stripes(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Parallel bands."""
    return _soft_step(_fold(u, rng.uniform(6, 10)))


def checks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A chess board."""
    period = rng.uniform(9, 14)
    a, b = _soft_step(_fold(u, period)), _soft_step(_fold(v, period))
    return a + b - 2 * a * b


def dots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Round dots on a square lattice."""
    period = rng.uniform(7, 10)
    du, dv = np.mod(u, period) - period / 2, np.mod(v, period) - period / 2
    return _soft_step(0.32 * period - np.sqrt(du * du + dv * dv))


def speckle(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Fine irregular spots."""
    return _soft_step(8 * (octaves(rng, *u.shape, coarsest=4.0) - 0.5))


def zigzag(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bands that turn to and fro."""
    period = rng.uniform(8, 11)
    return _soft_step(_fold(u + 1.2 * np.abs(np.mod(v, 12) - 6), period))


def gradient(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A smooth ramp from one colour to the other, without any edge inside."""
    low, high = float(u.min()), float(u.max())
    return (u - low) / max(high - low, 1e-6)


def bricks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Brickwork with thin joints; background only."""
    height = rng.uniform(10, 18)
    row = np.floor(v / height)
    along = np.mod(u + (row % 2) * height, 2 * height)
    joint = np.minimum(np.minimum(along, 2 * height - along), np.mod(v, height))
    return _soft_step(joint - 1.2)


def planks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Wide soft waves; background only."""
    return 0.5 + 0.5 * np.sin(u * (2 * np.pi / rng.uniform(24, 48)) + 0.4 * np.sin(v / 17))


def clouds(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Noise of many scales; background and clutter only."""
    return octaves(rng, *u.shape, coarsest=max(u.shape) / 3)


BACKGROUNDS: tuple[Pattern, ...] = (bricks, planks, clouds, stripes, gradient)
CLUTTER: tuple[Pattern, ...] = (clouds, gradient, planks)
