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
from flsl_d2.scenes.layout import CLASS_NAMES, Layer, arrange


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        masks: (M, H, W) bool, the visible part of every object; no two overlap.
        categories: M indices into `CLASS_NAMES`.
        visible_shares: M shares of each object's whole area that its mask shows.
    """

    image: np.ndarray
    masks: np.ndarray
    categories: list[int]
    visible_shares: list[float]


def _colours(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Two RGB colours (3,) in 0 to 255 whose brightness differs by at least `contrast`."""
    while True:
        pair = rng.uniform(20, 235, (2, 3)).astype(np.float32)
        brightness = pair @ np.array([0.299, 0.587, 0.114], np.float32)
        if abs(float(brightness[0] - brightness[1])) >= contrast:
            return pair[0], pair[1]


def _class_colours(rng: np.random.Generator, category: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a light and a dark RGB colour (3,) in 0 to 255 around the hue of a class."""
    share = 1 / len(CLASS_NAMES)
    hue = (category + rng.uniform(-0.6, 0.6)) * share
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


def _mix(pattern: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first + pattern[..., None].astype(np.float32) * (second - first)


def _coordinates(height: int, width: int, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    (a, b), (c, d) = turn.astype(np.float32)
    return a * x + c * y, b * x + d * y


def _background(rng: np.random.Generator, image_size: tuple[int, int]) -> np.ndarray:
    """Draw two near colours under coarse noise and uneven light, (H, W, 3) float32."""
    width, height = image_size
    angle = rng.uniform(0, np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    pattern = drawing.BACKGROUNDS[rng.integers(len(drawing.BACKGROUNDS))]
    first, second = _colours(rng, contrast=20.0)
    second = first + rng.uniform(0.3, 0.8) * (second - first)
    canvas = _mix(pattern(rng, *_coordinates(height, width, turn)), first, second)
    clouds = drawing.octaves(rng, height, width, coarsest=min(image_size) / 2)
    canvas *= (0.75 + 0.5 * clouds)[..., None]
    return canvas * _ramp(height, width, rng.uniform(0, 2 * np.pi), 0.75, 1.2)


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, layer: Layer, light: float, shadow: float
) -> None:
    """Put one layer on the canvas (H, W, 3) float32, in place: its shadow first, then itself."""
    height, width = canvas.shape[:2]
    windows = layer.windows(height, width)
    if windows is None:
        return
    inside, part = windows
    alpha = layer.covered.astype(np.float32) / 255

    shift = np.round(3 * np.array([np.cos(light), np.sin(light)])).astype(int)
    fallen = Layer(
        (layer.corner[0] + int(shift[0]) - 4, layer.corner[1] + int(shift[1]) - 4),
        cv2.copyMakeBorder(layer.covered, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=0),
        layer.turn, layer.texture, None,
    )  # fmt: skip
    shaded = fallen.windows(height, width)
    if shaded is not None:
        soft = cv2.GaussianBlur(fallen.covered.astype(np.float32), (0, 0), 2.0)[shaded[1]] / 255
        canvas[shaded[0]] *= 1 - shadow * soft[..., None]

    if layer.category is not None:
        first, second = _class_colours(rng, layer.category)
    else:
        first, second = _colours(rng, contrast=60.0)
    rows, columns = alpha.shape
    colours = _mix(layer.texture(rng, *_coordinates(rows, columns, layer.turn)), first, second)
    colours *= _ramp(rows, columns, light, 1.2, 0.75)
    opaque = alpha[part][..., None]
    canvas[inside] += opaque * (colours[part] - canvas[inside])


def render_scene(rng: np.random.Generator, image_size: tuple[int, int]) -> Scene:
    """Draw one scene.

    Args:
        rng: everything random comes from here; equal states give equal scenes.
        image_size: width and height in pixels, 64 at least.

    Returns:
        The picture with one to `MAX_OBJECTS` objects (none only where not even one fits in).
    """
    layers, owners = arrange(rng, image_size)
    canvas = _background(rng, image_size)
    light, shadow = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.6)
    for layer in layers:
        _paint(rng, canvas, layer, light, shadow)
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.7))
    strength = rng.uniform(1, 6)
    noise = strength * rng.standard_normal(canvas.shape, dtype=np.float32)
    image = np.clip(canvas + noise, 0, 255).astype(np.uint8)

    numbers = [n for n, layer in enumerate(layers, start=1) if layer.category is not None]
    masks = (
        np.stack([owners == n for n in numbers]) if numbers else np.zeros((0, *owners.shape), bool)
    )
    shown = [layers[n - 1] for n in numbers]
    return Scene(
        image=image,
        masks=masks,
        categories=[layer.category for layer in shown if layer.category is not None],
        visible_shares=[float(m.sum()) / layer.size for m, layer in zip(masks, shown, strict=True)],
    )
