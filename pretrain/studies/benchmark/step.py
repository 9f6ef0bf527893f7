"""Benchmark of a whole pre-training step on a fixed batch, from views to the updated teacher."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from pretrain.augmentation import draw_augmentation
from pretrain.data import Batch, collate
from pretrain.methods.flsl import FLSL
from pretrain.optimizer import build_adamw
from pretrain.studies.benchmark.measuring import (
    prepared_device,
    reference_function,
    report,
    stored_for_backward,
    time_in_turn,
)
from pretrain.trainer import (
    PretrainTrainer,
    records_graphs,
    resolve_compile,
    resolve_precision,
)
from pretrain.views import NestedViews, Views

# Dense bf16 and fp16 peak of GPUs, from the vendor's data sheets, by a part of PyTorch's name.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the peak of a GPU in TFLOP/s; None where it is not listed."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


# Blocks are compiled where a variant says so, and not by default on GPUs.
NOT_COMPILED = "train.compile=False"
# Overrides that change the speed of a step and not its result; in "a+b" the later one wins.
VARIANTS: dict[str, tuple[str, ...]] = {
    "eager": ("model.pack_views=False", "train.compile=False"),
    "packed": ("model.pack_views=True",),
    "compiled": ("train.compile=True",),
    # CUDA graphs of the teacher's blocks; without stochastic depth of the student's as well.
    "graphs": ("train.compile=True", "train.compile_mode=reduce-overhead"),
    "checkpointed": ("model.backbone.use_act_checkpoint=True",),
    "augmented on device": ("views.on_device=augmentation",),
    "cropped on device": ("views.on_device=crops",),
}


def _overrides_of(variant: str) -> list[str]:
    parts = variant.split("+")
    unknown = [part for part in parts if part not in VARIANTS]
    if unknown:
        raise InputError(
            f"--variants has {', '.join(unknown)}; known are {', '.join(VARIANTS)}, and several "
            "joined by +."
        )
    return [override for part in parts for override in VARIANTS[part]]


def random_batch(views: NestedViews, batch_size: int, seed: int = 0) -> Batch:
    """Make a batch of noise with views of the given sizes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (views.global_size, views.global_size, 3), dtype=np.uint8)
    few = [views(image, rng) for _ in range(min(batch_size, 4))]
    samples = [few[i % len(few)] for i in range(batch_size)]

    def augmented(sample: Views) -> Views:
        # Each image has its own draws, so that every operation is applied to about its share.
        return replace(sample, augmentations=[draw_augmentation(rng) for _ in sample.augmentations])

    return collate([(augmented(sample), []) for sample in samples])


def build_trainer(
    cfg: DictConfig, batch_size: int, device: torch.device, precision: str, batches: Iterable[Batch]
) -> PretrainTrainer:
    """Build the trainer of a real run, with schedules of a run that does not end."""
    cfg.schedules.update(total_batch_size=batch_size, iters_per_epoch=1000, total_iters=10**6)
    torch.manual_seed(0)
    model: FLSL = instantiate(cfg.model).to(device).train()
    if type(model) is not FLSL:
        raise InputError(
            f"the config trains {type(model).__name__}, and the benchmark counts the operations of "
            "FLSL's step; give a config of FLSL, such as "
            "configs/pretrain/flsl_vit_small_p16_in1k.py."
        )
    encoder = model.exported_encoder()
    mode = resolve_compile(cfg.train.compile, cfg.train.compile_mode, device.type, encoder)
    if mode:
        model.compile_blocks(mode=mode)
    trainer = PretrainTrainer(
        model,
        batches,
        build_adamw(model),
        instantiate(cfg.schedules),
        resolve_precision(precision, device.type),
        cfg.train.clip_norm,
        cfg.train.clip_mode,
        records_graphs=records_graphs(mode),
    )
    trainer.iter = 0
    return trainer


def run_step(trainer: PretrainTrainer) -> None:
    """Run one step of a trainer without hooks."""
    with EventStorage(trainer.iter) as trainer.storage:
        trainer.run_step()
    trainer.iter += 1


class Step:
    """Step of the real trainer, always on the same batch."""

    def __init__(
        self,
        config_file: str,
        overrides: list[str],
        batch_size: int,
        device: torch.device,
        precision: str,
    ) -> None:
        cfg = load_lazy_config(config_file, overrides)
        self.batch, self.batch_size = random_batch(instantiate(cfg.views), batch_size), batch_size
        if device.type == "cuda":
            self.batch.pin_memory()
        batches = itertools.repeat(self.batch)
        self.trainer = build_trainer(cfg, batch_size, device, precision, batches)
        self.model: FLSL = self.trainer.model

    def __call__(self) -> None:
        """Run one step."""
        run_step(self.trainer)

    def _forward(self) -> torch.Tensor:
        return self.trainer._forward(self.batch, self.trainer.schedules(0))["loss"]

    def stored_bytes(self) -> int:
        """Count the bytes that the forward pass keeps for the backward pass."""
        return stored_for_backward(self._forward, self.model)

    def flops_per_image(self) -> float:
        """Count the floating-point operations of a step for one image, by PyTorch's counter."""
        # The counter knows the operations of plain attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._forward().backward()
        return counter.get_total_flops() / self.batch_size


def benchmark_step(args: argparse.Namespace) -> None:
    """Measure speed, memory and share of the peak of each variant, and of a reference."""
    overrides = {name: [NOT_COMPILED, *args.opts, *_overrides_of(name)] for name in args.variants}
    device = prepared_device(args)
    makers: dict[str, Callable[[], Callable[[], None]]] = {}
    if args.reference_module:
        make_step = reference_function(args.reference_module, "make_step")
        makers["reference"] = partial(make_step, args.batch_size, device, args.precision)
    for name, opts in overrides.items():
        makers[name] = partial(
            Step, args.config_file, opts, args.batch_size, device, args.precision
        )
    # None of the variants changes what has to be computed; recomputed blocks do not count.
    plain = [*args.opts, *VARIANTS["eager"], "model.backbone.use_act_checkpoint=False"]
    flops = Step(args.config_file, plain, 2, device, args.precision).flops_per_image()
    timings = time_in_turn(makers, args.repeats, args.warmup, device)
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    first = next(iter(timings))
    rows = []
    for name, timing in timings.items():
        step, rate, kept = timing.function, timing.rate(args.batch_size), None
        own = flops if isinstance(step, Step) else None
        if isinstance(step, Step) and "train.compile=True" not in overrides[name]:
            kept = step.stored_bytes() / args.batch_size / 2**20
        rows.append(
            {
                "step": name,
                "images/s": rate,
                f"ratio to {first}": timing.speed_against(timings[first]),
                "s/step": timing.median,
                "peak GiB": timing.peak_gib,
                "MiB/image kept for backward": kept,
                "GFLOP/image": own / 1e9 if own else None,
                "MFU": rate * own / peak / 1e12 if rate and own and peak else None,
            }
        )
    report(
        f"batch {args.batch_size}, {args.precision} on {device}, {torch.get_num_threads()} "
        f"thread(s), median of {args.repeats} steps in turn",
        rows,
        device,
        args.json,
        batch_size=args.batch_size,
        precision=args.precision,
        seconds={name: timing.seconds for name, timing in timings.items()},
    )
