"""In-context retrieval: segmentation by a memory of labelled tokens, after Hummingbird.

Balazevic et al., Towards In-context Scene Understanding (arXiv 2306.01667), as implemented by
https://github.com/vpariza/open-hummingbird-eval, whose figures it reproduces from the same tokens.

Shape suffixes: N tokens of an image, D width, C classes.
"""

from __future__ import annotations

import logging
from copy import copy
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomResizedCrop

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.classifiers import retrieve
from flsl_d2.evaluation.labelled_images import IGNORED
from flsl_d2.evaluation.samples import Task, WholeSets, encode_square, resize_labels, square_side
from flsl_d2.evaluation.segmentation import (
    Confusion,
    check_pixel_classes,
    label_pixels,
    patch_distributions,
)

logger = logging.getLogger(__name__)

_SIDE = 512
_CROP_AREA, _CROP_RATIO = (0.5, 2.0), (3 / 4, 4 / 3)
_JITTER = Compose(
    RandomApply([ColorJitter(**{name: 0.1})], p=0.5)
    for name in ("brightness", "contrast", "saturation", "hue")
)


class Memory:
    """Labelled tokens of training images, the same number from each.

    Args:
        num_classes: C.
        per_image: bound of the tokens that each added image gives.
        void_class: class that pixels without a label count as; None leaves them out.
    """

    def __init__(self, num_classes: int, per_image: int, void_class: int | None = None) -> None:
        self.num_classes, self.per_image, self.void_class = num_classes, per_image, void_class
        self.tokens: list[Tensor] = []
        self.shares: list[Tensor] = []

    def add(self, tokens: Tensor, labels: np.ndarray, uniform: np.ndarray) -> None:
        """Add tokens (N, D) of an image whose labels (H, W) are cut into as many patches.

        Tokens of rare classes are preferred: a token's score is the number of patches of the image
        with a class, summed over the token's classes, times ``uniform`` (N,); the lowest stay.
        """
        side = round(len(tokens) ** 0.5)
        if self.void_class is not None:
            labels = np.where(labels == IGNORED, self.void_class, labels)
        shares, labelled = patch_distributions(labels, (side, side), self.num_classes)
        present = shares > 0
        scores = np.where(labelled, present @ present.sum(axis=0) * uniform, np.inf)
        count = min(self.per_image, int(labelled.sum()))
        chosen = torch.from_numpy(np.argsort(scores, kind="stable")[:count].copy())
        self.tokens.append(F.normalize(tokens[chosen.to(tokens.device)], dim=1))
        self.shares.append(torch.from_numpy(shares)[chosen].to(tokens.device))

    def join(self) -> None:
        """Make one tensor of what was added; InputError where no pixel had a label."""
        if not any(len(part) for part in self.tokens):
            raise InputError("no pixel of the training images has a label; use other images.")
        self.tokens, self.shares = [torch.cat(self.tokens)], [torch.cat(self.shares)]

    def segment(self, tokens: Tensor, side: int, k: int, temperature: float) -> np.ndarray:
        """Label the pixels (side, side) of an image by the memory's tokens nearest to its own."""
        cells = round(len(tokens) ** 0.5)
        queries = F.normalize(tokens, dim=1)
        scores = retrieve(queries, self.tokens[0], self.shares[0], k, temperature)
        return label_pixels(scores, (cells, cells), (side, side))


class InContext(WholeSets):
    """Mean IoU of labels retrieved by cross-attention from a memory of training tokens.

    Images are squares of 512 pixels, rounded down to whole patches. The memory holds tokens of
    random crops of the training images, or of 1/8, 1/64 and 1/128 of them. Each token of a
    validation image takes the class shares of its 30 nearest, weighed by the softmax of
    cosine / 0.02; they are enlarged bilinearly to the square, where IoU is counted.
    """

    name = "in_context"
    without_direction: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        self.classes = check_pixel_classes(task.train, task.val)
        self.task, self.options = task, task.options
        self.side = square_side(task.encoder, task.options.side or _SIDE)

    def results(self) -> dict[str, float]:
        """Return ``mIoU`` and, of a part of the training images, ``mIoU_1_of_8`` and so on."""
        memories, images = self._memories(), self.task.val.images
        confusions = {part: Confusion(len(self.classes)) for part in memories}
        k, temperature = self.options.num_neighbours, self.options.attention_temperature
        for image in progress(map(copy, images), "retrieving labels", len(images)):
            tokens = encode_square(self.task.encoder, image.read(), self.side)
            truth = resize_labels(image.semantic, self.side)
            for part, memory in memories.items():
                confusions[part].add(truth, memory.segment(tokens, self.side, k, temperature))
        return {
            "mIoU" if part == 1 else f"mIoU_1_of_{part}": confusion.mean_iou(
                all_classes=self.options.as_reference
            )
            for part, confusion in confusions.items()
        }

    def _memories(self) -> dict[int, Memory]:
        seed, images = self.task.seed, self.task.train.images
        rank = np.random.default_rng(seed).permutation(len(images))
        void_class = 0 if self.options.as_reference else None
        counts = {part: len(images) // part for part in self.options.fractions}
        if small := [f"1/{part}" for part, count in counts.items() if not count]:
            logger.warning("%s of %d images is none; left out.", ", ".join(small), len(images))
        epochs = self.options.augmentation_epochs
        memories = {
            part: Memory(
                len(self.classes), max(self.options.memory_size // (count * epochs), 1), void_class
            )
            for part, count in counts.items()
            if count
        }
        crops = [(index, epoch) for index in range(len(images)) for epoch in range(epochs)]
        for index, epoch in progress(crops, "filling the memory", unit="crop"):
            users = [memory for part, memory in memories.items() if rank[index] < counts[part]]
            if users:
                generator = np.random.default_rng([seed, index, epoch])
                tokens, labels = self._crop(index, int(generator.integers(2**63)))
                uniform = generator.random(len(tokens))
                for memory in users:
                    memory.add(tokens, labels, uniform)
        for memory in memories.values():
            memory.join()
        return memories

    def _crop(self, index: int, seed: int) -> tuple[Tensor, np.ndarray]:
        """Encode a random crop of a training image, and cut its labels: (N, D), (side, side)."""
        image = copy(self.task.train.images[index])
        pixels = Image.fromarray(image.read())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels = _JITTER(pixels)
            top, left, height, width = RandomResizedCrop.get_params(
                pixels, list(_CROP_AREA), list(_CROP_RATIO)
            )
        crop = np.asarray(pixels)[top : top + height, left : left + width]
        labels = image.semantic[top : top + height, left : left + width]
        tokens = encode_square(self.task.encoder, crop, self.side)
        return tokens, resize_labels(labels, self.side)
