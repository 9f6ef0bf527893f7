"""The encoder of a fine-tuning run: read, and adapted to the pyramid and to the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv

from flsl_d2.detection.finetune_plan import InFolder
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX, build_timm_backbone, timm_pyramid
from flsl_d2.weights import build_encoder, write_encoder


def prepare_encoder(
    weights: str, freeze: bool, channels: int, staging: Path
) -> tuple[list[str], list[tuple[str, Any, str]], dict[str, Any]]:
    """Read the encoder: lines for the user, settings of the config, and sizes for the plan.

    Patches whose side is no power of two, and images of other than three channels, need another
    patch embedding: its filters are resampled by the pseudo-inverse of resizing (FlexiViT, arXiv
    2212.08013), and repeated over the channels and scaled so that equal channels give what they
    gave before. Both are timm's functions. The encoder is then written to the folder ``staging``.
    """
    frozen = [("model.backbone.net.frozen", True, "the encoder stays as it is")]
    if weights.startswith(TIMM_PREFIX):
        if channels != 3:
            raise InputError(
                f"--weights is '{weights}', and the images have {channels} channels; "
                "give a file of a plain ViT's weights for such images."
            )
        net = build_timm_backbone(weights)
        timm_pyramid(net)  # refuses strides that are no powers of two
        start = f"{build_timm_backbone.__module__}."
        node = {"_target_": f"{start}build_timm_backbone", "text": weights, "frozen": freeze}
        settings: list[tuple[str, Any, str]] = [
            ("model.backbone", {"_target_": f"{start}timm_pyramid", "net": node}, ""),
            ("optimizer.params.lr_factor_func", None, "layers are not decayed"),
        ]
        sizes = {"embed_dim": net.embed_dim, "depth": 12, "patch_size": net.patch_size}
        return [f"Encoder: {weights}."], settings, sizes
    encoder = FLSLViT() if weights == "random" else build_encoder(weights)
    architecture: dict[str, Any] = dict(encoder.architecture)
    lines, file = [f"Encoder: {weights}."], absolute_path(weights)
    patch = 2 ** round(np.log2(architecture["patch_size"]))
    if (patch, channels) != (architecture["patch_size"], architecture["in_chans"]):
        lines.append(
            f"Its patch embedding is adapted from {architecture['patch_size']} pixels and "
            f"{architecture['in_chans']} channels to {patch} pixels and {channels} channels."
        )
        encoder = _adapted(encoder, patch, channels)
        architecture = dict(encoder.architecture)
        write_encoder(encoder, staging / "encoder.pth")
        file = InFolder("encoder.pth")
    if weights == "random":
        file = ""
        lines.append("warning: the encoder is untrained, so expect little of a small data set.")
    settings = [
        (f"model.backbone.net.{key}", architecture[key], "")
        for key, value in FLSLViT().architecture.items()
        if key != "num_prefix_tokens" and architecture[key] != value
    ]
    settings.append(("train.init_checkpoint", file, ""))
    return lines, settings + (frozen if freeze else []), architecture


def _adapted(encoder: FLSLViT, patch: int, channels: int) -> FLSLViT:
    """Give an encoder patches of another side and images of another number of channels."""
    architecture: dict[str, Any] = dict(encoder.architecture)
    grid = architecture["img_size"] // encoder.patch_size
    changed = {"patch_size": patch, "in_chans": channels, "img_size": grid * patch}
    new = FLSLViT(**{**architecture, **changed})
    state, name = encoder.state_dict(), "patch_embed.proj.weight"
    state[name] = adapt_input_conv(channels, resample_patch_embed(state[name], [patch, patch]))
    new.load_state_dict(state)
    if channels == encoder.input_format.channels:
        new.input_format = encoder.input_format
    return new


def absolute_path(path: str | Path) -> str:
    """Return a path that the config can be run with from any folder; URLs stay as they are."""
    text = str(path)
    return text if "://" in text else str(Path(text).expanduser().resolve())
