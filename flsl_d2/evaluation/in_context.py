"""In-context retrieval: segmentation by a memory of labelled tokens, after Hummingbird.

Balazevic et al., Towards In-context Scene Understanding (arXiv 2306.01667), as implemented by
https://github.com/vpariza/open-hummingbird-eval, whose figures it reproduces from the same tokens.
"""

from __future__ import annotations

import logging
from copy import copy

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter, Compose, RandomApply, RandomResizedCrop

from flsl_d2.engine.progress import progress
from flsl_d2.evaluation.labelled_images import IGNORED
from flsl_d2.evaluation.samples import Measure, Task, encode_square, resize_labels, square_side
from flsl_d2.evaluation.segmentation import (
    Confusion,
    TokenBank,
    check_pixel_classes,
    label_pixels,
    patch_distributions,
    retrieve,
)

logger = logging.getLogger(__name__)

_SIDE = 512
_CROP_AREA, _CROP_RATIO = (0.5, 2.0), (3 / 4, 4 / 3)
_JITTER = Compose(
    RandomApply([ColorJitter(**{name: 0.1})], p=0.5)
    for name in ("brightness", "contrast", "saturation", "hue")
)


class InContext(Measure):
    """Mean IoU of labels retrieved by cross-attention from a memory of training tokens.

    The memory holds tokens of random crops of the training images, or of a fraction of them.
    """

    name = "in_context"
    prepares_images = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.classes = check_pixel_classes(task.train, task.val)
        self.side = square_side(task.encoder, task.options.side or _SIDE)

    def results(self) -> dict[str, float]:
        """Return ``mIoU`` and, of a part of the training images, ``mIoU_1_of_8`` and so on."""
        encoder, images, options = self.task.encoder, self.task.val.images, self.options
        memories = {part: bank.memory() for part, bank in self._banks().items()}
        confusions = {part: Confusion(len(self.classes)) for part in memories}
        for image in progress(map(copy, images), "retrieving labels", len(images)):
            tokens = encode_square(encoder, image.read(encoder.input_format), self.side)
            truth = resize_labels(image.semantic, self.side)
            cells = self.side // encoder.patch_size
            for part, memory in memories.items():
                scores = retrieve(
                    tokens, memory, options.num_neighbours, options.attention_temperature
                )
                confusions[part].add(truth, label_pixels(scores, (cells, cells), truth.shape))
        return {
            "mIoU" if part == 1 else f"mIoU_1_of_{part}": confusion.mean_iou(options.as_reference)
            for part, confusion in confusions.items()
        }

    def _banks(self) -> dict[int, TokenBank]:
        seed, images, options = self.task.seed, self.task.train.images, self.options
        rank = np.random.default_rng(seed).permutation(len(images))
        counts = {part: len(images) // part for part in options.fractions}
        if small := [f"1/{part}" for part, count in counts.items() if not count]:
            logger.warning("%s of %d images is none; left out.", ", ".join(small), len(images))
        banks = {part: TokenBank() for part, count in counts.items() if count}
        epochs = options.augmentation_epochs
        crops = [(index, epoch) for index in range(len(images)) for epoch in range(epochs)]
        for index, epoch in progress(crops, "filling the memory", unit="crop"):
            users = [part for part in banks if rank[index] < counts[part]]
            if users:
                generator = np.random.default_rng([seed, index, epoch])
                tokens, labels = self._crop(index, int(generator.integers(2**63)))
                uniform = generator.random(len(tokens))
                for part in users:
                    size = max(options.memory_size // (counts[part] * epochs), 1)
                    add_rare(banks[part], tokens, labels, len(self.classes), size, uniform)
        return banks

    def _crop(self, index: int, seed: int) -> tuple[Tensor, np.ndarray]:
        """Encode a random crop of a training image, and cut its labels: (N, D), (side, side).

        Colours are jittered, stored values of other channels or bits not.
        """
        encoder, image = self.task.encoder, copy(self.task.train.images[index])
        pixels = image.read(encoder.input_format)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if pixels.dtype == np.uint8:
                pixels = np.asarray(_JITTER(Image.fromarray(pixels)))
            top, left, height, width = RandomResizedCrop.get_params(
                torch.empty(1, *pixels.shape[:2]), list(_CROP_AREA), list(_CROP_RATIO)
            )
        window = slice(top, top + height), slice(left, left + width)
        labels = resize_labels(image.semantic[window], self.side)
        if self.options.as_reference:  # pixels without a label are class 0 there
            labels = np.where(labels == IGNORED, 0, labels)
        return encode_square(encoder, pixels[window], self.side), labels


def add_rare(
    bank: TokenBank,
    tokens: Tensor,
    labels: np.ndarray,
    num_classes: int,
    count: int,
    uniform: np.ndarray,
) -> None:
    """Add at most ``count`` tokens (N, D) of an image with labels (H, W) to a bank.

    Tokens of rare classes are preferred: a token's score is the number of patches of the image
    with a class, summed over the token's classes, times ``uniform`` (N,); the lowest stay.
    """
    side = round(len(tokens) ** 0.5)
    shares, labelled = patch_distributions(labels, (side, side), num_classes)
    present = shares > 0
    scores = np.where(labelled, present @ present.sum(axis=0) * uniform, np.inf)
    bank.add(tokens, shares, np.argsort(scores, kind="stable")[: min(count, labelled.sum())])
