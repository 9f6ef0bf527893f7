"""What a run is about to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.utils import comm
from omegaconf import DictConfig

from flsl_d2.errors import InputError
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import ImageFile, picture_size
from flsl_d2.images.store import ImageStore, as_store
from pretrain.methods import Method
from pretrain.schedules import Schedules

FIRST_STEPS = 50  # steps after which the duration is known
_TRIED_IMAGES = 100


def try_images(files: ImageStore | Sequence[str], most: int = _TRIED_IMAGES) -> str:
    """Read the headers of some images, spread evenly, and say how many cannot be read.

    Raises:
        InputError: none of them can be read.
    """
    places = np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int).tolist()
    images, failures = as_store(files), []
    images.prefetch(places)
    for place in places:
        try:
            source = images.source(place)
            picture_size(source) if isinstance(source, str) else ImageFile(source)
        except OSError as error:
            failures.append(f"'{printable(files[place])}' ({error})")
    if len(failures) == len(places):
        raise InputError(
            f"none of {len(places)} images that were tried can be read, the first is "
            f"{failures[0]}; check the files, or the mount they lie on."
        )
    found = f"{len(failures)} of {len(places)} that were tried cannot be read"
    return f"{found}, such as {failures[0]}" if failures else found


def describe_run(
    cfg: DictConfig,
    files: ImageStore | Sequence[str],
    method: Method,
    schedules: Schedules,
    precision: str,
) -> list[str]:
    """Say in a few lines what a run is about to do; ``cfg`` has its length."""
    batch, world = cfg.dataloader.total_batch_size, comm.get_world_size()
    parameters = sum(p.numel() for p in method.exported_encoder().parameters())
    steps = schedules.total_iters
    lines = [
        f"{len(files):,} images; {try_images(files)}",
        f"crops: {_crops(cfg.views)}; patches of {cfg.views.patch_size} px",
        f"encoder: {parameters / 1e6:.1f} million parameters, in {precision} on {cfg.train.device}",
        f"step: {batch} images ({world} process(es), {batch // world} each)",
        f"learning rate: up to {schedules.peak_lr:.3g} over {schedules.warmup_iters:,} steps, "
        f"then down to {schedules.final_lr:.3g}",
        f"length: {steps:,} steps ({steps * batch / len(files):.1f} epochs); the duration follows "
        f"after {FIRST_STEPS} steps",
    ]
    if cfg.train.get("init_checkpoint"):
        lines.append(
            f"start: the encoder has the weights of {cfg.train.init_checkpoint}, and is trained "
            f"after {schedules.frozen_encoder_iters:,} steps of the head alone"
        )
    if len(files) < 200:
        lines.append(
            f"note: {len(files)} images teach an encoder little; published weights "
            "(docs/CHECKPOINTS.md) will serve a detector better, or this run as a start "
            "(train.init_checkpoint)"
        )
    return lines


def _crops(views: DictConfig) -> str:
    local = f"{views.num_local} of {views.local_size} px"
    if "num_global" in views:  # views that student and teacher share
        return f"{views.num_global} of {views.global_size} px and {local}"
    size = views.global_size
    return f"1 of {size} px for the teacher; 1 of {size} px and {local} for the student"
