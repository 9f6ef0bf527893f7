"""One scene: objects of six classes that overlap, among clutter, on a textured background.

Each class has a range of hues that overlaps its neighbours', clutter and backgrounds have any
colour, and the light is drawn at random: colour helps, but it does not tell a class by itself.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

from flsl_d2.scenes import drawing
from flsl_d2.scenes.drawing import CLASSES, Outlines, Pattern

CLASS_NAMES = tuple(CLASSES)
MAX_OBJECTS = 6
# Share of an object's area; what is outside the image counts as hidden.
MIN_VISIBLE_SHARE = 0.25
MIN_VISIBLE_PIXELS = 64
_LOG_SIZES = np.log((0.2, 0.55))  # an object's diameter as a share of the image's shorter side
_PLACEMENTS = 16  # tries per object before it is left out
_HALF_COVERED = 128
_Windows = tuple[tuple[slice, ...], tuple[slice, ...]]


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it, of M objects."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    masks: np.ndarray  # (M, H, W) bool, the visible parts; no two overlap
    categories: list[int]  # indices into CLASS_NAMES
    visible_shares: list[float]  # of each object's whole area


@dataclass
class _Layer:
    """One thing to be painted: its coverage (h, w) uint8 with the top left corner at `corner`."""

    corner: tuple[int, int]
    covered: np.ndarray
    turn: np.ndarray
    texture: Pattern
    category: int | None

    def windows(self, height: int, width: int) -> _Windows:
        """Slice the image and the coverage where they overlap; empty if they do not."""
        (x, y), (h, w) = self.corner, self.covered.shape
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + h, height), min(x + w, width)
        bottom, right = max(bottom, top), max(right, left)
        return (
            (slice(top, bottom), slice(left, right)),
            (slice(top - y, bottom - y), slice(left - x, right - x)),
        )


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _place(
    rng: np.random.Generator,
    outlines: Outlines,
    texture: Pattern,
    diameter: float,
    image_size: tuple[int, int],
    category: int | None,
) -> _Layer:
    """Turn, stretch and place a shape somewhere in the image."""
    turn = _turn(rng.uniform(0, 2 * np.pi))
    stretch = np.diag([1.0, rng.uniform(0.8, 1.0)])
    centre = rng.uniform(0.05, 0.95, 2) * image_size
    placed = [points @ (diameter / 2 * turn @ stretch).T + centre for points in outlines]
    corner = np.floor(placed[0].min(axis=0)).astype(int) - 2
    width, height = np.ceil(placed[0].max(axis=0)).astype(int) + 2 - corner
    covered = drawing.coverage([points - corner for points in placed], height, width)
    return _Layer((int(corner[0]), int(corner[1])), covered, turn, texture, category)


def _cover(owners: np.ndarray, layer: _Layer, owner: int) -> np.ndarray:
    """Put ``layer`` on top of the map of owners (H, W), as ``owner``."""
    owners = owners.copy()
    inside, part = layer.windows(*owners.shape)
    owners[inside][layer.covered[part] >= _HALF_COVERED] = owner
    return owners


def _shares(owners: np.ndarray, layers: list[_Layer]) -> list[tuple[int, float]]:
    """Visible pixels of each layer, and their share of all that it covers."""
    pixels = np.bincount(owners.ravel(), minlength=len(layers) + 1)[1:]
    sizes = [int((layer.covered >= _HALF_COVERED).sum()) for layer in layers]
    return [(int(n), n / size) for n, size in zip(pixels, sizes, strict=True)]


def _arrange(
    rng: np.random.Generator, image_size: tuple[int, int]
) -> tuple[list[_Layer], np.ndarray]:
    """Draw the layers from back to front, and the map (H, W) of the topmost layer's number + 1.

    A layer that would hide an object too far is placed anew, or left out after some tries: nothing
    that can be seen of a class goes without its annotation.
    """
    side = min(image_size)
    objects = int(rng.integers(1, MAX_OBJECTS + 1))
    is_object = [False] * int(rng.integers(1, 4)) + [True] * objects
    is_object += [False] * int(rng.integers(0, 2))
    classes = list(CLASSES.values())
    layers: list[_Layer] = []
    owners = np.zeros(image_size[::-1], np.int32)
    for wanted in is_object:
        category = int(rng.integers(len(classes))) if wanted else None
        for _ in range(_PLACEMENTS):
            if category is None:
                outline = drawing.CLUTTER_SHAPES[rng.integers(len(drawing.CLUTTER_SHAPES))]
                texture = drawing.CLUTTER_TEXTURES[rng.integers(len(drawing.CLUTTER_TEXTURES))]
                diameter = side * rng.uniform(0.1, 0.5)
            else:
                outline, texture = classes[category]
                diameter = side * float(np.exp(rng.uniform(*_LOG_SIZES)))
            layer = _place(rng, outline(rng), texture, diameter, image_size, category)
            covered = _cover(owners, layer, len(layers) + 1)
            if all(
                each.category is None
                or (pixels >= MIN_VISIBLE_PIXELS and share >= MIN_VISIBLE_SHARE)
                for each, (pixels, share) in zip(
                    [*layers, layer], _shares(covered, [*layers, layer]), strict=True
                )
            ):
                layers.append(layer)
                owners = covered
                break
    return layers, owners


def _colours(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw two RGB colours (3,) from 0 to 255 whose brightness differs by at least `contrast`."""
    while True:
        pair = rng.uniform(20, 235, (2, 3)).astype(np.float32)
        brightness = pair @ np.array([0.299, 0.587, 0.114], np.float32)
        if abs(float(brightness[0] - brightness[1])) >= contrast:
            return pair[0], pair[1]


