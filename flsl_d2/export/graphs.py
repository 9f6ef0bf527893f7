"""Encoders and detectors as plain functions of RGB pixels, for graphs of any image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch import DenseDetector, SemanticSegmentor
from detectron2.structures import ImageList
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT

TOLERANCE = 1e-3


class Graph(nn.Module):
    """A function of RGB pixels that gives tensors.

    Attributes:
        outputs: names of the results.
        input_axes: names of the dimensions of the input that may change, by their numbers;
            ``output_axes`` are those of every result.
    """

    outputs: tuple[str, ...]
    input_axes: dict[int, str]
    output_axes: dict[int, str]

    def __init__(self, model: Any, input_format: str = "RGB") -> None:
        super().__init__()
        self.model, self.input_format = model, input_format
        self.eval()  # exporters restore the mode of the whole, its parts included

    def example(self, number: int) -> Tensor:
        """Return random pixels; another number gives another size."""
        return _pixels(number, (len(self.model.pixel_mean), 192 + 32 * number, 256 - 48 * number))


class EncoderGraph(Graph):
    """Pixels (B, C, H, W) to the map (B, D, H / patch, W / patch), ``final_norm`` included."""

    outputs = ("features",)
    input_axes = {0: "batch", 2: "height", 3: "width"}
    output_axes = {0: "batch", 2: "rows", 3: "columns"}

    def __init__(self, encoder: FLSLViT) -> None:
        super().__init__(encoder)
        self.channels = encoder.input_format.channels
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            values = torch.tensor(getattr(encoder.input_format, name))
            self.register_buffer(name, values.view(-1, 1, 1), False)

    @property
    def encoder(self) -> FLSLViT:
        """The encoder."""
        return self.model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Encode images."""
        features = self.encoder((image - self.mean) / self.std)
        return tuple(features.values())

    def example(self, number: int) -> Tensor:
        """Return random pixels, 2 images of another size for each number."""
        patch, side = self.encoder.patch_size, int(self.encoder.architecture["img_size"])  # type: ignore[arg-type]
        width = side + number * patch * max(side // (2 * patch), 1)
        return _pixels(number, (2 - number % 2, self.channels, side, width))


class DetectorGraph(Graph):
    """RGB pixels (3, H, W) in 0 to 255 to the objects of the image, by falling score.

    The results are boxes (M, 4) as x0, y0, x1, y1 in pixels of the image, scores (M,), classes
    (M,) and, for a detector with masks, the masks (M, S, S) within their boxes, in 0 to 1.
    """

    input_axes = {1: "height", 2: "width"}
    output_axes = {0: "objects"}

    def __init__(self, model: nn.Module, input_format: str) -> None:
        super().__init__(model, input_format)
        has_masks = bool(getattr(getattr(model, "roi_heads", None), "mask_on", False))
        self.outputs = ("boxes", "scores", "classes", *(["masks"] if has_masks else []))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect the objects of an image."""
        image = image.flip(0) if self.input_format == "BGR" else image
        with torch.no_grad(), patch_builtin_len():
            (found,) = self._found(image)
        results: tuple[Tensor, ...] = (found.pred_boxes.tensor, found.scores, found.pred_classes)
        return (*results, found.pred_masks[:, 0]) if "masks" in self.outputs else results

    def _found(self, image: Tensor) -> Any:
        """Objects in pixels of the image, as a list of one entry."""
        model: Any = self.model
        if isinstance(model, GeneralizedRCNN):
            return model.inference([{"image": image}], do_postprocess=False)
        images = model.preprocess_image([{"image": image}])
        maps = model.backbone(images.tensor)
        features = [maps[name] for name in model.head_in_features]
        return model.forward_inference(images, features, model.head(features))


class SegmenterGraph(Graph):
    """RGB pixels (3, H, W) in 0 to 255 to the logits (K, H, W) of each class at each pixel."""

    outputs = ("logits",)
    input_axes = {1: "height", 2: "width"}
    output_axes = {1: "height", 2: "width"}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Segment an image."""
        model: Any = self.model
        height, width = image.shape[-2:]
        image = image.flip(0) if self.input_format == "BGR" else image
        with torch.no_grad():
            images = ImageList.from_tensors(
                [(image - model.pixel_mean) / model.pixel_std],
                model.backbone.size_divisibility,
                padding_constraints=model.backbone.padding_constraints,
            )
            logits, _ = model.sem_seg_head(model.backbone(images.tensor))
        return (logits[0, :, :height, :width],)


def model_graph(model: nn.Module, input_format: str) -> DetectorGraph | SegmenterGraph:
    """Return the graph of a model of Detectron2."""
    if isinstance(model, GeneralizedRCNN | DenseDetector):
        return DetectorGraph(model, input_format)
    if isinstance(model, SemanticSegmentor):
        return SegmenterGraph(model, input_format)
    raise InputError(
        f"a {type(model).__name__} cannot be written as a graph; R-CNN models, RetinaNet and "
        "Semantic FPN can, and the encoder of any model by --part encoder."
    )


def _pixels(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random blobs of several sizes, in which a detector finds more than in noise."""
    rng = np.random.default_rng(seed)
    batch = int(np.prod(shape[:-3], dtype=int))
    image = torch.zeros(batch, *shape[-3:])
    for side in (2, 5, 12):
        coarse = torch.from_numpy(rng.random((batch, shape[-3], side, side), dtype=np.float32))
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

    Returns the largest difference over all results, each relative to the largest value of its kind
    or to 1, whichever is more, infinity where the numbers of objects or classes differ; and the
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
