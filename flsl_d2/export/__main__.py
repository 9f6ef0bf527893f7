"""Export a trained encoder or detector: ``python -m flsl_d2.export``."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flsl_d2.detection.predictor import Predictor
from flsl_d2.engine.command_line import add_option, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.export.card import licence_of, run_facts, versions, write_card
from flsl_d2.export.formats import DETECTOR_FORMATS, FORMATS, WRITERS, usage
from flsl_d2.export.graphs import DetectorGraph, EncoderGraph, SegmenterGraph, model_graph
from flsl_d2.files import writable_folder
from flsl_d2.modeling import FLSLViT, InputFormat
from flsl_d2.modeling.encoder_state import LoadReport
from flsl_d2.weights.loading import open_encoder
from flsl_d2.weights.reading import split_weights_path
from flsl_d2.weights.writing import timm_call, write_account

DESCRIPTION = "Export an encoder or a whole detector, checked against its source, with a card."
EPILOG = """formats:
  d2           an encoder for Detectron2 projects and this one: .pth, as pre-training writes it
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
  tools/export_model.py --model dino_vits16.pth --format onnx --output encoder.onnx
  tools/export_model.py --model dino_vits16_checkpoint.pth --which student --format d2 \\
    --report student.json --output student.pth"""


def export_model(
    model: str,
    file_format: str,
    output: str | Path,
    weights: str = "",
    part: str = "whole",
    which: str | None = None,
    report: str | None = None,
    num_heads: int | None = None,
    trust_config: bool = False,
) -> Path:
    """Export a model; the output is whole and checked, or not there. Return the card's path.

    Args:
        model: output folder of a run of pre-training or detection, a weight file of an encoder in
            any known layout, or a detection config.
        file_format: one of :data:`flsl_d2.export.formats.FORMATS`.
        output: file to write, or folder for ``huggingface``.
        weights: detector weights instead of the last ones in the folder.
        part: ``whole``, or ``encoder`` for the encoder of a detector.
        which: set of weights (``student``, ``state_dict_ema``) of an encoder's file with several.
        report: JSON file for the account of every weight of an encoder's file.
        num_heads: number of attention heads of an encoder's file, which no tensor tells.
        trust_config: see :class:`flsl_d2.Predictor`.

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
    if target.resolve() == Path(split_weights_path(model)[0]).expanduser().resolve():
        raise InputError(f"the output '{target}' is the model; give another name.")
    graph, facts, account = _open(model, weights, part, which, num_heads, trust_config)
    if report is not None and account is None:
        raise InputError("--report is for an encoder's file; leave it out for a detector.")
    if not isinstance(graph, EncoderGraph) and file_format not in DETECTOR_FORMATS:
        raise InputError(
            f"the model is a detector, and {file_format} is a format of encoders; use "
            f"{', '.join(DETECTOR_FORMATS)}, or --part encoder."
        )
    for name in ("torch.onnx", "torch.fx._symbolic_trace"):  # lines about their own progress
        logging.getLogger(name).setLevel(logging.ERROR)
    facts = {"name": target.name, "format": file_format, **facts}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export") as scratch:
        part_file = Path(scratch, target.name)
        facts["check"] = write(graph, part_file, {**facts, "versions": versions()})
        if target.is_dir():
            target.rmdir()
        os.replace(part_file, target)
    code = usage(graph, file_format, target)
    card = write_card(target, {**facts, "versions": versions()}, code)
    if account is not None:
        print(account.table())
        if report is not None:
            write_account(report, account)
    print(f"{target}: {facts['check']}\ncard: {card}")
    if file_format == "timm" and isinstance(graph, EncoderGraph):
        print(f"Load it with:\n{timm_call(graph.encoder, target)}")
        own = graph.encoder.architecture
        if own["position_offset"] or not own["position_antialias"]:
            print("At other image sizes timm resamples positions, but not as this encoder does.")
    return card


_Opened = tuple[EncoderGraph | DetectorGraph | SegmenterGraph, dict[str, Any], LoadReport | None]


