"""Layout of a scene: places of objects and clutter, and their visible parts.

A class is a shape with its texture; size, turn, stretch and place are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flsl_d2.scenes import drawing
from flsl_d2.scenes.drawing import Outlines, Pattern

# A class is a shape and the texture on it; the order gives the category.
CLASSES: tuple[tuple[str, Pattern], ...] = (
    ("disc", drawing.stripes),
    ("ring", drawing.speckle),
    ("star", drawing.checks),
    ("triangle", drawing.dots),
    ("box", drawing.zigzag),
    ("cross", drawing.gradient),
)
CLASS_NAMES: tuple[str, ...] = tuple(name for name, _ in CLASSES)

MAX_OBJECTS = 6
SIZE_RANGE = (0.2, 0.55)  # an object's diameter as a share of the image's shorter side
# Share of an object's area; what is outside the image counts as hidden.
MIN_VISIBLE_SHARE = 0.25
MIN_VISIBLE_PIXELS = 64
_PLACEMENTS = 16  # tries per object before it is left out
HALF_COVERED = 128


@dataclass
class Layer:
    """One thing to be painted: its coverage (h, w) uint8 with the top left corner at `corner`."""

    corner: tuple[int, int]
    covered: np.ndarray
    turn: np.ndarray
    texture: Pattern
    category: int | None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = int((self.covered >= HALF_COVERED).sum())

    def windows(
        self, height: int, width: int
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Slice the image and the coverage where they overlap; None if they do not."""
        (x, y), (h, w) = self.corner, self.covered.shape
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + h, height), min(x + w, width)
        if top >= bottom or left >= right:
            return None
        return (
            (slice(top, bottom), slice(left, right)),
            (slice(top - y, bottom - y), slice(left - x, right - x)),
        )


def _layer(
    rng: np.random.Generator,
    outlines: Outlines,
    texture: Pattern,
    diameter: float,
    image_size: tuple[int, int],
    category: int | None,
) -> Layer:
    """Turn, stretch and place a shape somewhere in the image."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.diag([1.0, rng.uniform(0.8, 1.0)])
    centre = rng.uniform(0.05, 0.95, 2) * image_size
    outlines = drawing.place(outlines, centre, diameter / 2 * turn @ stretch)
    corner = np.floor(outlines[0].min(axis=0)).astype(int) - 2
    width, height = np.ceil(outlines[0].max(axis=0)).astype(int) + 2 - corner
    covered = drawing.coverage([points - corner for points in outlines], height, width)
    return Layer((int(corner[0]), int(corner[1])), covered, turn, texture, category)


def _cover(owners: np.ndarray, layer: Layer, owner: int) -> np.ndarray:
    """Put ``layer`` on top of the map of owners (H, W), as ``owner``."""
    owners = owners.copy()
    windows = layer.windows(*owners.shape)
    if windows is not None:
        inside, part = windows
        owners[inside][layer.covered[part] >= HALF_COVERED] = owner
    return owners


def _all_visible(owners: np.ndarray, layers: list[Layer]) -> bool:
    """Whether every object among the layers still shows enough of itself."""
    pixels = np.bincount(owners.ravel(), minlength=len(layers) + 1)[1:]
    return all(
        layer.category is None
        or (shown >= MIN_VISIBLE_PIXELS and shown >= MIN_VISIBLE_SHARE * layer.size)
        for layer, shown in zip(layers, pixels, strict=True)
    )


def arrange(
    rng: np.random.Generator, image_size: tuple[int, int]
) -> tuple[list[Layer], np.ndarray]:
    """Draw the layers from back to front, and the map (H, W) of the topmost layer's number + 1.

    A layer that would hide an object too far is placed anew, or left out after some tries: nothing
    that can be seen of a class goes without its annotation.
    """
    side = min(image_size)
    objects = int(rng.integers(1, MAX_OBJECTS + 1))
    kinds = ["clutter"] * int(rng.integers(1, 4)) + ["object"] * objects
    kinds += ["clutter"] * int(rng.integers(0, 2))
    layers: list[Layer] = []
    owners = np.zeros(image_size[::-1], np.int32)
    for kind in kinds:
        category = int(rng.integers(len(CLASSES))) if kind == "object" else None
        low, high = np.log(SIZE_RANGE)
        for _ in range(_PLACEMENTS):
            if category is None:
                outline = drawing.CLUTTER_SHAPES[rng.integers(len(drawing.CLUTTER_SHAPES))]
                texture = drawing.CLUTTER_TEXTURES[rng.integers(len(drawing.CLUTTER_TEXTURES))]
                diameter = side * rng.uniform(0.1, 0.5)
            else:
                name, texture = CLASSES[category]
                outline = drawing.SHAPES[name]
                diameter = side * float(np.exp(rng.uniform(low, high)))
            layer = _layer(rng, outline(rng), texture, diameter, image_size, category)
            covered = _cover(owners, layer, len(layers) + 1)
            if _all_visible(covered, [*layers, layer]):
                layers.append(layer)
                owners = covered
                break
    return layers, owners
