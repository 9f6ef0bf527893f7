"""Whole runs of two processes, sharded and not; functions that every process of a group calls."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import TrainingError
from flsl_d2.weights.checkpointer import CHECKSUMS, checkpoint_damage
from pretrain import run, sharding
from pretrain.optimizer import clip_gradients
from pretrain.run import run_pretraining
from pretrain.trainer import PretrainTrainer

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
STEPS = 4


def config(images: Path, output: Path, *overrides: str):
    """Return the config of a run of a few steps with everything small."""
    short = [
        f"dataset.root={images}",
        f"train.output_dir={output}",
        f"train.max_iter={STEPS}",
        "train.checkpoint_period=2",
        "train.pictures_period=0",
        "train.health_period=0",
        "train.log_period=1",
        "dataloader.num_workers=0",
    ]
    wanted = [key for key in soak.TINY if "num_workers" not in key and "log_period" not in key]
    return load_lazy_config(str(soak.ROOT / CONFIG), [*wanted, *short, *overrides])


def trained(cfg: Any, resume: bool = False, at: int | None = None) -> PretrainTrainer:
    """Run a config; stop it before the step of a number, like a run that is killed."""
    kept = []

    class Stopped(PretrainTrainer):
        def run_step(self) -> None:
            kept[:] = [self]
            if self.iter == at:
                raise TrainingError("killed")
            super().run_step()

    killed = pytest.raises(TrainingError, match="killed") if at is not None else nullcontext()
    run.PretrainTrainer = Stopped
    try:
        with killed:
            run_pretraining(cfg, resume)
    finally:
        run.PretrainTrainer = PretrainTrainer
    return kept[0]


def whole(trainer: PretrainTrainer) -> dict[str, torch.Tensor]:
    """Gather the weights of a run, and the moments of its optimiser."""
    tensors = dict(trainer.method.state_dict())
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in tensors.items()
    }


def check_a_sharded_run_equals_one_that_is_not(folder: Path, images: Path) -> None:
    """Equal to the bit: two numbers have one sum, and everything else is done by element.

    The norm of a gradient is summed in another order, so nothing is clipped here. The sharded run
    computes its blocks twice, which changes no number either.
    """
    same = (
        "train.clip_mode=none",
        "schedules.base_lr=0.05",
        "schedules.frozen_last_layer_epochs=0",
    )
    other = ("model.backbone.use_act_checkpoint=True", "train.sharding=fsdp2")
    plain = trained(config(images, folder / "plain", *same))
    sharded = trained(config(images, folder / "sharded", *same, *other))
    blocks = sharded.method.student.backbone.blocks, sharded.method.teacher.backbone.blocks
    for weight in (p for each in blocks for p in each.parameters()):
        assert isinstance(weight, DTensor)
        assert weight.to_local().numel() <= -(-weight.shape[0] // 2) * weight[0].numel()
    for moments in sharded.optimizer.state.values():
        assert isinstance(moments["exp_avg"], DTensor)
    one, two = whole(plain), whole(sharded)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    if comm.is_main_process():
        rows = [soak.logged(folder / each) for each in ("plain", "sharded")]
        for before, after in zip(*rows, strict=True):
            norm, other_norm = before.pop("grad_norm"), after.pop("grad_norm")
            # Both sums have relative errors of some units in the last place.
            assert other_norm == pytest.approx(norm, rel=1e-6)
            assert before == after


def check_sharded_gradients_are_clipped_by_their_whole_norms(folder: Path, images: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((7, 5), (1, 3), (4,))]
    mesh = init_device_mesh("cpu", (2,))
    for mode in ("per_tensor", "global", "none"):
        expected = [gradient.clone() for gradient in gradients]
        sharded = [distribute_tensor(gradient, mesh, [Shard(0)]) for gradient in gradients]
        norms = [clip_gradients(each, 2.0, mode) for each in (expected, sharded)]
        # Sums of at most 43 squares in another order.
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
        for one, two in zip(expected, sharded, strict=True):
            torch.testing.assert_close(two.full_tensor(), one, rtol=1e-6, atol=0)


def check_a_sharded_run_repeats_itself(folder: Path, images: Path) -> None:
    output = folder / "parts"
    options = ("train.sharding=fsdp2", "train.health_period=2")
    first = trained(config(images, folder / "whole", *options))
    half = trained(config(images, output, *options), at=2)
    state = whole(half)
    if comm.is_main_process():
        torch.save(state, folder / "half.pth")
    assert (output / "last_checkpoint").read_text() == "model_0000001.dcp"
    second = trained(config(images, output, *options), resume=True)
    one, two = whole(first), whole(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    if not comm.is_main_process():
        return
    rows = soak.logged(output)
    assert rows == soak.logged(folder / "whole")
    # What is measured and exported is whole, and equals the teacher.
    assert "position_r2" in rows[1]
    exported = torch.load(output / "teacher_backbone.pth", weights_only=True)["model"]
    for name, tensor in exported.items():
        assert torch.equal(tensor, one[f"teacher.backbone.{name}"]), name
    assert not list(output.glob("*.part"))
    files = json.loads((output / "model_final.dcp" / CHECKSUMS).read_text())
    assert set(files) == {".metadata", "rest.pth", "__0_0.distcp", "__1_0.distcp"}
    assert not checkpoint_damage(output / "model_final.dcp")


def check_a_share_that_cannot_be_written(folder: Path, images: Path) -> None:
    real = sharding.save_shares

    def full(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        if comm.get_rank() == 1:
            raise OSError(28, "No space left on device")

    sharding.save_shares = full
    try:
        with pytest.raises(TrainingError, match=r"model_final\.dcp cannot be written .*No space"):
            run_pretraining(config(images, folder / "full", "train.sharding=fsdp2"), False)
    finally:
        sharding.save_shares = real
    comm.synchronize()
    assert not list((folder / "full").glob("model_*"))


def check_a_stop_waits_for_the_checkpoint_that_is_being_written(folder: Path, images: Path) -> None:
    class Asked(PretrainTrainer):
        def run_step(self) -> None:
            if self.iter == 2:
                self.stop_asked = lambda: comm.get_rank() == 1
            super().run_step()

    run.PretrainTrainer = Asked
    try:
        with pytest.raises(SystemExit) as left:
            run_pretraining(config(images, folder / "stopped"), False)
    finally:
        run.PretrainTrainer = PretrainTrainer
    assert left.value.code == STOPPED
    names = sorted(file.name for file in (folder / "stopped").glob("model_*"))
    assert names == ["model_0000001.pth", "model_0000002.pth"]


def check_warnings_appear_on_one_process(folder: Path, images: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn("a warning of PyTorch's", UserWarning, stacklevel=1)
    assert len(seen) == (1 if comm.is_main_process() else 0)


CHECKS: list[Callable[[Path, Path], None]] = [
    check_warnings_appear_on_one_process,
    check_sharded_gradients_are_clipped_by_their_whole_norms,
    check_a_sharded_run_equals_one_that_is_not,
    check_a_sharded_run_repeats_itself,
    check_a_share_that_cannot_be_written,
    check_a_stop_waits_for_the_checkpoint_that_is_being_written,
]


def run_all(folder: str, images: str) -> None:
    """Run all checks in one group, because starting Python costs most."""
    for check in CHECKS:
        own = Path(folder, check.__name__)
        own.mkdir(exist_ok=True)
        dist.barrier()
        check(own, Path(images))
        dist.barrier()
