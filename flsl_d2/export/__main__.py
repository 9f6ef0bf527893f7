"""Export a trained encoder or detector: ``python -m flsl_d2.export``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flsl_d2.detection.predictor import Predictor
from flsl_d2.engine.command_line import add_option, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.export.card import licence_of, run_facts, versions, write_card
from flsl_d2.export.formats import DETECTOR_FORMATS, FORMATS, WRITERS, silence_exporters
from flsl_d2.export.graphs import DetectorGraph, EncoderGraph
from flsl_d2.files import writable_folder
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights.loading import open_encoder

__all__ = ["export_model", "main"]

DESCRIPTION = "Export an encoder or a whole detector, checked against its source, with a card."
EPILOG = """formats:
  onnx         RGB pixels of any size to features, or to boxes, scores, classes and masks; checked
               in onnxruntime at two sizes
  torch        the same by torch.export (encoders, .pt2) or torch.jit.trace (detectors, .ts)
  timm         an encoder's tensors by timm's names, .safetensors or .pth
  safetensors  tensors by this project's names
  huggingface  a folder of an encoder that timm.create_model('local-dir:FOLDER') loads, and
               'hf-hub:NAME' once it is uploaded

examples:
  tools/export_model.py --model output/detector --format onnx --output detector.onnx
  tools/export_model.py --model output/pretrain --format huggingface --output encoder
  tools/export_model.py --model dino_vits16.pth --format onnx --output encoder.onnx"""


def export_model(
    model: str, file_format: str, output: str | Path, weights: str = "", part: str = "whole"
) -> Path:
    """Export a model; the output is whole and checked, or not there.

    Args:
        model: output folder of a run of pre-training or detection, a weight file of an encoder in
            any known layout, or a detection config.
        file_format: one of :data:`flsl_d2.export.formats.FORMATS`.
        output: file to write, or folder for ``huggingface``.
        weights: detector weights instead of the last ones in the folder.
        part: ``whole``, or ``encoder`` for the encoder of a detector.

    Returns:
        Path of the card.

    Raises:
        InputError: the model cannot be read, cannot have the format, or the exported copy differs.
    """
    endings, write = WRITERS[file_format]
    target = Path(output).expanduser()
    if target.suffix not in endings and endings != ("",):
        raise InputError(
            f"the output '{target}' does not end as {file_format} files do; use "
            f"{' or '.join(endings)}."
        )
    if target.is_dir() and (endings != ("",) or any(target.iterdir())):
        raise InputError(f"the output '{target}' is a folder with files; give another name.")
    writable_folder(target.parent, "--output")
    graph, facts = _open(model, weights, part)
    if isinstance(graph, DetectorGraph) and file_format not in DETECTOR_FORMATS:
        raise InputError(
            f"the model is a detector, and {file_format} is a format of encoders; use "
            f"{', '.join(DETECTOR_FORMATS)}, or --part encoder."
        )
    silence_exporters()
    facts = {"name": target.name, "format": file_format, **facts}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as scratch:
        part_file = Path(scratch, target.name)
        facts["check"] = write(graph, part_file, {**facts, "versions": versions()})
        if target.is_dir():
            target.rmdir()
        os.replace(part_file, target)
    card = write_card(target, {**facts, "versions": versions()})
    print(f"{target}: {facts['check']}\ncard: {card}")
    return card


def _open(
    model: str, weights: str, part: str
) -> tuple[EncoderGraph | DetectorGraph, dict[str, Any]]:
    """Build the graph of a model, and describe its inputs and outputs."""
    place = Path(model).expanduser()
    folder = place if place.is_dir() else None
    own = place / "teacher_backbone.pth"
    if folder is not None and own.is_file() and not weights:
        return _encoder_graph(str(own), folder)
    is_config = place.suffix in (".py", ".yaml", ".yml")
    if folder is None and not is_config:
        return _encoder_graph(model, None)
    predictor = Predictor(model, weights, device="cpu")
    facts = run_facts(folder)
    if part == "encoder":
        encoders = [m for m in predictor.model.modules() if isinstance(m, FLSLViT)]
        if not encoders:
            raise InputError(f"'{model}' holds no FLSLViT; export the whole detector.")
        return EncoderGraph(encoders[0]), _encoder_facts(encoders[0], model) | facts
    graph = DetectorGraph(predictor.model, predictor.input_format)
    resize = [str(step) for step in predictor.resize.augs]
    described = {
        "kind": "detector",
        "source": model,
        "input": {
            "image": "float32 (3, height, width), RGB, 0 to 255; any size; normalised inside",
            "resize": resize or "none",
        },
        "output": {
            "boxes": "float32 (M, 4): x0, y0, x1, y1 in pixels of the image, by falling score",
            "scores": "float32 (M,)",
            "classes": "int64 (M,), numbers of the classes from 0",
            **_mask_facts(graph),
        },
        "classes": list(predictor.class_names),
    }
    return graph, described | facts


def _mask_facts(graph: DetectorGraph) -> dict[str, str]:
    if "masks" not in graph.outputs:
        return {}
    return {"masks": "float32 (M, S, S) in 0 to 1, stretched over the box; 0.5 is the outline"}


def _encoder_graph(file: str, folder: Path | None) -> tuple[EncoderGraph, dict[str, Any]]:
    encoder, account = open_encoder(file)
    facts = _encoder_facts(encoder, file) | run_facts(folder)
    if folder is None:
        facts["initial_weights"] = {
            "file": file,
            "layout": account.source,
            "licence": licence_of(account.source),
        }
    return EncoderGraph(encoder.eval()), facts


def _encoder_facts(encoder: FLSLViT, source: str) -> dict[str, Any]:
    patch = encoder.patch_size
    return {
        "kind": "encoder",
        "source": source,
        "input": {
            "image": "float32 (batch, 3, height, width), RGB, 0 to 255; normalised inside",
            "sides": f"multiples of {patch} pixels",
            "mean": "ImageNet's: 123.675, 116.28, 103.53",
            "std": "ImageNet's: 58.395, 57.12, 57.375",
        },
        "output": {
            "features": f"float32 (batch, {encoder.embed_dim}, height / {patch}, width / {patch})"
        },
        "architecture": encoder.architecture,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the model that a command line names."""
    parser = described_parser(DESCRIPTION, EPILOG)
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|FILE",
        help="output folder of a run, encoder file of any layout, or detection config",
    )
    add_option(parser, "--weights", default="", help="detector weights (default: the folder's)")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format to write")
    parser.add_argument(
        "--part",
        choices=("whole", "encoder"),
        default="whole",
        help="the whole model, or a detector's encoder (default: %(default)s)",
    )
    add_option(parser, "--output", required=True, metavar="FILE", help="file or folder to write")
    args = parser.parse_args(arguments)
    run_tool(export_model, args.model, args.format, args.output, args.weights, args.part)


if __name__ == "__main__":
    main()
