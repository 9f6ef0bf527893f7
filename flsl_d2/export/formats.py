"""Writing a model in each format, and reading it back to check that it is the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.export.graphs import (
    TOLERANCE,
    DetectorGraph,
    EncoderGraph,
    SegmenterGraph,
    largest_difference,
    onnx_runner,
)
from flsl_d2.weights import build_encoder
from flsl_d2.weights.writing import (
    TIMM_MODEL,
    timm_arguments,
    timm_call,
    timm_state,
    write_encoder,
    write_timm,
)

_OPSET = 18  # the first whose Resize can be antialiased
Models = EncoderGraph | DetectorGraph | SegmenterGraph


def write_onnx(graph: Models, path: Path, facts: Mapping[str, Any]) -> str:
    """Write an ONNX file that takes images of any size, with facts as its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX files need the package {error.name}; install it with "
            "pip install 'flsl-d2[export]'."
        ) from None
    axes = {"image": graph.input_axes, **dict.fromkeys(graph.outputs, graph.output_axes)}
    with warnings.catch_warnings():
        # The exporter by torch.export cannot follow Detectron2's code, which depends on the data.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            (graph.example(0),),
            str(path),
            dynamo=False,
            opset_version=_OPSET,
            input_names=["image"],
            output_names=list(graph.outputs),
            dynamic_axes=axes,
        )
    add_metadata(onnx.load(str(path)), facts, path)
    return _check(graph, onnx_runner(str(path)), "onnxruntime")


def add_metadata(model: Any, facts: Mapping[str, Any], path: Path) -> None:
    """Save an ONNX model with facts as its metadata: texts as they are, all else as JSON."""
    import onnx

    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    # A file's name may have halves of characters, which ONNX cannot hold.
    safe = {k: v.encode("utf-8", "backslashreplace").decode() for k, v in texts.items()}
    onnx.helper.set_model_props(model, safe)
    onnx.save(model, str(path))


def write_torch(graph: Models, path: Path, facts: Mapping[str, Any]) -> str:
    """Write an encoder by ``torch.export``, a detector by ``torch.jit.trace``."""
    image = graph.example(0)
    extra = {"facts.json": json.dumps(facts)}
    if isinstance(graph, EncoderGraph):
        shapes = (dict.fromkeys(graph.input_axes, torch.export.Dim.DYNAMIC),)
        exported = torch.export.export(graph, (image,), dynamic_shapes=shapes)
        torch.export.save(exported, str(path), extra_files=extra)
        return _check(graph, torch.export.load(str(path)).module(), "torch.export")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, (image,), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files=extra)
        return _check(graph, torch.jit.load(str(path)), "TorchScript")


def write_safetensors(graph: Models, path: Path, facts: Mapping[str, Any]) -> str:
    """Write the tensors by this project's names."""
    if isinstance(graph, EncoderGraph):
        write_encoder(graph.encoder, path)
        read = EncoderGraph(build_encoder(str(path)).eval())
        return _check(graph, read, "this project's reader")
    state = {name: tensor.contiguous() for name, tensor in graph.model.state_dict().items()}
    texts = {name: json.dumps(value) for name, value in facts.items()}
    safetensors.torch.save_file(state, str(path), texts)
    found = safetensors.torch.load_file(str(path))
    if not all(torch.equal(found[name], tensor) for name, tensor in state.items()):
        raise InputError(f"'{path}' does not hold the tensors that were written; write it again.")
    return f"{len(state)} tensors equal after reading them back"


def write_timm_file(graph: Any, path: Path, facts: Mapping[str, Any]) -> str:
    """Write an encoder's tensors by timm's names, for ``timm.create_model``."""
    encoder = graph.encoder
    write_timm(encoder, path)
    model = timm.create_model(TIMM_MODEL, **timm_arguments(encoder))
    is_pickled = path.suffix == ".pth"
    load = partial(torch.load, weights_only=True) if is_pickled else safetensors.torch.load_file
    model.load_state_dict(load(str(path)))
    return _check_timm(graph, model)


