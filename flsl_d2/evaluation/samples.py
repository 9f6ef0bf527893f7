"""Images with their frozen tokens, each encoded once for all measures."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import extract_tokens
from flsl_d2.evaluation.labelled_images import LabelledDataset, LabelledImage
from flsl_d2.modeling import FLSLViT

__all__ = ["Measure", "Options", "Sample", "encode", "progress"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_SECONDS_BETWEEN_LINES = 30


@dataclass(frozen=True)
class Options:
    """What the protocols leave to choose.

    Attributes:
        short_side: pixels that the shorter side of an image is resized to.
        bank_size: most labelled patches in the memory bank of a segmentation measure.
        num_neighbours: k of patch-level k-NN segmentation.
        temperature: T of the weights exp(cosine / T) of all k-NN votes.
        box_neighbours: values of k of box-aligned k-NN.
        probe_steps: iterations of the linear probe's solver.
        kernel_widths: of mean-shift, to choose from; see
            :mod:`flsl_d2.evaluation.cluster_quality`.
        cluster_counts: of tuned k-means, to choose from; see there.
    """

    short_side: int = 448
    bank_size: int = 10_000
    num_neighbours: int = 30
    temperature: float = 0.07
    box_neighbours: Sequence[int] = (10, 20, 100, 200)
    probe_steps: int = 100
    kernel_widths: Sequence[float] = (2.0, 4.0, 8.0, 16.0, 32.0)
    cluster_counts: Sequence[int] = (2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Sample:
    """One image for the measures.

    Attributes:
        index: of the image in its data set.
        tokens: (N, D) float32, row-major over the grid.
        grid: rows and columns of tokens.
        pixels: (H, W, 3) uint8 RGB as the encoder saw it.
        image: its labels.
        attended: what the last block's attention took in, (1, rows, columns, D), or with P prefix
            tokens (1, 1, P + N, D).
    """

    index: int
    tokens: Tensor
    grid: tuple[int, int]
    pixels: np.ndarray
    image: LabelledImage
    attended: Tensor


class Measure(Protocol):
    """Looks at every training image, fits, looks at every validation image, and scores.

    Made as ``Measure(encoder, train, val, options, seed)``. Samples are shown once and not kept,
    so that memory is bounded whatever the size of the data set. Any method may raise an
    ``InputError`` when the data do not allow this measure.
    """

    def observe_train(self, sample: Sample) -> None:
        """Take from a training image what is needed."""

    def fit(self) -> None:
        """All training images were seen."""

    def observe_val(self, sample: Sample) -> None:
        """Score a validation image."""

    def results(self) -> dict[str, float]:
        """Scores over all validation images, without the measure's name."""


@contextmanager
def _attention_inputs(encoder: FLSLViT) -> Iterator[list[Tensor]]:
    """What the last block's attention takes in, of the latest image."""
    latest: list[Tensor] = []

    def keep(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    handle = encoder.blocks[-1].attn.register_forward_pre_hook(keep)
    try:
        yield latest
    finally:
        handle.remove()


def encode(encoder: FLSLViT, dataset: LabelledDataset, short_side: int) -> Iterator[Sample]:
    """Every image of a data set with its tokens, in order.

    Args:
        encoder: in evaluation mode.
        dataset: as of :func:`flsl_d2.evaluation.labelled_images.load_labelled`.
        short_side: see :func:`flsl_d2.evaluation.features.extract_tokens`.

    Raises:
        InputError: an image cannot be read, or a side is smaller than a patch.
    """
    if short_side < encoder.patch_size:
        raise InputError(
            f"short_side is {short_side} pixels and a patch of the encoder {encoder.patch_size}; "
            f"give at least {encoder.patch_size}, better {encoder.patch_size * 14} or more."
        )
    with _attention_inputs(encoder) as latest:
        for index, image in enumerate(dataset.images):
            tokens, grid, pixels = extract_tokens(encoder, image.read(), short_side)
            # A copy, so that the labels which the measures have painted go with the sample.
            yield Sample(index, tokens, grid, pixels, copy(image), latest[0])


def progress(items: Iterable[_T], total: int, what: str) -> Iterator[_T]:
    """A bar with ETA on a terminal; elsewhere a line in the log every half minute."""
    start = said = time.monotonic()
    bar = tqdm(items, desc=what, total=total, unit="image", disable=None, leave=False)
    for done, item in enumerate(bar):
        now = time.monotonic()
        if bar.disable and now - said > _SECONDS_BETWEEN_LINES:
            said = now
            left = (now - start) / done * (total - done)
            logger.info("%s: %d of %d images, %.0f s left", what, done, total, left)
        yield item
