"""Configs that are set to the encoder in a weight file."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig

from flsl_d2.errors import InputError
from flsl_d2.images.reader import channels_format
from flsl_d2.modeling import FLSLViT, add_flsl_config
from flsl_d2.modeling.vit import NO_VALUE
from flsl_d2.weights.loading import encoder_arguments


def configure_from_weights(cfg: CfgNode | DictConfig, file: str) -> None:
    """Set a detector's config to the encoder in a weight file, which it then starts from.

    The encoder's width, depth, heads, patches, positions and norms become those of the file, and
    the pixel mean, deviation and channels those that it was trained on. Windows and everything
    around the encoder stay; class tokens and registers are left out where there are windows.

    Args:
        cfg: YAML config (:func:`flsl_d2.add_flsl_config` is called), or LazyConfig whose
            ``model.backbone``, or ``net`` in it, is an ``FLSLViT``; changed in place.
        file: weights in any layout that :func:`flsl_d2.weights.build_encoder` reads.

    Raises:
        InputError: the file cannot be read, or the config has no ``FLSLViT``.
    """
    arguments, pixels = encoder_arguments(file)
    mean, std = list(pixels.mean), list(pixels.std)
    is_rgb = pixels.channels == 3 and pixels.bits == 8
    channels = "RGB" if is_rgb else channels_format(pixels.channels)
    if not isinstance(cfg, CfgNode):
        node = _lazy_encoder(cfg)
        node.update(_of_detector(arguments, bool(node.get("window_size"))))
        if "pixel_mean" in cfg.model:
            cfg.model.pixel_mean, cfg.model.pixel_std = mean, std
            cfg.model.input_format = channels
        if "train" in cfg:
            cfg.train.init_checkpoint = file
        return
    add_flsl_config(cfg)
    node, model = cfg.MODEL.FLSL_VIT, cfg.MODEL
    if model.BACKBONE.NAME not in ("build_flsl_vit_sfp_backbone", "FLSLViT"):
        model.BACKBONE.NAME = "build_flsl_vit_sfp_backbone"
    for name, value in _of_detector(arguments, bool(node.WINDOW_SIZE)).items():
        if name.upper() in node:
            node[name.upper()] = NO_VALUE.get(name, value) if value is None else value
    model.WEIGHTS, cfg.INPUT.FORMAT = file, channels
    model.PIXEL_MEAN, model.PIXEL_STD = mean, std


def _lazy_encoder(cfg: DictConfig) -> Any:
    """Return the node of the ``FLSLViT`` in a LazyConfig."""
    backbone: Any = cfg.model.get("backbone") or {}
    node: Any = backbone.get("net", backbone)
    target = str(node.get("_target_", ""))
    if not target.endswith(FLSLViT.__name__) and node.get("_target_") is not FLSLViT:
        raise InputError(
            f"the config's model.backbone is {target or 'missing'}, and weights set the shape of "
            "an FLSLViT; build its config from one of configs/common/models."
        )
    return node


def _of_detector(arguments: dict[str, Any], has_windows: bool) -> dict[str, Any]:
    if has_windows or arguments.get("window_size") or arguments.get("use_rel_pos"):
        return {**arguments, "num_prefix_tokens": 0}
    return arguments
