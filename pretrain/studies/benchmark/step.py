"""A pre-training step on a fixed batch: the real trainer, from views to the updated teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

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
from pretrain.methods.flsl import FLSL
from pretrain.optimizer import build_adamw
from pretrain.step_inputs import StepInputs, collate
from pretrain.studies.benchmark.measuring import stored_for_backward
from pretrain.trainer import PretrainTrainer, records_graphs, resolve_compile, resolve_precision
from pretrain.views import NestedViews


def random_batch(views: NestedViews, batch_size: int, seed: int = 0) -> StepInputs:
    """Make a batch of noise with views of the given sizes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (views.global_size, views.global_size, 3), dtype=np.uint8)
    few = [views(image, rng) for _ in range(min(batch_size, 4))]
    samples = [few[i % len(few)] for i in range(batch_size)]
    # Each image has its own draws, so that every operation is applied to about its share.
    drawn = [[draw_augmentation(rng) for _ in each.augmentations] for each in samples]
    pairs = zip(samples, drawn, strict=True)
    return collate([(replace(each, augmentations=draws), []) for each, draws in pairs])


def build_trainer(
    cfg: DictConfig,
    batch_size: int,
    device: torch.device,
    precision: str,
    batches: Iterable[StepInputs],
) -> PretrainTrainer:
    """Build the trainer of a real run, with schedules of a run that does not end.

    Raises:
        InputError: the config trains another method than FLSL.
    """
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
        overrides: Sequence[str],
        batch_size: int,
        device: torch.device,
        precision: str,
    ) -> None:
        cfg = load_lazy_config(config_file, list(overrides))
        self.batch, self.batch_size = random_batch(instantiate(cfg.views), batch_size), batch_size
        if device.type == "cuda":
            self.batch.pin_memory()
        batches = itertools.repeat(self.batch)
        self.trainer = build_trainer(cfg, batch_size, device, precision, batches)

    def __call__(self) -> None:
        """Run one step."""
        run_step(self.trainer)

    def _forward(self) -> torch.Tensor:
        return self.trainer._forward(self.batch, self.trainer.schedules(0))["loss"]

    def stored_bytes(self) -> int:
        """Count the bytes that the forward pass keeps for the backward pass."""
        return stored_for_backward(self._forward, self.trainer.model)

    def flops_per_image(self) -> float:
        """Count the floating-point operations of a step for one image, by PyTorch's counter."""
        # The counter knows the operations of plain attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._forward().backward()
        return counter.get_total_flops() / self.batch_size
