"""Semantic correspondence on SPair-71k: key points found again in another picture of a class.

The protocol of https://github.com/Junyi42/sd-dino (arXiv 2305.15347) for plain features, whose
figures it reproduces from the same tokens, at 64 x 64 tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import encode_images, read_for
from flsl_d2.evaluation.samples import Measure, Task, resample, square_side

_CELLS = 64  # tokens along a side
_TOLERANCE = 0.1  # of the longer side of the target's box


class Correspondence(Measure):
    """PCK@0.1: share of key points found within 0.1 of the longer side of the object's box.

    A point takes the token that covers it, and the centre of the token of the other image with the
    largest cosine is the answer. Only the validation pairs count.
    """

    name = "correspondence"
    prepares_images = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.pairs = [image.record["pair"] for image in task.val.images if "pair" in image.record]
        if not self.pairs:
            raise InputError(
                f"{task.val.name!r} has no pairs of images with key points; use spair_71k_test."
            )
        side = task.options.side or _CELLS * task.encoder.patch_size
        self.side = square_side(task.encoder, side)

    def results(self) -> dict[str, float]:
        """Return the mean over points, over images (pairs), and over categories of points."""
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        tokens: dict[str, Tensor] = {}
        previous = ""
        for pair in progress(sorted(self.pairs, key=lambda p: p["category"]), "matching points"):
            if pair["category"] != previous:  # pairs have one category; few images stay in memory
                tokens, previous = {}, pair["category"]
            for file in (pair["source"], pair["target"]):
                if file not in tokens:
                    tokens[file] = self._encode(file)
            hits = match_points(tokens[pair["source"]], tokens[pair["target"]], pair, self.side)
            found[previous].append(hits)
        images = [hits.mean() for pairs in found.values() for hits in pairs]
        categories = [np.concatenate(pairs) for pairs in found.values()]
        return {
            "pck_point": 100 * float(np.concatenate(categories).mean()),
            "pck_image": 100 * float(np.mean(images)),
            "pck_category": 100 * float(np.mean([hits.mean() for hits in categories])),
        }

    def _encode(self, file: str) -> Tensor:
        image = read_for(self.task.encoder.input_format, file)
        sides = image.shape[1], image.shape[0]
        scale, (x, y) = placement(*sides, self.side)
        width, height = (round(length * scale) for length in sides)
        resized = resample(image, (width, height), Image.Resampling.LANCZOS)
        canvas = np.zeros((self.side, self.side, image.shape[2]), resized.dtype)
        canvas[y : y + height, x : x + width] = resized
        return encode_images(self.task.encoder, canvas[None])[0]


def placement(width: int, height: int, side: int) -> tuple[float, tuple[int, int]]:
    """Return the scale and the left upper corner of an image in the centre of a square."""
    scale = side / max(width, height)
    return scale, ((side - round(width * scale)) // 2, (side - round(height * scale)) // 2)


def match_points(source: Tensor, target: Tensor, pair: dict[str, Any], side: int) -> np.ndarray:
    """Find the key points of a pair again: which are right, (points,) bool.

    Source and target are tokens (N, D) of square images with a side in pixels.
    """
    cells = round(len(source) ** 0.5)
    placed = []
    for which in ("source", "target"):
        width, height = pair[f"{which}_size"]
        scale, corner = placement(width, height, side)
        placed.append(np.asarray(pair[f"{which}_points"], np.float32) * np.float32(scale) + corner)
    columns, rows = (placed[0] * (cells / side)).astype(np.int64).clip(0, cells - 1).T
    queries = F.normalize(source[torch.from_numpy(rows * cells + columns).to(source.device)], dim=1)
    best = (queries @ F.normalize(target, dim=1).T).argmax(dim=1).cpu().numpy()
    patch = side / cells
    answers = np.stack([best % cells, best // cells], axis=1) * patch + patch // 2 - 0.5
    x0, y0, x1, y1 = pair["target_box"]
    reach = _TOLERANCE * max(x1 - x0, y1 - y0) * scale
    return np.linalg.norm(answers - placed[1], axis=1) < reach