def _open(
    model: str,
    weights: str,
    part: str,
    which: str | None,
    num_heads: int | None,
    trust_config: bool = False,
) -> _Opened:
    """Build the graph of a model, describe its inputs and outputs, and account for its weights."""
    place = Path(model).expanduser()
    folder = place if place.is_dir() else None
    own = place / "teacher_backbone.pth"
    if folder is not None and own.is_file() and not weights:
        return _encoder_graph(str(own), folder, which, num_heads)
    is_config = place.suffix in (".py", ".yaml", ".yml")
    if folder is None and not is_config:
        return _encoder_graph(model, None, which, num_heads)
    if which is not None or num_heads is not None:
        raise InputError("--which and --num-heads are for an encoder's file; leave them out.")
    predictor = Predictor(model, weights, device="cpu", trust_config=trust_config)
    detector: Any = predictor.model
    facts = run_facts(folder)
    if part == "encoder":
        encoders = [m for m in detector.modules() if isinstance(m, FLSLViT)]
        if not encoders:
            raise InputError(f"'{model}' holds no FLSLViT; export the whole detector.")
        mean, std = (t.flatten().tolist() for t in (detector.pixel_mean, detector.pixel_std))
        if len(mean) != 3:  # of three channels the encoder has ImageNet's, by its pixel adapter
            bits = 8 if max(mean) < 256 else 16
            encoders[0].input_format = InputFormat(
                len(mean), bits, tuple(mean), tuple(std), stated=True
            )
        encoder_graph = EncoderGraph(encoders[0])
        return encoder_graph, _encoder_facts(encoder_graph, model) | facts, None
    graph = model_graph(detector, predictor.input_format)
    resize = [str(step) for step in predictor.resize.augs]
    pixels = f"float32 ({_pixel_facts(len(detector.pixel_mean))}; any size; normalised inside"
    described = {
        "kind": "segmenter" if isinstance(graph, SegmenterGraph) else "detector",
        "source": model,
        "input": {"image": pixels, "resize": resize or "none"},
        "output": {name: _OUTPUTS[name] for name in graph.outputs},
        "classes": list(predictor.class_names),
    }
    return graph, described | facts, None


_OUTPUTS = {
    "boxes": "float32 (M, 4): x0, y0, x1, y1 in pixels of the image, by falling score",
    "scores": "float32 (M,)",
    "classes": "int64 (M,), numbers of the classes from 0",
    "masks": "float32 (M, S, S) in 0 to 1, stretched over the box; 0.5 is the outline",
    "logits": "float32 (K, height, width): of each class at each pixel; the largest is its class",
}


def _pixel_facts(channels: int) -> str:
    kind = "RGB, 0 to 255" if channels == 3 else "stored values"
    return f"{channels}, height, width), {kind}"


def _encoder_graph(
    file: str, folder: Path | None, which: str | None, num_heads: int | None
) -> _Opened:
    changes = {} if num_heads is None else {"num_heads": num_heads}
    encoder, account = open_encoder(file, which, **changes)
    facts = run_facts(folder)
    graph = EncoderGraph(encoder.eval())
    facts = _encoder_facts(graph, file) | facts
    if folder is None:
        source = account.source
        weights = {"file": file, "layout": source, "licence": licence_of(source)}
        facts["initial_weights"] = weights
    return graph, facts, account


def _encoder_facts(graph: EncoderGraph, source: str) -> dict[str, Any]:
    encoder = graph.encoder
    patch = encoder.patch_size
    rows, columns = f"height / {patch}", f"width / {patch}"
    return {
        "kind": "encoder",
        "source": source,
        "input": {
            "image": f"float32 (batch, {_pixel_facts(graph.channels)}; normalised inside",
            "sides": f"multiples of {patch} pixels",
            "mean": ", ".join(f"{value:g}" for value in graph.mean.flatten().tolist()),
            "std": ", ".join(f"{value:g}" for value in graph.std.flatten().tolist()),
        },
        "output": {"features": f"float32 (batch, {encoder.embed_dim}, {rows}, {columns})"},
        "architecture": encoder.architecture,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Export the model that a command line names."""
    parser = described_parser(DESCRIPTION, EPILOG)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR|FILE",
        help="output folder of a run, encoder file of any layout, or detection config",
    )
    add_option(parser, "--weights", default="", help="detector weights (default: the folder's)")
    add("--format", required=True, choices=FORMATS, help="format to write")
    add(
        "--part",
        choices=("whole", "encoder"),
        default="whole",
        help="the whole model, or a detector's encoder (default: %(default)s)",
    )
    add_option(parser, "--output", required=True, metavar="FILE", help="file or folder to write")
    add(
        "--trust-config",
        action="store_true",
        help="run the LazyConfig of a detector's folder without model.json; it may run any code",
    )
    add(
        "--which",
        metavar="NAME",
        help="set of weights to take from an encoder's file with several, e.g. student or "
        "state_dict_ema (default: the one that the file's project evaluates: the teacher; for "
        "MoCo v3 the base encoder, which is its student; the model where its moving average lies "
        "beside it)",
    )
    add("--report", metavar="FILE", help="JSON file for the account of an encoder's weights")
    add(
        "--num-heads",
        type=int,
        metavar="N",
        help="number of an encoder's attention heads, which no tensor tells (default: that of the "
        "published models of the same width)",
    )
    options = vars(parser.parse_args(arguments))
    options["file_format"] = options.pop("format")
    run_tool(lambda: export_model(**options))


if __name__ == "__main__":
    main()
