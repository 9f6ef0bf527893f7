"""A start from the weights of a trained encoder (``train.init_checkpoint``)."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig

from flsl_d2.engine.config_files import call_target
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import build_encoder

logger = logging.getLogger("pretrain")


def open_initial_encoder(cfg: DictConfig) -> FLSLViT | None:
    """Read ``train.init_checkpoint``, and give the config's encoder the file's architecture.

    The table of positions keeps the file's size, and is resampled for the views in each step, so
    that the encoder loses nothing for larger images. The result is None for a start from random
    weights.

    Raises:
        InputError: the file holds no such encoder, or the config's encoder or images do not fit it.
    """
    path = cfg.train.get("init_checkpoint", "")
    if not path:
        return None
    method, backbone = (call_target(node) for node in (cfg.model, cfg.model.backbone))
    if backbone is not FLSLViT:
        raise InputError(
            f"train.init_checkpoint is '{path}', and model.backbone is {backbone.__name__}, which "
            "names its weights itself; leave train.init_checkpoint empty, or use FLSLViT."
        )
    masks_tokens = getattr(method, "masks_tokens", False)
    plain: dict[str, Any] = {"num_prefix_tokens": 0} if masks_tokens else {}
    encoder = build_encoder(path, **plain)
    architecture = encoder.architecture
    channels = cfg.model.backbone.get("in_chans", 3)
    if architecture["in_chans"] != channels:
        raise InputError(
            f"train.init_checkpoint '{path}' takes images of {architecture['in_chans']} channels, "
            f"and the run's images have {channels}; leave dataset.channels or the weights out."
        )
    side, patch = cfg.views.global_size, encoder.patch_size
    if side % patch:
        raise InputError(
            f"train.init_checkpoint '{path}' has patches of {patch} pixels, which do not divide "
            f"views.global_size={side}; set it to {max(side // patch, 1) * patch}, and "
            "views.local_size to a multiple, too."
        )
    cfg.model.backbone.update(architecture)
    if not cfg.schedules.get("frozen_encoder_fraction", 0.0):
        logger.warning(
            "The encoder starts from '%s' and is trained from the first step, in which the head is "
            "random: features are known to suffer; set schedules.frozen_encoder_fraction=0.1.",
            path,
        )
    return encoder
