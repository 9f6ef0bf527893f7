"""Writing encoders: for Detectron2 projects, as safetensors, and for timm."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.files import replaced_file, write_text
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.encoder_state import LoadReport
from flsl_d2.weights.encoder_weights import TIMM_NAMES, rename
from flsl_d2.weights.reading import ENCODER_FORMAT

# All dimensions are given beside it, so the name can be that of any plain ViT of timm.
TIMM_MODEL = "vit_small_patch16_224"


def encoder_file(encoder: FLSLViT) -> dict[str, Any]:
    """Make the content of an encoder's ``.pth`` file, which loads with ``weights_only=True``.

    ``model`` (tensors by their bare names), ``encoder`` (constructor arguments of ``FLSLViT``),
    ``input`` (the pixels that it takes), ``format``, and ``matching_heuristics``, which tells
    Detectron2's own checkpointer to find these names wherever the encoder sits in a detector.
    """
    return {
        "model": _on_cpu(encoder.state_dict()),
        "encoder": encoder.architecture,
        "input": encoder.input_format.as_dict(),
        "format": ENCODER_FORMAT,
        "matching_heuristics": True,
    }


def write_encoder(encoder: FLSLViT, path: str | Path) -> None:
    """Write an encoder by its bare names, with its architecture; the file is whole or not there.

    A ``.pth`` file is :func:`encoder_file`. A ``.safetensors`` file holds the tensors, and the
    rest as metadata.

    Raises:
        InputError: the suffix is another, or the file cannot be written.
    """
    content = encoder_file(encoder)
    metadata = {"format": ENCODER_FORMAT}
    metadata |= {key: json.dumps(content[key]) for key in ("encoder", "input")}
    _write(path, content["model"], metadata, content)


def write_timm(encoder: FLSLViT, path: str | Path) -> None:
    """Write the tensors that the model of :func:`timm_call` loads strictly.

    Raises:
        InputError: the encoder has parts that timm's ViT lacks, the suffix is another, or the
            file cannot be written.
    """
    state = _on_cpu(timm_state(encoder))
    _write(path, state, {"format": "pt"}, state)


def timm_state(encoder: FLSLViT) -> dict[str, Tensor]:
    """Rename the encoder's tensors as timm does.

    Raises:
        InputError: the encoder has windows or relative positions.
    """
    found = [key for key in ("window_size", "use_rel_pos") if encoder.architecture.get(key)]
    if found:
        raise InputError(
            f"the encoder has {' and '.join(found)}, which timm's ViT lacks; convert it to "
            "another format."
        )
    back = [(ours, theirs) for theirs, ours in TIMM_NAMES]
    state = {rename(name, back): tensor for name, tensor in encoder.state_dict().items()}
    prefix = state.pop("prefix_tokens", None)
    if prefix is not None:
        state["cls_token"] = prefix[:, :1]
        if prefix.shape[1] > 1:
            state["reg_token"] = prefix[:, 1:]
    return state


def timm_arguments(encoder: FLSLViT) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` that make the same network.

    The tokens after the last norm are ``model.forward_features(images)`` without the first
    ``num_prefix_tokens``. At other sizes than ``img_size`` (``dynamic_img_size=True``) timm
    resamples positions in its own way, which is this encoder's only with ``position_offset=0``
    and ``position_antialias=True``.
    """
    known = encoder.architecture
    same = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
    arguments: dict[str, Any] = {key: known[key] for key in (*same, "qkv_bias", "final_norm")}
    arguments |= {"init_values": known["layer_scale_init"], "num_classes": 0}
    arguments["no_embed_class"] = True  # the prefix tokens have their positions in them
    if encoder.num_prefix_tokens:
        return {**arguments, "reg_tokens": encoder.num_prefix_tokens - 1}
    # Without fc_norm=False timm would move the last norm behind the pooling.
    return {**arguments, "class_token": False, "global_pool": "avg", "fc_norm": False}


def timm_call(encoder: FLSLViT, path: str | Path) -> str:
    """Return the Python code that loads a file of :func:`write_timm`."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(encoder).items())
    reader = f"torch.load({str(path)!r}, weights_only=True)"
    if Path(path).suffix == ".safetensors":
        reader = f"safetensors.torch.load_file({str(path)!r})"
    model = f"timm.create_model({TIMM_MODEL!r}, {arguments})"
    return f"model = {model}\nmodel.load_state_dict({reader})"


def _write(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], content: dict[str, Any]
) -> None:
    """Write ``content`` into a ``.pth`` file, or tensors and metadata into ``.safetensors``."""
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise InputError(
            f"{str(path)!r} has no suffix that can be written; use .pth or .safetensors."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.torch.save(tensors, metadata))
            else:
                torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{str(path)!r} cannot be written ({reason}); choose another.") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_account(path: str, account: LoadReport) -> None:
    """Write the account of every weight as JSON; raise InputError if the file cannot be written."""
    try:
        write_text(os.path.expanduser(path), json.dumps(asdict(account), indent=2) + "\n")
    except OSError as error:
        raise InputError(
            f"the report {path!r} cannot be written ({error.strerror}); choose another."
        ) from error
