"""Tokens, labels and key points, made from seeds, that the references and the measures get.

This file needs numpy alone, so that `tests/golden/make_protocols.py` can use it in an environment
of the references.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CLASSES, CELLS, PATCH, WIDTH = 6, 8, 8, 64  # class 5 occurs nowhere
SIDE = CELLS * PATCH


def blocks(seed: int, count: int) -> np.ndarray:
    """Classes of patches, (count, CELLS, CELLS), in neighbourhoods of 2 x 2; 255 is void."""
    generator = np.random.default_rng(seed)
    coarse = generator.choice([0, 0, 1, 2, 3, 4, 255], (count, CELLS // 2, CELLS // 2))
    return coarse.repeat(2, axis=1).repeat(2, axis=2)


def pixels(patches: np.ndarray, shift: int = 3) -> np.ndarray:
    """Labels of pixels (count, SIDE, SIDE), moved so that some patches hold several classes."""
    labels = patches.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    return np.roll(labels, shift, axis=(1, 2))


def tokens(patches: np.ndarray, seed: int, noise: float = 1.2) -> np.ndarray:
    """Tokens (count, CELLS^2, WIDTH) that know their class up to noise."""
    codes = np.random.default_rng(99).normal(size=(256, WIDTH))
    shape = (len(patches), CELLS**2, WIDTH)
    noisy = codes[patches.reshape(len(patches), -1)]
    noisy = noisy + noise * 3 * np.random.default_rng(seed).normal(size=shape)
    return noisy.astype(np.float32)


def keys(seed: int, rows: int, columns: int) -> np.ndarray:
    """Keys (rows * columns, WIDTH) of an image with an object of another direction."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(2, rows - 1), generator.integers(2, columns - 1)
    top, left = generator.integers(0, rows - height), generator.integers(0, columns - width)
    inside = np.zeros((rows, columns), bool)
    inside[top : top + height, left : left + width] = True
    directions = generator.normal(size=(2, WIDTH))
    directions[1] -= 0.3 * directions[0]
    noise = 1.8 * generator.normal(size=(rows * columns, WIDTH))
    return (directions[inside.ravel().astype(int)] + noise).astype(np.float32)


SCENES = [(seed, 6 + seed % 5, 7 + seed % 4) for seed in range(40)]  # seed, rows, columns


def image_size(rows: int, columns: int) -> tuple[int, int]:
    """Height and width of an image that is padded to so many patches."""
    return rows * PATCH - 3, columns * PATCH - 5


SPAIR_CELLS, SPAIR_PATCH, SPAIR_WIDTH = 60, 14, 16


def spair_tokens(image: int) -> np.ndarray:
    """Tokens (3600, 16) of an image of the made SPair: a field that all images share, and noise."""
    field = np.random.default_rng(5).normal(size=(10, 10, SPAIR_WIDTH))
    field = field.repeat(6, axis=0).repeat(6, axis=1).reshape(-1, SPAIR_WIDTH)
    fine = np.random.default_rng(6).normal(size=field.shape)
    noise = np.random.default_rng([7, image]).normal(size=field.shape)
    return (field + 0.7 * fine + 0.9 * noise).astype(np.float32)


def write_spair(folder: Path) -> list[str]:
    """Write the annotations of two categories in SPair's layout, and return the images' names."""
    generator = np.random.default_rng(3)
    names = []
    for index, category in enumerate(("cat", "dog")):
        (folder / "PairAnnotation" / "test").mkdir(parents=True, exist_ok=True)
        for part in ("ImageAnnotation", "JPEGImages"):
            (folder / part / category).mkdir(parents=True)
        for pair in range(5):
            sizes = generator.integers(120, 400, (2, 2)).tolist()
            number = int(generator.integers(3, 9))
            content = {
                "category": category,
                "mirror": 0,
                "kps_ids": [str(i) for i in range(number)],
            }
            # Points at the same share of both images, up to some jitter.
            shares = generator.uniform(0.1, 0.9, (number, 2))
            for which, key in enumerate(("src", "trg")):
                name = f"{index}_{pair}_{which}.jpg"
                names.append(f"{category}/{name}")
                width, height = sizes[which]
                jitter = generator.uniform(-0.02, 0.02, (number, 2)) * which
                points = ((shares + jitter) * (width, height)).round().astype(int)
                content[f"{key}_imname"] = name
                content[f"{key}_imsize"] = [width, height, 3]
                content[f"{key}_kps"] = points.tolist()
                content[f"{key}_bndbox"] = [5, 5, width - 9, height - 7]
            path = folder / "PairAnnotation" / "test" / f"{index}{pair}-a-b:{category}.json"
            path.write_text(json.dumps(content))
        annotation = {"kps": {str(i): [1, 1] for i in range(9)}}
        (folder / "ImageAnnotation" / category / "a.json").write_text(json.dumps(annotation))
    return names
