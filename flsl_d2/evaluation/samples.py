"""Images with their frozen tokens, each encoded once for all measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, fields

import numpy as np
from PIL import Image
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import encode_images, extract_tokens
from flsl_d2.evaluation.labelled_images import LabelledDataset, LabelledImage
from flsl_d2.modeling import Encoder
from flsl_d2.modeling.attention import Attention


@dataclass(frozen=True)
class Options:
    """Settings that the protocols leave open.

    Attributes:
        short_side: pixels that the shorter side of an image is resized to.
        bank_size: bound of the labelled patches in the memory bank of a segmentation measure.
        num_neighbours: k of patch-level k-NN segmentation.
        temperature: T of the weights exp(cosine / T) of all k-NN votes.
        class_neighbours: values of k for k-NN that names an object or an image.
        probe_steps: bound of the iterations of a linear probe's solver.
        kernel_widths: widths of mean-shift to choose from; see
            :mod:`flsl_d2.evaluation.cluster_quality`.
        cluster_counts: numbers of clusters of tuned k-means to choose from; see there.
        side: side in pixels of the images of protocols that look at squares or at the longer
            side; None for each protocol's own.
        memory_size: bound of the tokens in the memory of in-context retrieval.
        fractions: parts of the training images that in-context retrieval learns from; 8 is 1/8.
        augmentation_epochs: random crops of each of these images.
        attention_temperature: T of in-context retrieval.
        num_clusters: K of the clusters of a data set that are matched many to one.
        cluster_seeds: number of k-means runs of a data set, with seeds from 0 on.
        as_reference: whether known mistakes of the reference implementations are repeated.

    Raises:
        InputError: a value out of range.
    """

    short_side: int = 448
    bank_size: int = 10_000
    num_neighbours: int = 30
    temperature: float = 0.07
    class_neighbours: tuple[int, ...] = (10, 20, 100, 200)
    probe_steps: int = 100
    kernel_widths: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)
    cluster_counts: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16)
    side: int | None = None
    memory_size: int = 1_024_000
    fractions: tuple[int, ...] = (1, 8, 64, 128)
    augmentation_epochs: int = 2
    attention_temperature: float = 0.02
    num_clusters: int = 500
    cluster_seeds: int = 5
    as_reference: bool = False

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            values = value if isinstance(value, tuple) else (value,)
            # None is a default, and True and False need no bounds.
            if not values or not all(
                v is None or v is False or 0 < v < float("inf") for v in values
            ):
                raise InputError(f"{option.name} is {value}; give a number above 0, or several.")


class WholeSets:
    """Base of a measure that prepares and encodes the images of its data sets by itself.

    It is shown no samples; ``results`` does the work.
    """

    def observe_train(self, sample: Sample) -> None:
        """Nothing is learned from the shared samples."""

    def fit(self) -> None:
        """Nothing is fitted to the shared samples."""

    def observe_val(self, sample: Sample) -> None:
        """Nothing is scored on the shared samples."""


@dataclass(frozen=True)
class Task:
    """Everything that a measure is made from.

    Attributes:
        encoder: in evaluation mode.
        train: data set that labels are learned from.
        val: data set that is scored.
        options: settings of the protocols.
        seed: seed for everything that is drawn.
    """

    encoder: Encoder
    train: LabelledDataset
    val: LabelledDataset
    options: Options = field(default_factory=Options)
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """One image for the measures.

    Attributes:
        index: position of the image in its data set.
        tokens: (N, D) float32, row-major over the grid.
        grid: rows and columns of tokens.
        pixels: (H, W, 3) uint8 RGB as the encoder saw it.
        image: its labels.
        attended: input of the last block's attention, (1, rows, columns, D), or with P prefix
            tokens (1, 1, P + N, D); None for encoders without :func:`global_attention`.
    """

    index: int
    tokens: Tensor
    grid: tuple[int, int]
    pixels: np.ndarray
    image: LabelledImage
    attended: Tensor | None = None


def global_attention(encoder: Encoder) -> Attention | None:
    """Return the attention of an encoder's last block; None where it does not see all tokens."""
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or getattr(blocks[-1], "window_size", None) != 0:
        return None
    attention = getattr(blocks[-1], "attn", None)
    return attention if isinstance(attention, Attention) else None


@contextmanager
def attention_inputs(encoder: Encoder) -> Iterator[list[Tensor]]:
    """Keep the input of the last block's attention for the latest image, where there is one."""
    latest: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    attention = global_attention(encoder)
    handle = attention.register_forward_pre_hook(keep) if attention is not None else None
    try:
        yield latest
    finally:
        if handle is not None:
            handle.remove()


def check_takes_rgb(encoder: Encoder) -> None:
    """Raise InputError for an encoder of other pixels than those of the published protocols."""
    taken = encoder.input_format
    if (taken.channels, taken.bits) != (3, 8):
        raise InputError(
            f"the encoder takes {taken.channels} channel(s) of {taken.bits} bits, and this "
            "protocol is defined for 8-bit RGB; choose another measure."
        )


def square_side(encoder: Encoder, side: int) -> int:
    """Return the largest number of pixels up to a side that is whole patches.

    Raises:
        InputError: the side is smaller than a patch.
    """
    if side < encoder.patch_size:
        raise InputError(
            f"the images' side is {side} pixels and a patch of the encoder {encoder.patch_size}; "
            f"give at least {encoder.patch_size}."
        )
    return side // encoder.patch_size * encoder.patch_size


def encode_square(encoder: Encoder, image: np.ndarray, side: int) -> Tensor:
    """Encode an image (H, W, 3), resized to a square with antialiasing, to tokens (N, D)."""
    square = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    return encode_images(encoder, np.array(square)[None])[0]


def resize_labels(labels: np.ndarray, side: int) -> np.ndarray:
    """Resize labels (H, W) to a square by PyTorch's ``nearest``, whose pixels are rounded down."""
    rows, columns = (np.arange(side) * length // side for length in labels.shape)
    return labels[rows[:, None], columns]


def encode_dataset(encoder: Encoder, dataset: LabelledDataset, short_side: int) -> Iterator[Sample]:
    """Yield every image of a data set with its tokens, in order."""
    if short_side < encoder.patch_size:
        raise InputError(
            f"short_side is {short_side} pixels and a patch of the encoder {encoder.patch_size}; "
            f"give at least {encoder.patch_size}, better {encoder.patch_size * 14} or more."
        )
    with attention_inputs(encoder) as latest:
        for index, image in enumerate(dataset.images):
            tokens, grid, pixels = extract_tokens(
                encoder, image.read(encoder.input_format), short_side
            )
            # A copy, so that the labels which the measures decode are freed with the sample.
            yield Sample(index, tokens, grid, pixels, copy(image), latest[0] if latest else None)
