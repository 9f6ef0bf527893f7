"""Pre-training on stored values: greyscale, 16-bit and multispectral images.

``dataset.channels`` is the number of channels; the encoder gets as many. Values are normalised by
``dataset.pixel_mean`` and ``dataset.pixel_std``, which are computed from some of the images where
they are not given. Saturation, hue, greyscale and solarisation are left out of the augmentation,
because they are defined for RGB.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from flsl_d2.engine.config_files import call_target
from flsl_d2.errors import InputError
from flsl_d2.images.store import ImageStore
from flsl_d2.images.stored_values import channel_statistics, stored_bits
from flsl_d2.modeling import InputFormat

logger = logging.getLogger("pretrain")

# Methods that predict or compare colours.
_RGB_METHODS = ("BEiT", "Colorization", "MAE", "MaskFeat")


def stored_channels(cfg: DictConfig) -> int:
    """Return the number of channels whose stored values are used; 0 for RGB of 8 bits."""
    return int(cfg.dataset.get("channels") or 0)


def use_stored_channels(cfg: DictConfig, files: ImageStore | Sequence[str]) -> None:
    """Complete a config for ``dataset.channels``: the encoder's channels, mean and deviation.

    Raises:
        InputError: a setting of the config needs RGB, or the images cannot be read.
    """
    channels = stored_channels(cfg)
    if not channels:
        return
    _check(cfg, files, channels)
    cfg.model.backbone.in_chans = channels
    given = len(cfg.dataset.pixel_mean), len(cfg.dataset.pixel_std)
    if given == (0, 0):
        mean, std = channel_statistics(files, channels)
        cfg.dataset.pixel_mean, cfg.dataset.pixel_std = mean, std
    elif given != (channels, channels):
        raise InputError(
            f"dataset.pixel_mean and dataset.pixel_std have {given[0]} and {given[1]} values; "
            f"give {channels} of each, or none to compute them."
        )
    cfg.train.pictures_period = 0
    logger.info(
        "Images of %d channel(s) and their stored values, normalised by mean %s and standard "
        "deviation %s. Saturation, hue, greyscale and solarisation, pages of pictures and the "
        "check for a map of places need RGB and are left out.",
        channels,
        list(cfg.dataset.pixel_mean),
        list(cfg.dataset.pixel_std),
    )


def _check(cfg: DictConfig, files: ImageStore | Sequence[str], channels: int) -> None:
    method, name = (call_target(node).__name__ for node in (cfg.model, cfg.model.backbone))
    reasons = {
        "dataset.channels takes the files of a folder, a pattern or a list, not shards or URLs": (
            type(files) not in (ImageStore, list)
        ),
        f"{method} compares colours; use a recipe of another method": method in _RGB_METHODS,
        f"the encoder is {name}; use FLSLViT": name != "FLSLViT",
        "views.on_device augments RGB; set views.on_device=nothing": (
            cfg.views.get("on_device", "nothing") != "nothing"
        ),
        "views.segments are those of RGB; set views.segments=none": (
            cfg.views.get("segments", "none") == "felzenszwalb"
        ),
        "train.measures encodes RGB; leave train.measures.val empty": bool(cfg.train.measures.val),
        "model.previous_stage encodes RGB; leave model.previous_stage.weights empty": bool(
            (cfg.model.get("previous_stage") or {}).get("weights")
        ),
    }
    for reason, is_true in reasons.items():
        if is_true:
            raise InputError(f"dataset.channels is {channels}, but {reason}.")


def normalise_stored_values(
    method: Any, cfg: DictConfig, files: ImageStore | Sequence[str]
) -> None:
    """Give a method a completed config's mean and deviation, and its encoders the format."""
    channels = stored_channels(cfg)
    if not channels:
        return
    mean, std = (tuple(cfg.dataset[name]) for name in ("pixel_mean", "pixel_std"))
    for networks in (method.student, method.teacher):
        if networks is not None:
            networks.backbone.input_format = InputFormat(
                channels, stored_bits(files), mean, std, True
            )
    for name in ("pixel_mean", "pixel_std"):
        values = torch.tensor(list(cfg.dataset[name]), dtype=torch.float32)
        setattr(method, name, values.view(-1, 1, 1).to(cfg.train.device))
