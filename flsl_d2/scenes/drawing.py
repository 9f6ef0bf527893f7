"""Shapes of the scenes' objects, and textures: patterns in [0, 1] that mix two colours.

A texture is a function of u and v, float32 arrays (H, W) of coordinates in pixels that turn with
the object, so that a striped disc that is rotated has rotated stripes.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Outlines = list[np.ndarray]  # (V, 2) each, in units of the object's half size
Shape = Callable[[np.random.Generator], Outlines]
Pattern = Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]

_SHIFT = 4  # cv2.fillPoly takes fixed-point vertices: 4 bits below the point give 1/16 px


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float, vertices: int = 48) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    return _polar(np.full(vertices, radius), angle)


def _star(rng: np.random.Generator) -> Outlines:
    angle = np.arange(10) * np.pi / 5
    return [_polar(np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.42, 0.52)), angle)]


def _box(rng: np.random.Generator) -> Outlines:
    """Draw a rectangle with rounded corners."""
    corner = 0.25
    half = np.array([0.85, 0.85 * rng.uniform(0.6, 0.9)])
    arc = _circle(corner, vertices=24).reshape(4, 6, 2)
    quadrant = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return [(arc + (quadrant * (half - corner))[:, None]).reshape(-1, 2)]


def _cross(rng: np.random.Generator) -> Outlines:
    arm = rng.uniform(0.28, 0.38)
    x, y = 0.95 * np.array([[1.0, 1.0, arm], [-arm, arm, arm]])
    return [np.stack([np.r_[x, -y, -x, y], np.r_[y, x, -y, -x]], axis=1)]


def _blob(rng: np.random.Generator) -> Outlines:
    """Draw a smooth irregular lump."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = np.full(40, 0.75)
    for wave in (2, 3, 4):
        radius += rng.uniform(0.02, 0.14) * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    return [_polar(radius, angle)]


def _shard(rng: np.random.Generator) -> Outlines:
    """Draw a long crooked splinter."""
    width = rng.uniform(0.06, 0.16)
    bend = rng.uniform(-0.2, 0.2)
    return [np.array([[-1.0, -width], [0.0, bend - width], [1.0, -width / 2], [0.9, width / 2],
                      [0.0, bend + width], [-1.0, width]])]  # fmt: skip


def coverage(outlines: Outlines, height: int, width: int) -> np.ndarray:
    """Share of each pixel that the shape covers, 0 to 255, (H, W) uint8; a second one is a hole."""
    # fillPoly counts from pixel centres, outlines from pixel edges: half a pixel between them.
    fixed = [np.round((points - 0.5) * (1 << _SHIFT)).astype(np.int32) for points in outlines]
    filled = np.zeros((height, width), np.uint8)
    cv2.fillPoly(filled, fixed, 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    return filled


def _soft_step(x: np.ndarray) -> np.ndarray:
    """Step at 0 over one pixel, because hard edges would only be aliasing."""
    return np.clip(x + 0.5, 0.0, 1.0)


def _fold(x: np.ndarray, period: float) -> np.ndarray:
    """Signed distance of x to the nearest edge of stripes of that period, in pixels."""
    return np.abs(np.mod(x, period) - period / 2) - period / 4


def _stretched(x: np.ndarray) -> np.ndarray:
    low, high = float(x.min()), float(x.max())
    return (x - low) / max(high - low, 1e-6)


def octaves(rng: np.random.Generator, size: tuple[int, ...], coarsest: float) -> np.ndarray:
    """Noise of scales from `coarsest` pixels down, each 0.6 times as strong, (H, W) in [0, 1]."""
    height, width = size
    total = np.zeros((height, width), np.float32)
    strength, cell = 1.0, coarsest
    while cell >= 1.5:
        grid = (int(np.ceil(height / cell)) + 2, int(np.ceil(width / cell)) + 2)
        noise = rng.random(grid, dtype=np.float32)
        total += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
        strength, cell = strength * 0.6, cell / 2
    return _stretched(total)


def _checks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    period = rng.uniform(9, 14)
    a, b = _soft_step(_fold(u, period)), _soft_step(_fold(v, period))
    return a + b - 2 * a * b


def _dots(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    period = rng.uniform(7, 10)
    du, dv = np.mod(u, period) - period / 2, np.mod(v, period) - period / 2
    return _soft_step(0.32 * period - np.sqrt(du * du + dv * dv))


def _zigzag(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    period = rng.uniform(8, 11)
    return _soft_step(_fold(u + 1.2 * np.abs(np.mod(v, 12) - 6), period))


def _bricks(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height = rng.uniform(10, 18)
    row = np.floor(v / height)
    along = np.mod(u + (row % 2) * height, 2 * height)
    joint = np.minimum(np.minimum(along, 2 * height - along), np.mod(v, height))
    return _soft_step(joint - 1.2)


_TEXTURES: dict[str, Pattern] = {
    "stripes": lambda rng, u, v: _soft_step(_fold(u, rng.uniform(6, 10))),
    "speckle": lambda rng, u, v: _soft_step(8 * (octaves(rng, u.shape, 4.0) - 0.5)),
    "gradient": lambda rng, u, v: _stretched(u),
    "clouds": lambda rng, u, v: octaves(rng, u.shape, max(u.shape) / 3),
    "planks": lambda rng, u, v: (
        0.5 + 0.5 * np.sin(u * (2 * np.pi / rng.uniform(24, 48)) + 0.4 * np.sin(v / 17))
    ),
}
# A class is a shape and the texture on it; the order gives the category.
CLASSES: dict[str, tuple[Shape, Pattern]] = {
    "disc": (lambda rng: [_circle(1.0)], _TEXTURES["stripes"]),
    "ring": (lambda rng: [_circle(1.0), _circle(rng.uniform(0.42, 0.55))], _TEXTURES["speckle"]),
    "star": (_star, _checks),
    "triangle": (
        lambda rng: [
            _polar(np.ones(3), np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.17, 0.17, 3))
        ],
        _dots,
    ),
    "box": (_box, _zigzag),
    "cross": (_cross, _TEXTURES["gradient"]),
}
CLUTTER_SHAPES: tuple[Shape, ...] = (_blob, _shard)
CLUTTER_TEXTURES = tuple(_TEXTURES[name] for name in ("clouds", "gradient", "planks"))
BACKGROUNDS = (
    _bricks,
    *(_TEXTURES[name] for name in ("planks", "clouds", "stripes", "gradient")),
)
