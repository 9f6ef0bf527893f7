"""Recipe and settings of a run that is given its images alone.

The rules, from the number N of images and the memory of a device:

- *Encoder.* On a CPU that of ``flsl_vit_mini_p8_small_data.py`` (128 wide, 6 blocks, patches of 8,
  views of 80 pixels), with that recipe's batch, rate and keys. On a GPU
  ViT-T/16 below 5,000 images, ViT-S/16 below 500,000 or with less than 40 GiB, else ViT-B/16.
- *Images of a step.* On a CPU 16. On a GPU as many as fit (:data:`MIB_PER_IMAGE`), at most 512 as
  published, and at most a tenth of the images or 32; a power of two for each process.
- *Centroids.* 8 for each image of a step, as published (4,096 for 512), 256 to 4,096: with more,
  most get no query (docs/records/position_shortcut_2026-11.md).
- *Learning rate.* On a GPU 1e-3 * sqrt(batch / 512), which is the published rate at 512 images a
  step and falls more slowly than linearly below. On a CPU 1e-3.
- *Length.* On a GPU the published 300 epochs, but at least 10,000 steps and about 200,000 at most;
  on a CPU 10 epochs, but at least 4,000 steps and about 40,000 at most. Whole epochs.
- *Teacher.* Its momentum begins at 0.99 instead of 0.996 in runs below 50,000 steps, and its
  temperature rises over half of the run at most. The warm-up is a tenth of any run.
- *Positions.* The keys of that recipe that keep features from becoming a map of places, as short
  runs of the published objective do (docs/METHOD.md). They were measured with its encoder alone.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog

from flsl_d2.engine.launchers import started_processes
from flsl_d2.errors import InputError
from flsl_d2.images.store import ImageStore, open_images
from flsl_d2.images.stored_values import find_channels

PRESET_FILE = "preset.py"

# MiB of GPU memory for each image of a step: twice what is kept for the backward pass
# (docs/records/performance_cpu_2026-11-21.md), because a card's peak was not measured.
MIB_PER_IMAGE = {"tiny": 36, "small": 70, "base": 136}
# GiB of weights, optimiser, teacher and CUDA's own.
FIXED_GIB = {"tiny": 1.4, "small": 1.6, "base": 2.8}
USED_SHARE = 0.9
CPU_CONFIG = "pretrain/flsl_vit_mini_p8_small_data.py"
CPU_BATCH = 16
PUBLISHED_BATCH, PUBLISHED_PEAK_LR, PUBLISHED_EPOCHS = 512, 1e-3, 300
GPU_STEPS, CPU_STEPS, CPU_EPOCHS = (10_000, 200_000), (4_000, 40_000), 10


@dataclass(frozen=True)
class Preset:
    """A recipe and its changes.

    Attributes:
        config: name of the recipe below ``configs``.
        encoder: name of the encoder, for people.
        changes: overrides ``key=value`` of the recipe, each with its reason.
    """

    config: str
    encoder: str
    changes: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        return [change for change, _ in self.changes]

    def table(self) -> str:
        width = max(len(change) for change, _ in self.changes)
        lines = [f"  {change:<{width}}  {reason}" for change, reason in self.changes]
        return "\n".join([f"configs/{self.config} ({self.encoder}) with", *lines])

    def config_text(self, command: str, also: Sequence[str] = ()) -> str:
        """Write the LazyConfig that repeats the run of a command with further overrides."""
        reasons = [*self.changes, *((text, "given on the command line") for text in also)]
        lines = "".join(f"        {text!r},  # {reason}\n" for text, reason in reasons)
        docstring = f"Pre-training of {self.encoder}, chosen by ``{command}``.".replace("\\", "/")
        groups = "dataloader, dataset, model, schedules, train, views"
        return (
            f'"""{docstring}"""\n\n'
            "from flsl_d2.engine.config_files import load_lazy_config\n\n"
            f"_cfg = load_lazy_config(\n    {self.config!r},\n    [\n{lines}    ],\n)\n"
            f"{groups} = (\n    _cfg[name]\n    for name in {tuple(groups.split(', '))!r}\n)\n"
        )


def device_memory(device: str) -> float:
    """Return the memory of the smallest visible GPU in GiB; 0 for a CPU.

    Raises:
        InputError: a GPU is asked for and none is visible.
    """
    if not device.startswith("cuda"):
        return 0.0
    if not torch.cuda.is_available():
        raise InputError(f"train.device is '{device}', but PyTorch sees no GPU here; give cpu.")
    cards = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(i).total_memory for i in cards) / 2**30


def choose_preset(
    num_images: int,
    memory: float,
    num_processes: int = 1,
    batch_size: int = 0,
    channels: int = 0,
) -> Preset:
    """Choose a recipe and its changes by the rules of this module.

    Args:
        num_images: number N of images, at least 1.
        memory: memory of a GPU in GiB; 0 for a CPU.
        batch_size: number of images in a step that the user asks for; 0 for the rule's.
        channels: number of channels of images that RGB of 8 bits does not hold; 0 for others.
    """
    preset = (_gpu_preset if memory else _cpu_preset)(num_images, memory, num_processes, batch_size)
    if not channels:
        return preset
    change = (f"dataset.channels={channels}", "the images hold more than RGB of 8 bits")
    return replace(preset, changes=(*preset.changes, change))


def _gpu_preset(num_images: int, memory: float, num_processes: int, batch_size: int) -> Preset:
    size = "tiny" if num_images < 5_000 else "small"
    if num_images >= 500_000 and memory >= 40:
        size = "base"
    fit = (memory * USED_SHARE - FIXED_GIB[size]) * 1024 / MIB_PER_IMAGE[size]
    wanted = min(PUBLISHED_BATCH, max(num_images // 10, 32)) / num_processes
    batch = batch_size or num_processes * _power_of_two(min(fit, wanted))
    epochs = _epochs(num_images, batch, PUBLISHED_EPOCHS, GPU_STEPS)
    steps = epochs * num_images / batch
    peak = PUBLISHED_PEAK_LR * math.sqrt(batch / PUBLISHED_BATCH)
    changes = [
        *_common(num_images, batch, epochs, steps),
        ("train.device=cuda", f"the smallest card has {memory:.0f} GiB"),
        ("model.partner=place", "against features that are a map of places"),
        ("model.position_share=0.01", "the same"),
        ("model.image_share=0.15", "targets tell the parts of an image apart"),
        ("model.position_drop=0.1", "against features that are a map of places"),
        (f"schedules.base_lr={peak * 256 / batch:.3g}", f"a peak of {peak:.3g} at this batch"),
    ]
    if epochs < 60:
        changes.append((f"schedules.teacher_temp_epochs={epochs // 2}", "half of the run"))
    config = f"pretrain/flsl_vit_{size}_p16_in1k.py"
    return Preset(config, f"ViT-{size[0].upper()}/16", tuple(changes))


def _cpu_preset(num_images: int, _memory: float, _processes: int, batch_size: int) -> Preset:
    batch = batch_size or CPU_BATCH
    epochs = _epochs(num_images, batch, CPU_EPOCHS, CPU_STEPS)
    changes = [
        *_common(num_images, batch, epochs, epochs * num_images / batch),
        ("train.max_iter=0", "the length is given in epochs"),
        ("train.health_period=250", "a run of minutes is judged more often"),
        ("train.pictures_period=500", "what the tokens group, in pictures/"),
        (f"schedules.base_lr={1e-3 * 256 / batch:.3g}", "a peak of 0.001"),
    ]
    return Preset(CPU_CONFIG, "a small ViT for CPUs (128 wide, 6 blocks, patch 8)", tuple(changes))


def _common(num_images: int, batch: int, epochs: int, steps: float) -> list[tuple[str, str]]:
    centroids = min(max(_power_of_two(8 * batch), 256), 4096)
    momentum = 0.99 if steps < 50_000 else 0.996
    return [
        (f"dataloader.total_batch_size={batch}", "images in a step, of all processes"),
        (f"train.epochs={epochs}", f"{steps:,.0f} steps over {num_images:,} images"),
        (f"model.head.num_centroids={centroids}", "8 for each image of a step"),
        (f"schedules.teacher_momentum=[{momentum},1.0]", "follows the length of the run"),
        (f"train.checkpoint_period={max(round(steps / 10), 1)}", "a tenth of the run"),
    ]


def _epochs(num_images: int, batch: int, epochs: int, steps: tuple[int, int]) -> int:
    """Return the number of epochs closest to ``epochs`` whose steps are within the bounds."""
    fewest, most = (bound * batch / num_images for bound in steps)
    return max(math.ceil(min(max(epochs, fewest), max(most, fewest))), 1)


def _power_of_two(number: float) -> int:
    return 1 << (max(math.floor(number), 1).bit_length() - 1)


def use_images(args: argparse.Namespace) -> None:
    """Put the images that ``--images`` names into the config; choose one where none is given.

    A run that is resumed takes the preset that it was started with. ``config_file``, ``opts`` and
    ``preset`` of the command line are changed.
    """
    named = args.images in DatasetCatalog.list() and not Path(args.images).exists()
    place = args.images if named or "://" in args.images else os.path.abspath(args.images)
    given = [f"dataset.name={place}"] if named else ["dataset.name=''", f"dataset.root={place}"]
    if args.config_file:
        args.opts = [*given, *args.opts]
        return
    typed = dict(text.partition("=")[::2] for text in args.opts)
    output = typed.setdefault("train.output_dir", "./output/pretrain")
    kept = Path(output).expanduser() / PRESET_FILE
    if args.resume and kept.is_file():
        args.config_file, args.opts = str(kept), [*given, *args.opts]
        return
    files = open_images(**{"name" if named else "root": place})
    device = typed.setdefault("train.device", "cuda" if torch.cuda.is_available() else "cpu")
    batch = typed.get("dataloader.total_batch_size", "")
    # Under torchrun and srun the processes exist already.
    processes = max(started_processes(), args.num_gpus * args.num_machines)
    preset = choose_preset(
        len(files),
        device_memory(device),
        processes,
        int(batch) if batch.isdecimal() else 0,
        find_channels(files)[0] if type(files) is ImageStore else 0,
    )
    given += [f"train.output_dir={output}", f"train.device={device}", *args.opts]
    command = f"tools/pretrain_net.py --images {shlex.quote(args.images)}"
    args.config_file, args.opts = preset.config, [*preset.overrides, *given]
    args.preset = preset.config_text(command, given)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"{len(files):,} images in {args.images}, so the preset is {preset.table()}")
        print(f"{kept} will hold it; key=value on the command line overrides it.", flush=True)
