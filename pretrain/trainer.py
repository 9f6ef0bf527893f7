"""The step of pre-training as a Detectron2 trainer, and what happens to bad numbers."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from flsl_d2.engine.launch import has_native_bf16
from flsl_d2.errors import InputError
from pretrain.methods.protocol import Losses, Method, Monitored
from pretrain.optimizer import clip_gradients
from pretrain.schedules import Schedules, StepValues
from pretrain.step_inputs import StepInputs
from pretrain.step_numbers import StepNumbers, check_finite

# Modes of torch.compile.
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
logger = logging.getLogger("pretrain")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: str) -> str:
    """Resolve ``auto``: bf16 on a GPU that computes in it, fp16 on an older one, fp32 on a CPU."""
    if precision == "auto":
        if not device.startswith("cuda"):
            return "fp32"
        return "bf16" if has_native_bf16() else "fp16"
    if precision not in PRECISIONS:
        known = ", ".join(["auto", *PRECISIONS])
        raise InputError(f"train.precision is '{precision}'; use one of {known}.")
    if precision == "fp16" and not device.startswith("cuda"):
        raise InputError(f"train.precision is 'fp16' on device '{device}'; use bf16 or fp32 there.")
    return precision


def resolve_compile(
    setting: bool | str, mode: str, device: str, encoder: nn.Module, changing: str = ""
) -> str:
    """Return the mode of ``torch.compile`` for the blocks; empty where they are not compiled.

    ``auto`` compiles blocks on a GPU, where they and a C compiler are there: a step of 64 images on
    a GPU is bound by the 1,665 operations that Python starts for it.

    Args:
        setting: ``train.compile``.
        mode: ``train.compile_mode``, one of :data:`COMPILE_MODES`.
        changing: name of the method where its shapes change from step to step; else empty.

    Raises:
        InputError: an unknown setting or mode, CUDA graphs on a CPU, or shapes that change.
    """
    text = str(setting).lower()  # an override of a key that holds text is text
    if text not in ("auto", "true", "false"):
        raise InputError(f"train.compile is '{setting}'; use auto, True or False.")
    if mode not in COMPILE_MODES:
        raise InputError(f"train.compile_mode is '{mode}'; use one of {', '.join(COMPILE_MODES)}.")
    on_gpu = device.startswith("cuda")
    # Triton compiles a small C file for each kernel.
    names = (os.environ.get("CC", "cc"), "gcc", "clang")
    compiler = any(shutil.which(name) for name in names)
    able = hasattr(encoder, "compile_blocks")
    chosen = text == "true" or (text == "auto" and on_gpu and compiler and able)
    if chosen and changing:
        if text == "true":
            raise InputError(
                f"train.compile is True, and the shapes of {changing} change in each step, so that "
                "all would be compiled anew; set train.compile=False."
            )
        logger.info("Blocks are not compiled, because the shapes of %s change.", changing)
        return ""
    if chosen and records_graphs(mode) and not on_gpu:
        raise InputError(
            f"train.compile_mode is '{mode}', which records CUDA graphs, on device '{device}'; set "
            "train.compile_mode=default."
        )
    return mode if chosen else ""


def records_graphs(mode: str) -> bool:
    return mode in ("reduce-overhead", "max-autotune")


class PretrainTrainer(SimpleTrainer):
    """Trainer of a method: schedules, forward, backward, clipping, optimiser, teacher.

    The state of the run at a step is the weights, the optimiser and the number of the step: data
    and randomness of a step follow from the seed and that number alone.

    Args:
        model: a :class:`pretrain.methods.Method`, or one wrapped for several processes.
        data_loader: endless loader of :class:`StepInputs`.
        optimizer: optimiser of ``build_adamw``; its first group has weight decay.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        clip_norm: see :func:`clip_gradients`, as for ``clip_mode``.
        seed: seed of what the step draws: stochastic depth, and positions that are dropped.
        accumulation_steps: number of parts in which a process works off its images of a step, to
            save memory. The gradients are those of the mean of the parts' losses; a term that looks
            at the mean over a step, like FLSL's volume term, sees the mean of a part.
        records_graphs: whether compiled blocks are CUDA graphs, whose outputs of one forward and
            backward pass are overwritten by the next.

    Attributes:
        method: the method without its wrapper.
        monitored: what the method monitored in the last step.
        stop_asked: function that says whether this process was asked to stop.
        stop_agreed: whether any process was asked to stop before the last step, or has no images
            for the next one; equal on all.
        reads_now: function from the number of steps done that says whether the numbers of the last
            one are read at once. Otherwise they are read in the next step, so that a GPU need not
            wait for Python; a stop is agreed, and bad numbers are found, a step later.
        num_failed: number of images of all processes that could not be read so far.
        num_overflows: number of steps that were left out because float16 gradients overflowed.

    Raises:
        BadNumbersError: losses or gradients of a step are not finite; raised on every process.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        precision: str = "fp32",
        clip_norm: float = 3.0,
        clip_mode: str = "per_tensor",
        seed: int = 0,
        accumulation_steps: int = 1,
        records_graphs: bool = False,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.accumulation_steps, self.records_graphs = accumulation_steps, records_graphs
        self.method = cast(Method, getattr(model, "module", model))
        self.schedules, self.seed = schedules, seed
        self.clip_norm, self.clip_mode = clip_norm, clip_mode
        self.dtype = PRECISIONS[precision]
        self.device = next(iter(model.parameters())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.last_batch: StepInputs | None = None
        self.monitored: Monitored = {}
        self.stop_asked: Callable[[], bool] = lambda: False
        self.stop_agreed = False
        self.reads_now: Callable[[int], bool] = lambda _: True
        self._unread: StepNumbers | None = None
        self.num_failed = 0
        self.num_overflows = 0
        self.loss_scale = self.scaler.get_scale()

    def run_step(self) -> None:
        start = time.perf_counter()
        batch: StepInputs = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.last_batch = batch
        values = self.schedules(self.iter)
        self._apply(values)
        self.optimizer.zero_grad()
        losses = self._accumulate(batch, values)
        grad_norm = self._step(values)
        self.method.update_teacher(values.teacher_momentum)
        self._record(losses, grad_norm, data_time, values)

    def _apply(self, values: StepValues) -> None:
        decayed, exempt = self.optimizer.param_groups
        decayed["lr"] = exempt["lr"] = values.lr
        decayed["weight_decay"] = values.weight_decay
        # Methods draw from PyTorch's generator. It is seeded from the step's number, as are
        # Python's and NumPy's, so that a resumed run draws what the uninterrupted one would.
        sequence = np.random.SeedSequence([self.seed, self.iter, comm.get_rank()])
        seed = int(sequence.generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def _accumulate(self, batch: StepInputs, values: StepValues) -> Losses:
        """Run forward and backward for every part of the batch; return the mean losses."""
        parts = batch.split(self.accumulation_steps)
        losses: list[Losses] = []
        monitored: list[Monitored] = []
        for part in parts:
            # Gradients are exchanged between processes once, with the last part.
            wait = part is not parts[-1] and self.model is not self.method
            with self.model.no_sync() if wait else nullcontext():
                losses.append(self._forward(part, values))
                self.scaler.scale(losses[-1]["loss"] / len(parts)).backward()
            monitored.append(self.monitored)
        if len(parts) > 1:
            self.monitored = {k: _combine([m[k] for m in monitored]) for k in monitored[0]}
        return {k: _combine([part[k].detach() for part in losses]) for k in losses[0]}

    def _forward(self, batch: StepInputs, values: StepValues) -> Losses:
        if self.records_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        inputs = batch.to_device(self.device)
        mixed = torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()
        losses: Losses
        with mixed:
            losses, self.monitored = self.model(inputs, values)
        return losses

    def _step(self, values: StepValues) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        grad_norm = clip_gradients(gradients, self.clip_norm, self.clip_mode)
        for parameter in self.method.frozen_parameters(values):
            parameter.grad = None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return grad_norm

    def _record(
        self, losses: Losses, grad_norm: Tensor, data_time: float, values: StepValues
    ) -> None:
        scalars = {name: loss.detach() for name, loss in losses.items()}
        scalars["grad_norm"] = grad_norm
        scalars.update((name, x) for name, x in self.monitored.items() if x.dim() == 0)
        scale = self.scaler._get_scale_async() if self.scaler.is_enabled() else None
        if scale is not None:
            scalars["loss_scale"] = scale  # get_scale would wait for it
        assert self.last_batch is not None
        counts = {
            "data_time": data_time,
            "failed": len(self.last_batch.failed),
            "stop": self.stop_asked() or self.last_batch.next_error is not None,
        }
        numbers = StepNumbers(self.iter, values, scalars, counts)
        if self._unread is not None:
            self._read(self._unread)
        self._unread = numbers
        if self.stop_agreed or self.reads_now(self.iter + 1):
            self._read(numbers)
            self._unread = None

    def _read(self, numbers: StepNumbers) -> None:
        """Wait for the numbers of a step, check them, and put them into the storage."""
        terms, counts = numbers.read()
        self.num_failed += int(sum(counts["failed"]))
        self.stop_agreed = self.stop_agreed or any(counts["stop"])
        # The scaler leaves out a step whose gradients overflow, and only that one.
        exempt = ["grad_norm"] if self.scaler.is_enabled() else []
        check_finite(numbers.iteration, terms, exempt)
        if self.scaler.is_enabled():
            self.num_overflows += terms[0]["loss_scale"] < self.loss_scale
            self.loss_scale = terms[0]["loss_scale"]
        if not comm.is_main_process():
            return
        self.storage.iter = numbers.iteration
        for name in terms[0]:
            self.storage.put_scalar(name, float(np.mean([rank[name] for rank in terms])))
        self.storage.put_scalar("data_time", max(counts["data_time"]))
        if self.scaler.is_enabled():
            self.storage.put_scalar("overflowed_steps", self.num_overflows, smoothing_hint=False)
        scheduled = {name: float(value) for name, value in asdict(numbers.values).items()}
        self.storage.put_scalars(**scheduled, smoothing_hint=False)
        self.storage.iter = self.iter

    def state_dict(self) -> dict[str, Any]:
        counts = {"num_failed": self.num_failed, "num_overflows": self.num_overflows}
        return {**super().state_dict(), "scaler": self.scaler.state_dict(), "counts": counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.scaler.load_state_dict(state_dict["scaler"])
        self.loss_scale = self.scaler.get_scale()
        for name, count in state_dict.get("counts", {}).items():
            setattr(self, name, int(count))


def _combine(parts: list[Tensor]) -> Tensor:
    """Sum counts, which are integers, and average other numbers."""
    if not parts[0].is_floating_point():
        return torch.stack(parts).sum(dim=0)
    return torch.stack([part.float() for part in parts]).mean(dim=0)
