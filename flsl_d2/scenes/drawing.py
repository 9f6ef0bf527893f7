"""Textures of the scenes: patterns in [0, 1] that two colours are mixed by.

A pattern is a function of u and v, float32 arrays (H, W) of coordinates in pixels that turn with
the object, so that a striped disc that is rotated has rotated stripes.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Outlines = list[np.ndarray]

# cv2.fillPoly takes fixed-point vertices: 4 bits below the point give 1/16 px.
_SHIFT = 4


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float, vertices: int = 48) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    return _polar(np.full(vertices, radius), angle)


def disc(rng: np.random.Generator) -> Outlines:
    """Draw a full circle."""
    return [_circle(1.0)]


def ring(rng: np.random.Generator) -> Outlines:
    """Draw a circle with a round hole through which the background is seen."""
    return [_circle(1.0), _circle(rng.uniform(0.42, 0.55))]


def star(rng: np.random.Generator) -> Outlines:
    """Draw a star of five points."""
    angle = np.arange(10) * np.pi / 5
    return [_polar(np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.42, 0.52)), angle)]


def triangle(rng: np.random.Generator) -> Outlines:
    """Draw a triangle whose corners are up to 10 degrees off an equilateral one's."""
    angle = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.17, 0.17, 3)
    return [_polar(np.ones(3), angle)]


def box(rng: np.random.Generator) -> Outlines:
    """Draw a rectangle with rounded corners and sides of 1 : 0.6 to 1 : 0.9."""
    corner = 0.25
    half = np.array([0.85, 0.85 * rng.uniform(0.6, 0.9)])
    arc = _circle(corner, vertices=24).reshape(4, 6, 2)
    quadrant = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return [(arc + (quadrant * (half - corner))[:, None]).reshape(-1, 2)]


def cross(rng: np.random.Generator) -> Outlines:
    """Draw a cross of four equal arms."""
    arm = rng.uniform(0.28, 0.38)
    x, y = 0.95 * np.array([[1.0, 1.0, arm], [-arm, arm, arm]])
    return [np.stack([np.r_[x, -y, -x, y], np.r_[y, x, -y, -x]], axis=1)]


def blob(rng: np.random.Generator) -> Outlines:
    """Draw a smooth irregular lump, which is clutter and no class."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = np.full(40, 0.75)
    for wave in (2, 3, 4):
        radius += rng.uniform(0.02, 0.14) * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    return [_polar(radius, angle)]


def shard(rng: np.random.Generator) -> Outlines:
    """Draw a long crooked splinter, which is clutter and no class."""
    width = rng.uniform(0.06, 0.16)
    bend = rng.uniform(-0.2, 0.2)
    return [np.array([[-1.0, -width], [0.0, bend - width], [1.0, -width / 2], [0.9, width / 2],
                      [0.0, bend + width], [-1.0, width]])]  # fmt: skip


SHAPES: dict[str, Callable[[np.random.Generator], Outlines]] = {
    f.__name__: f for f in (disc, ring, star, triangle, box, cross)
}
CLUTTER_SHAPES: tuple[Callable[[np.random.Generator], Outlines], ...] = (blob, shard)


def place(outlines: Outlines, centre: np.ndarray, matrix: np.ndarray) -> Outlines:
    """Move outlines into an image: `x -> matrix @ x + centre`, 0 at the first pixel's edge.

    Args:
        outlines: arrays (V, 2) in units of the object's half size.
        centre: (2,) x, y in pixels.
        matrix: (2, 2) rotation, stretch and size in pixels.
    """
    return [points @ matrix.T + centre for points in outlines]


def coverage(outlines: Outlines, height: int, width: int) -> np.ndarray:
    """Share of each pixel that the shape covers, 0 to 255, (H, W) uint8, with smooth edges.

    Even-odd filling, so that a second outline inside the first is a hole.
    """
    # fillPoly counts from pixel centres, outlines from pixel edges: half a pixel between them.
    fixed = [np.round((points - 0.5) * (1 << _SHIFT)).astype(np.int32) for points in outlines]
    filled = np.zeros((height, width), np.uint8)
    cv2.fillPoly(filled, fixed, 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    return filled


Pattern = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]


def _soft_step(x: np.ndarray) -> np.ndarray:
    """Step at 0 over one pixel, because hard edges would only be aliasing."""
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
    """Draw a chess board."""
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
    return _soft_step(8 * (octaves(rng, u.shape[0], u.shape[1], coarsest=4.0) - 0.5))


def zigzag(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bands that turn to and fro."""
    period = rng.uniform(8, 11)
    return _soft_step(_fold(u + 1.2 * np.abs(np.mod(v, 12) - 6), period))


def gradient(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Draw a smooth ramp from one colour to the other, without any edge inside."""
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
    return octaves(rng, u.shape[0], u.shape[1], coarsest=max(u.shape) / 3)


BACKGROUNDS: tuple[Pattern, ...] = (bricks, planks, clouds, stripes, gradient)
CLUTTER_TEXTURES: tuple[Pattern, ...] = (clouds, gradient, planks)
