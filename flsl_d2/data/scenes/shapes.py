"""Outlines of the scenes' objects and clutter, as polygons around the origin.

An outline is an array (V, 2) of x, y in units of the object's half size; a shape is a list of one
or two outlines, the second one being a hole. `place` moves a shape into an image.
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
    """A full circle."""
    return [_circle(1.0)]


def ring(rng: np.random.Generator) -> Outlines:
    """A circle with a round hole through which the background is seen."""
    return [_circle(1.0), _circle(rng.uniform(0.42, 0.55))]


def star(rng: np.random.Generator) -> Outlines:
    """A star of five points."""
    angle = np.arange(10) * np.pi / 5
    return [_polar(np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.42, 0.52)), angle)]


def triangle(rng: np.random.Generator) -> Outlines:
    """A triangle, its corners up to 10 degrees off the equilateral one's."""
    angle = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.17, 0.17, 3)
    return [_polar(np.ones(3), angle)]


def box(rng: np.random.Generator) -> Outlines:
    """A rectangle with rounded corners, sides 1 : 0.6 to 1 : 0.9."""
    corner = 0.25
    half = np.array([0.85, 0.85 * rng.uniform(0.6, 0.9)])
    arc = _circle(corner, vertices=24).reshape(4, 6, 2)
    quadrant = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    return [(arc + (quadrant * (half - corner))[:, None]).reshape(-1, 2)]


def cross(rng: np.random.Generator) -> Outlines:
    """A cross of four equal arms."""
    arm = rng.uniform(0.28, 0.38)
    x, y = 0.95 * np.array([[1.0, 1.0, arm], [-arm, arm, arm]])
    return [np.stack([np.r_[x, -y, -x, y], np.r_[y, x, -y, -x]], axis=1)]


def blob(rng: np.random.Generator) -> Outlines:
    """A smooth irregular lump; clutter, no class."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = np.full(40, 0.75)
    for wave in (2, 3, 4):
        radius += rng.uniform(0.02, 0.14) * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    return [_polar(radius, angle)]


def shard(rng: np.random.Generator) -> Outlines:
    """A long crooked splinter; clutter, no class."""
    width = rng.uniform(0.06, 0.16)
    bend = rng.uniform(-0.2, 0.2)
    return [np.array([[-1.0, -width], [0.0, bend - width], [1.0, -width / 2], [0.9, width / 2],
                      [0.0, bend + width], [-1.0, width]])]  # fmt: skip


SHAPES: dict[str, Callable[[np.random.Generator], Outlines]] = {
    f.__name__: f for f in (disc, ring, star, triangle, box, cross)
}
CLUTTER: tuple[Callable[[np.random.Generator], Outlines], ...] = (blob, shard)


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
