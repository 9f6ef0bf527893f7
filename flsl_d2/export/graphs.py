"""Encoders and detectors as plain functions of RGB pixels, for graphs of any image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD

TOLERANCE = 1e-3


class Graph(nn.Module):
    """A function of RGB pixels that gives tensors.

    Attributes:
        outputs: names of the results.
        input_axes: names of the dimensions of the input that may change, by their numbers.
        output_axes: the same for the results, all of which have the same.
    """

    outputs: tuple[str, ...]
    input_axes: dict[int, str]
    output_axes: dict[int, str]

    def example(self, number: int) -> Tensor:
        """Return random pixels; another number gives another size."""
        raise NotImplementedError


class EncoderGraph(Graph):
    """RGB pixels (B, 3, H, W) in 0 to 255 to the map (B, D, H / patch, W / patch).

    Args:
        encoder: the encoder, in evaluation mode; ``final_norm`` is part of it.

    Raises:
        InputError: the encoder has other channels than three.
    """

    outputs = ("features",)
    input_axes = {0: "batch", 2: "height", 3: "width"}
    output_axes = {0: "batch", 2: "rows", 3: "columns"}

    def __init__(self, encoder: FLSLViT) -> None:
        super().__init__()
        if encoder.architecture["in_chans"] != 3:
            raise InputError(
                f"the encoder takes images of {encoder.architecture['in_chans']} channels, and "
                "exports take RGB; tools/convert_checkpoint.py writes it for timm and others."
            )
        self.encoder = encoder
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), False)
        self.eval()  # exporters restore the mode of the whole, its parts included

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode images."""
        features = self.encoder((image - self.mean) / self.std)
        return tuple(features.values())

    def example(self, number: int) -> Tensor:
        """Return random pixels, 2 images of another size for each number."""
        patch, side = self.encoder.patch_size, int(self.encoder.architecture["img_size"])  # type: ignore[arg-type]
        width = side + number * patch * max(side // (2 * patch), 1)
        return _pixels(number, (2 - number % 2, 3, side, width))


class DetectorGraph(Graph):
    """RGB pixels (3, H, W) in 0 to 255 to the objects of the image, by falling score.

    The results are boxes (M, 4) as x0, y0, x1, y1 in pixels of the image, scores (M,), classes
    (M,) and, for a detector with masks, the masks (M, S, S) within their boxes, in 0 to 1.

    Args:
        model: detector in evaluation mode.
        input_format: order of channels that it was trained with, ``RGB`` or ``BGR``.

    Raises:
        InputError: the model is no detector with proposals (R-CNN).
    """

    input_axes = {1: "height", 2: "width"}
    output_axes = {0: "objects"}

    def __init__(self, model: nn.Module, input_format: str) -> None:
        super().__init__()
        if not isinstance(model, GeneralizedRCNN):
            raise InputError(
                f"a {type(model).__name__} cannot be written as a graph; Faster, Mask and Cascade "
                "R-CNN can, and the encoder of any model."
            )
        self.model, self.input_format = model, input_format
        self.eval()
        has_masks = bool(getattr(model.roi_heads, "mask_on", False))
        self.outputs = ("boxes", "scores", "classes", *(["masks"] if has_masks else []))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect the objects of an image."""
        image = image.flip(0) if self.input_format == "BGR" else image
        with torch.no_grad(), patch_builtin_len():
            (found,) = self.model.inference([{"image": image}], do_postprocess=False)
        results: tuple[Tensor, ...] = (
            found.pred_boxes.tensor,
            found.scores,
            found.pred_classes,
        )
        return (*results, found.pred_masks[:, 0]) if "masks" in self.outputs else results

    def example(self, number: int) -> Tensor:
        """Return a random picture of another size for each number.

        Raises:
            InputError: the detector takes other channels.
        """
        if self.input_format not in ("RGB", "BGR"):
            raise InputError(
                f"the detector takes images of the format {self.input_format}, and graphs are "
                "written for RGB; write it as safetensors."
            )
        return _pixels(number, (3, 192 + 32 * number, 256 - 48 * number))


def _pixels(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random blobs of several sizes, in which a detector finds more than in noise."""
    rng = np.random.default_rng(seed)
    batch = np.prod(shape[:-3], dtype=int)
    image = torch.zeros(int(batch), *shape[-3:])
    for side in (2, 5, 12):
        coarse = torch.from_numpy(rng.random((int(batch), 3, side, side), dtype=np.float32))
        image += nn.functional.interpolate(coarse, shape[-2:], mode="bilinear") / 3
    return (image * 255).clamp(0, 255).reshape(shape)


def onnx_runner(path: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load an ONNX file into onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(image: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(out) for out in session.run(None, {name: image.numpy()}))

    return run


@torch.no_grad()
def largest_difference(
    graph: Graph, other: Callable[[Tensor], Any], images: list[Tensor]
) -> tuple[float, int]:
    """Compare a graph with its copy in another program.

    Args:
        graph: the graph.
        other: the copy.
        images: pixels.

    Returns:
        The largest difference over all results, each relative to the largest value of its kind or
        to 1, whichever is more, infinity where the numbers of objects or classes differ; and the
        number of rows that were compared.
    """
    worst, rows = 0.0, 0
    for image in images:
        wanted, found = graph(image), tuple(other(image))
        if [w.shape for w in wanted] != [f.shape for f in found]:
            return float("inf"), rows
        rows += len(wanted[0])
        if "boxes" in graph.outputs and len(wanted[0]):
            # Objects of nearly equal scores may come in another order.
            far = (wanted[0][:, None] - found[0][None]).abs().amax(dim=2)
            far = far + 1e6 * (wanted[2][:, None] != found[2][None])
            match = far.argmin(dim=1)
            found = tuple(each[match] for each in found)
        for w, f in zip(wanted, found, strict=True):
            if w.numel():
                difference = (w.double() - f.double()).abs().max()
                worst = max(worst, float(difference / w.double().abs().max().clamp(min=1)))
    return worst, rows
