"""Images of coloured rectangles whose labels, and so whose perfect tokens, are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flsl_d2.evaluation.labelled_images import LabelledDataset, LabelledImage
from flsl_d2.evaluation.samples import Options, Sample, Task
from flsl_d2.modeling import FLSLViT

PATCH = 8
GRID = (6, 8)
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)
CLASSES = ("left thing", "right thing")
WIDTH = 32

# In patches: x0, y0, x1, y1 and class.
RECTANGLES = [((1, 1, 3, 5), 0), ((5, 2, 8, 5), 1)]


def annotation(rectangle, category: int, **more) -> dict:
    x0, y0, x1, y1 = (PATCH * value for value in rectangle)
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    box = [x0, y0, x1 - x0, y1 - y0]
    return {"bbox": box, "bbox_mode": 1, "category_id": category, "segmentation": [polygon], **more}


def record(rectangles=RECTANGLES) -> dict:
    annotations = [annotation(*rectangle) for rectangle in rectangles]
    size = {"height": SIZE[0], "width": SIZE[1]}
    return {"file_name": "none.png", **size, "annotations": annotations}


def dataset(count: int = 4, rectangles=RECTANGLES) -> LabelledDataset:
    classes = ("background", *CLASSES)
    images = [LabelledImage(record(rectangles), "made", len(classes)) for _ in range(count)]
    return LabelledDataset("made", images, CLASSES, classes)


def true_patches(array: np.ndarray) -> np.ndarray:
    """Return the values at the centre of every patch, flat."""
    return array[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].ravel()


def perfect_tokens(image: LabelledImage) -> torch.Tensor:
    """One direction for each segment and, beside it, one for each class."""
    segments = torch.from_numpy(true_patches(image.segments))
    classes = torch.from_numpy(true_patches(image.semantic))
    codes = torch.eye(WIDTH)
    return 3 * codes[segments] + 3 * codes[10 + classes]


def samples(data: LabelledDataset, tokens_of=perfect_tokens) -> list[Sample]:
    pixels = np.zeros((*SIZE, 3), dtype=np.uint8)
    return [
        Sample(index, tokens_of(image), GRID, pixels, image, torch.randn(1, *GRID, WIDTH))
        for index, image in enumerate(data.images)
    ]


def run(kind, tokens_of=perfect_tokens, data=None, with_attention=True, **options) -> dict:
    """Run all steps of a measure on tokens that are given."""
    data = dataset() if data is None else data
    encoder = FLSLViT(img_size=48, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=2)
    measure = kind(Task(encoder, data, data, Options(**options)))
    for sample in samples(data, tokens_of):
        measure.observe_train(sample)
    measure.fit()
    for sample in samples(data, tokens_of):
        measure.observe_val(sample if with_attention else replace(sample, attended=None))
    return measure.results()
