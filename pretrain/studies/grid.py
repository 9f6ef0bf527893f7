"""Grid of a sweep: keys of a pre-training config and their values, checked before any run."""

from __future__ import annotations

import copy
import itertools
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.overrides import apply_lazy_overrides
from flsl_d2.errors import InputError
from flsl_d2.images.store import ImageStore, open_images
from flsl_d2.studies.identity import sha256_of
from pretrain.schedules import set_run_length
from pretrain.trainer import resolve_precision

_MOST_SIZES = 200_000


@dataclass(frozen=True)
class Axis:
    """Key and its values as typed."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """Setting of the grid with one seed: values as typed, and the overrides that make it.

    ``images`` is the identity of the images by content: names, and sizes where that is quick.
    """

    values: dict[str, str]
    seed: int
    overrides: tuple[str, ...]
    cfg: DictConfig
    total_iters: int = 0
    images: str = ""


def parse_axis(text: str) -> Axis:
    """Read ``key=v1,v2``; commas inside brackets belong to a value.

    Raises:
        InputError: the text is not of that form, or has a value twice.
    """
    key, equals, raw = text.partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[\](){}]*[\])}])", raw)]
    if not equals or not key.strip() or not all(values):
        raise InputError(
            f"--grid {text!r} is not of the form key=value,value; write for example "
            "schedules.intra_weight=0.01,0.03."
        )
    if len(set(values)) < len(values):
        raise InputError(f"--grid {text!r} has a value twice; name each value once.")
    return Axis(key.strip(), tuple(values))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Name each key by its last part, or in full where two keys end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def grid_points(
    config_file: str, axes: Sequence[Axis], overrides: Sequence[str], seeds: Sequence[int]
) -> list[Point]:
    """Combine all values of the axes with all seeds.

    A single number for a pair of ``schedules`` (start and end) stands for both.

    Args:
        seeds: values of ``train.seed``; empty for the config's own.

    Raises:
        InputError: a key is unknown, set twice or set by the sweep itself, or a value does not
            suit its key or the run.
    """
    base = load_lazy_config(config_file, overrides)
    _check_keys(base, config_file, axes, overrides, seeds)
    points = []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = dict(zip((axis.key for axis in axes), values, strict=True))
        changes = [_override(base, key, value) for key, value in chosen.items()]
        for seed in seeds or [base.train.seed]:
            own = (*changes, f"train.seed={seed}")
            cfg = apply_lazy_overrides(copy.deepcopy(base), own)
            points.append(Point(chosen, seed, (*overrides, *own), cfg))
    return [_checked(point) for point in points]


def _check_keys(
    cfg: DictConfig,
    config_file: str,
    axes: Sequence[Axis],
    overrides: Sequence[str],
    seeds: Sequence[int],
) -> None:
    lacking = [group for group in ("model", "views", "schedules", "train") if group not in cfg]
    if lacking:
        raise InputError(
            f"config file {config_file!r} has no {', '.join(lacking)}, so it is not a pre-training "
            "config; name one such as configs/pretrain/flsl_vit_small_p16_in1k.py."
        )
    keys = [axis.key for axis in axes]
    fixed = [text.partition("=")[0] for text in overrides]
    if "train.output_dir" in keys + fixed:
        raise InputError("train.output_dir is chosen by the sweep; name its folder with --output.")
    if "train.seed" in keys or (seeds and "train.seed" in fixed):
        raise InputError("train.seed is set by the sweep; give --seeds 0,1.")
    repeated = [key for i, key in enumerate(keys) if key in keys[:i] or key in fixed]
    if repeated:
        raise InputError(
            f"{repeated[0]} is set twice; give it once, with --grid or as an override."
        )


def _override(cfg: DictConfig, key: str, value: str) -> str:
    """Return the override of one value; a number for a schedule's pair becomes a pair."""
    old = OmegaConf.select(cfg, key)
    pair = key.startswith("schedules.") and isinstance(old, ListConfig) and len(old) == 2
    if pair and re.fullmatch(r"[-+.\deE]+", value):
        value = f"[{value},{value}]"
    return f"{key}={value}"


def _checked(point: Point) -> Point:
    """Build all that a run builds, without its memory, and return the point with its length.

    Raises:
        InputError: an error that a run would raise, after the point's values.
    """
    cfg = copy.deepcopy(point.cfg)
    try:
        files = open_images(**{key: cfg.dataset[key] for key in ("root", "name")})
        total_iters = set_run_length(cfg, len(files))
        resolve_precision(cfg.train.precision, cfg.train.device)
        with torch.device("meta"), warnings.catch_warnings():
            # Weights of a previous stage are read only to check them, so they go nowhere.
            warnings.filterwarnings("ignore", r"for .*: copying from a non-meta parameter")
            for part in (cfg.schedules, cfg.views, cfg.model):
                instantiate(part)
    except InputError as error:
        values = ", ".join(f"{key}={value}" for key, value in point.values.items())
        raise InputError(f"{values}: {error}" if values else str(error)) from error
    return replace(point, total_iters=total_iters, images=_images_identity(files))


def _images_identity(files: ImageStore) -> str:
    """Return the digest of the names, and of the sizes of up to 200,000 files of this machine."""
    if len(files) > _MOST_SIZES:
        return files.names.digest
    sizes = (str(os.path.getsize(file)) if os.path.isfile(file) else "" for file in files)
    return f"{files.names.digest}, {sha256_of(f'{size},'.encode() for size in sizes)[:16]}"