def write_huggingface(graph: Any, path: Path, facts: Mapping[str, Any]) -> str:
    """Write a folder as timm's models have it on the Hugging Face Hub."""
    encoder = graph.encoder
    arguments = timm_arguments(encoder)
    path.mkdir()
    tensors = {name: t.detach().cpu().contiguous() for name, t in timm_state(encoder).items()}
    safetensors.torch.save_file(tensors, str(path / "model.safetensors"), {"format": "pt"})
    side, white = arguments["img_size"], 2**encoder.input_format.bits - 1
    pixels = {
        "input_size": [arguments["in_chans"], side, side],
        "mean": [value / white for value in encoder.input_format.mean],
        "std": [value / white for value in encoder.input_format.std],
        "interpolation": "bicubic",
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "fixed_input_size": True,
    }
    config = {"architecture": TIMM_MODEL, "num_classes": 0, "num_features": encoder.embed_dim}
    config |= {"model_args": arguments, "pretrained_cfg": pixels}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return _check_timm(graph, timm.create_model(f"local-dir:{path}", pretrained=True))


def _check_timm(graph: Any, model: Any) -> str:
    encoder, forward = graph.encoder, model.eval().forward_features

    def run(image: Tensor) -> tuple[Tensor]:
        tokens = forward((image - graph.mean) / graph.std)
        side = encoder.architecture["img_size"] // encoder.patch_size
        tokens = tokens[:, encoder.num_prefix_tokens :].transpose(1, 2)
        return (tokens.unflatten(2, (side, side)),)

    return _check(graph, run, "timm", sizes=1)


def _check(graph: Models, other: Callable[[Tensor], Any], program: str, sizes: int = 2) -> str:
    images = [graph.example(number) for number in range(sizes)]
    difference, rows = largest_difference(graph, other, images)
    if not difference <= TOLERANCE:
        raise InputError(
            f"the exported model differs from its source by {difference:.3g} in {program}, more "
            f"than {TOLERANCE:g}, so nothing was written; report this with the model's config."
        )
    shapes = " and ".join("x".join(map(str, image.shape[-2:])) for image in images)
    what = {DetectorGraph: "objects", SegmenterGraph: "classes"}.get(type(graph), "images")
    return f"within {difference:.1e} of the source in {program} ({rows} {what}, {shapes} pixels)"


def usage(graph: Models, file_format: str, target: Path) -> str:
    """Return Python code that loads an export and runs it once."""
    shape = tuple(graph.example(0).shape)
    image = f"image = 255 * torch.rand{shape}  # or the pixels of a picture"
    name, run = str(target), f"{', '.join(graph.outputs)}, = model(image)"
    if file_format == "onnx":
        return (
            "import onnxruntime\nimport torch\n\n"
            f"session = onnxruntime.InferenceSession({name!r})\n{image}\n"
            f"{', '.join(graph.outputs)}, = session.run(None, {{'image': image.numpy()}})"
        )
    if file_format == "torch":
        is_encoder = isinstance(graph, EncoderGraph)
        load = "export.load({!r}).module()" if is_encoder else "jit.load({!r})"
        return f"import torch\n\nmodel = torch.{load.format(name)}\n{image}\n{run}"
    if not isinstance(graph, EncoderGraph):
        return f"import safetensors.torch\n\nstate = safetensors.torch.load_file({name!r})"
    mean, std = (each.flatten().tolist() for each in (graph.mean, graph.std))
    pixels = f"pixels = (image - torch.tensor({mean}).view(-1, 1, 1)) / "
    pixels += f"torch.tensor({std}).view(-1, 1, 1)"
    if file_format in ("d2", "safetensors"):
        load = f"from flsl_d2.weights import build_encoder\n\nmodel = build_encoder({name!r})"
        return f"import torch\n{load}\n{image}\n{pixels}\ntokens = model.forward_tokens(pixels)"
    load = f"model = timm.create_model({f'local-dir:{name}'!r}, pretrained=True)"
    if file_format == "timm":
        load = timm_call(graph.encoder, target)
    imports = "import safetensors.torch\nimport timm\nimport torch"
    tokens = "tokens = model.forward_features(pixels)[:, model.num_prefix_tokens :]"
    return f"{imports}\n\n{load}\nmodel.eval()\n{image}\n{pixels}\n{tokens}"


# For each format the endings of its files, empty for a folder, and the function that writes.
Writer = Callable[[Models, Path, Mapping[str, Any]], str]
WRITERS: dict[str, tuple[tuple[str, ...], Writer]] = {
    "d2": ((".pth",), write_safetensors),  # the suffix decides how tensors are written
    "onnx": ((".onnx",), write_onnx),
    "torch": ((".pt2", ".ts", ".pt"), write_torch),
    "timm": ((".safetensors", ".pth"), write_timm_file),
    "safetensors": ((".safetensors",), write_safetensors),
    "huggingface": (("",), write_huggingface),
}
FORMATS = tuple(WRITERS)
DETECTOR_FORMATS = ("onnx", "torch", "safetensors")