def _class_colours(rng: np.random.Generator, category: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a light and a dark RGB colour (3,) from 0 to 255 around the hue of a class."""
    hue = (category + rng.uniform(-0.6, 0.6)) * (1 / len(CLASSES))
    light = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.5, 0.9), rng.uniform(0.75, 0.95))
    dark = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.4))
    pair = np.array([light, dark], np.float32) * 255
    return (pair[0], pair[1]) if rng.random() < 0.5 else (pair[1], pair[0])


def _ramp(height: int, width: int, angle: float, low: float, high: float) -> np.ndarray:
    """Light that changes evenly across the picture, (H, W, 1) factors from low to high."""
    x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(np.sin(angle))
    along = (y[:, None] + x[None, :]) / np.float32(2 * np.sqrt(2)) + 0.5
    return (low + (high - low) * along)[..., None]


def _textured(
    rng: np.random.Generator,
    texture: Pattern,
    turn: np.ndarray,
    size: tuple[int, int],
    colours: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Mix two colours by a texture that is turned, (H, W, 3) float32."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    (a, b), (c, d) = turn.astype(np.float32)
    pattern = texture(rng, a * x + c * y, b * x + d * y)
    return colours[0] + pattern[..., None].astype(np.float32) * (colours[1] - colours[0])


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> np.ndarray:
    """Draw two near colours under coarse noise and uneven light, (H, W, 3) float32."""
    width, height = image_size
    turn = _turn(rng.uniform(0, np.pi))
    texture = drawing.BACKGROUNDS[rng.integers(len(drawing.BACKGROUNDS))]
    first, second = _colours(rng, contrast=20.0)
    second = first + rng.uniform(0.3, 0.8) * (second - first)
    canvas = _textured(rng, texture, turn, (height, width), (first, second))
    clouds = drawing.octaves(rng, (height, width), min(image_size) / 2)
    canvas *= (0.75 + 0.5 * clouds)[..., None]
    return canvas * _ramp(height, width, rng.uniform(0, 2 * np.pi), 0.75, 1.2)


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, layer: _Layer, light: float, shadow: float
) -> None:
    """Put one layer on the canvas (H, W, 3) float32, in place: its shadow first, then itself."""
    inside, part = layer.windows(*canvas.shape[:2])
    if not layer.covered[part].size:
        return
    alpha = layer.covered.astype(np.float32) / 255
    dx, dy = np.round(3 * np.array([np.cos(light), np.sin(light)])).astype(int)
    corner = (layer.corner[0] + int(dx) - 4, layer.corner[1] + int(dy) - 4)
    wider = cv2.copyMakeBorder(layer.covered, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=0)
    shaded = _Layer(corner, wider, layer.turn, layer.texture, None).windows(*canvas.shape[:2])
    soft = cv2.GaussianBlur(wider.astype(np.float32), (0, 0), 2.0)[shaded[1]] / 255
    canvas[shaded[0]] *= 1 - shadow * soft[..., None]
    if layer.category is not None:
        colours = _class_colours(rng, layer.category)
    else:
        colours = _colours(rng, contrast=60.0)
    height, width = alpha.shape
    painted = _textured(rng, layer.texture, layer.turn, (height, width), colours)
    painted *= _ramp(height, width, light, 1.2, 0.75)
    canvas[inside] += alpha[part][..., None] * (painted[part] - canvas[inside])


def render_scene(rng: np.random.Generator, image_size: tuple[int, int]) -> Scene:
    """Draw a scene of one to `MAX_OBJECTS` objects (none only where not even one fits in).

    Everything random comes from `rng`; the image's width and height are 64 pixels at least.
    """
    layers, owners = _arrange(rng, image_size)
    canvas = _background(rng, image_size)
    light, shadow = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.6)
    for layer in layers:
        _paint(rng, canvas, layer, light, shadow)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    strength = rng.uniform(1, 6)
    noise = strength * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    shares = _shares(owners, layers)
    numbers = [n for n, layer in enumerate(layers) if layer.category is not None]
    masks = owners[None] == np.array(numbers, np.int32).reshape(-1, 1, 1) + 1
    categories = [layer.category for layer in layers if layer.category is not None]
    return Scene(image, masks, categories, [float(shares[n][1]) for n in numbers])
