"""What measures are made of: their base, their settings, and images with their frozen tokens."""

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
    """Settings that the protocols leave open; InputError for a value out of range."""

    short_side: int = 448  # pixels that the shorter side of an image is resized to
    bank_size: int = 10_000  # most labelled patches in the bank of a segmentation measure
    num_neighbours: int = 30  # k of k-NN segmentation and of in-context retrieval
    temperature: float = 0.07  # T of the weights exp(cosine / T) of all k-NN votes
    class_neighbours: tuple[int, ...] = (10, 20, 100, 200)  # k of naming an object or an image
    probe_steps: int = 100  # most iterations of a linear probe's solver
    kernel_widths: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 32.0)  # choice of cluster quality
    cluster_counts: tuple[int, ...] = (2, 3, 4, 6, 8, 12, 16)  # choice of cluster quality
    side: int | None = None  # pixels of square images; None for each protocol's own
    memory_size: int = 1_024_000  # most tokens in the memory of in-context retrieval
    fractions: tuple[int, ...] = (1, 8, 64, 128)  # 8: it learns from 1/8 of the training images
    augmentation_epochs: int = 2  # random crops of each of these images
    attention_temperature: float = 0.02  # T of in-context retrieval
    num_clusters: int = 500  # K of the clusters of a data set that are matched many to one
    cluster_seeds: int = 5  # k-means runs of a data set, with seeds from 0 on
    as_reference: bool = False  # whether known mistakes of the references are repeated

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            values = value if isinstance(value, tuple) else (value,)
            # None is a default, and True and False need no bounds.
            if not values or any(v not in (None, False) and not 0 < v < np.inf for v in values):
                raise InputError(f"{option.name} is {value}; give a number above 0, or several.")


@dataclass(frozen=True)
class Task:
    """Everything that a measure is made from; the encoder is in evaluation mode."""

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
        tokens: (N, D) float32, row-major over the grid (rows, columns).
        pixels: (H, W, 3) uint8 RGB as the encoder saw it.
        attended: input of the last block's attention, (1, rows, columns, D), or with P prefix
            tokens (1, 1, P + N, D); None for encoders without :func:`global_attention`.
    """

    index: int
    tokens: Tensor
    grid: tuple[int, int]
    pixels: np.ndarray
    image: LabelledImage
    attended: Tensor | None = None


class Measure:
    """Base of the measures of frozen features.

    Several share one pass over the images, so that each image is encoded once; samples are not
    kept. Every method, the constructor included, may raise ``InputError`` where the data or the
    encoder do not allow this measure.

    Attributes:
        name: start of the names of its scores.
        without_direction: scores of which high is not better than low.
        prepares_images: whether ``results`` reads and encodes the data sets in its own way; the
            measure is then shown no samples.
    """

    name: str
    without_direction: tuple[str, ...] = ()
    prepares_images = False

    def __init__(self, task: Task) -> None:
        self.task, self.options = task, task.options

    def observe_train(self, sample: Sample) -> None:
        """Take what is needed from a training image."""

    def fit(self) -> None:
        """Learn from the training images, all of which were seen."""

    def observe_val(self, sample: Sample) -> None:
        """Score a validation image."""

    def results(self) -> dict[str, float]:
        """Return the scores over all validation images, without the measure's name."""
        raise NotImplementedError


def global_attention(encoder: Encoder) -> Attention | None:
    """Return the attention of the last block; None where it is another or sees a window only."""
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
        latest[:] = [inputs[0].float()]  # lower precision within autocast

    attention = global_attention(encoder)
    handle = attention.register_forward_pre_hook(keep) if attention is not None else None
    try:
        yield latest
    finally:
        if handle is not None:
            handle.remove()


def square_side(encoder: Encoder, side: int) -> int:
    """Return the largest number of pixels up to a side that is whole patches, at least one."""
    if side < encoder.patch_size:
        raise InputError(
            f"the images' side is {side} pixels and a patch of the encoder {encoder.patch_size}; "
            f"give at least {encoder.patch_size}."
        )
    return side // encoder.patch_size * encoder.patch_size


def resample(image: np.ndarray, size: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    """Resize an image (H, W, C) to a width and height by Pillow, with antialiasing.

    Values of more than 8 bits become float32.
    """
    planes = image if image.dtype == np.uint8 else image.astype(np.float32)
    resized = [Image.fromarray(plane).resize(size, method) for plane in planes.transpose(2, 0, 1)]
    return np.stack([np.asarray(plane) for plane in resized], axis=2)


def encode_square(encoder: Encoder, image: np.ndarray, side: int) -> Tensor:
    """Encode an image (H, W, C), resized to a square with antialiasing, to tokens (N, D)."""
    square = resample(image, (side, side), Image.Resampling.BILINEAR)
    return encode_images(encoder, square[None])[0]


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
            found = extract_tokens(encoder, image.read(encoder.input_format), short_side)
            # A copy, so that the labels which the measures decode are freed with the sample.
            yield Sample(index, *found, copy(image), latest[0] if latest else None)
