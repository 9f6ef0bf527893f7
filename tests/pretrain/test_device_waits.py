"""A step of every recipe runs on the device, and waits for it once, at its end.

PyTorch's meta device stands for a GPU: its tensors have shapes and no values, so whatever needs a
value to go on, for which Python would have to wait, is an error there. An operation that mixes
tensors of the device and of the CPU is an error as well.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from tiny_methods import RECIPES, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import FLSLViT, transfer
from flsl_d2.weights.reading import ENCODER_FORMAT
from pretrain.monitor import CollapseWatch, Monitor
from pretrain.optimizer import clip_gradients
from pretrain.studies.benchmark.step import random_batch
from pretrain.trainer import PretrainTrainer

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
SMALL = [
    *("views.global_size=64", "views.local_size=32", "views.num_local=2"),
    *("model.backbone.embed_dim=48", "model.backbone.depth=2", "model.backbone.num_heads=3"),
    *("model.head.hidden_dim=32", "model.head.bottleneck_dim=16", "model.head.num_centroids=64"),
]


_COPIES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
)


class Dispatched(TorchDispatchMode):
    """What reaches the device: operations, and copies from the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copies: list[bool] = []
        self.pinned: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        if "meta" in devices:
            self.names.append(str(func))
        if devices == {"cpu", "meta"} and all(x.dim() for x in tensors):
            assert func in _COPIES, f"{func} mixes tensors of the CPU and of the device"
            source = next(x for x in tensors if x.device.type == "cpu")
            pinned = source.untyped_storage().data_ptr() in self.pinned
            self.copies.append(pinned and (kwargs or {}).get("non_blocking", False))
        return out

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Stand for pinning, which needs a GPU."""
        copy = tensor.clone()
        self.kept.append(copy)  # its address is not used again
        self.pinned.add(copy.untyped_storage().data_ptr())
        return copy


def no_copy_of_numbers(like: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    raise AssertionError(f"numbers of Python are copied to {like.device}, which waits for it")


class Unread(PretrainTrainer):
    """Stops where the numbers of a step are read."""

    def _record(self, losses, grad_norm, data_time, values):
        self.read = [*losses.values(), grad_norm]


def run_step(cfg: DictConfig, folder) -> Dispatched:
    cfg.schedules.update(total_batch_size=4, iters_per_epoch=10, total_iters=100)
    model = instantiate(cfg.model).train().to("meta")
    views = instantiate(cfg.views)
    views.keep_crops = model.needs_crops
    trained = [p for p in model.parameters() if p.requires_grad]
    # The fused optimiser, which is the run's, has no form for the meta device.
    optimizer = torch.optim.AdamW([{"params": trained}, {"params": []}], foreach=True)
    trainer = Unread(
        model,
        [random_batch(views, 4)] * 2,
        optimizer,
        instantiate(cfg.schedules),
        accumulation_steps=cfg.train.accumulation_steps,
    )
    hooks = [CollapseWatch(window=10), Monitor(10, 4, folder / "unreadable", 100)]
    trainer.register_hooks(hooks)
    trainer.iter, trainer.max_iter = 0, 100
    trainer.before_train()
    if (cfg.model.get("previous_stage") or {}).get("weights"):
        trainer.run_step()  # the first also moves the previous stage
    with pytest.MonkeyPatch.context() as patch, Dispatched() as dispatched:
        patch.setattr(transfer, "needs_pinning", lambda device: device.type != "cpu")
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: dispatched.pin(tensor))
        # A copy of Python's numbers to a GPU waits; the meta device takes them without one.
        patch.setattr(torch.Tensor, "new_tensor", no_copy_of_numbers)
        trainer.run_step()
        trainer.after_step()
    assert {number.device.type for number in trainer.read} == {"meta"}
    return dispatched


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["model.pack_views=False"], marks=pytest.mark.slow),
        pytest.param(["model.backbone.use_act_checkpoint=True"], marks=pytest.mark.slow),
        ["views.on_device=augmentation", "train.accumulation_steps=2"],
        ["model.previous_stage.weights=previous.pth"],
        pytest.param(["model.partner=place", "model.position_drop=0.5"], marks=pytest.mark.slow),
        ["views.on_device=crops", "model.loss.sinkhorn_steps=3"],
        [
            "model.partner=place",
            "model.position_share=0.05",
            "model.token_share=0.4",
            "model.prediction_blocks=1",
        ],
    ],
    ids=lambda overrides: ",".join(overrides)[:60] or "default",
)
def test_no_step_waits_for_the_device(overrides, tmp_path, monkeypatch):
    previous = FLSLViT(embed_dim=48, depth=2, num_heads=3)
    content = {"model": previous.state_dict(), "encoder": previous.architecture}
    torch.save({**content, "format": ENCODER_FORMAT}, tmp_path / "previous.pth")
    overrides = [text.replace("previous.pth", str(tmp_path / "previous.pth")) for text in overrides]
    # The meta device knows no autocast, whose casts wait for nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    dispatched = run_step(load_lazy_config(CONFIG, [*SMALL, *overrides]), tmp_path)
    assert dispatched.copies
    assert all(dispatched.copies), "a copy to the device that waits for it"


# Each draws and indexes in another way; the others are run on demand.
QUICK = ("beit", "detcon", "ibot", "navit", "simclr", "vicregl")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in RECIPES],
)
def test_no_recipe_waits_for_the_device(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    dispatched = run_step(tiny_config(name), tmp_path)
    assert dispatched.copies
    assert all(dispatched.copies), "a copy to the device that waits for it"


def test_clipping_asks_for_little_beside_the_scaling():
    """Each operation on a number costs a GPU's driver as much as one on a matrix."""
    gradients = [torch.empty(3, 2, device="meta") for _ in range(50)]
    with Dispatched() as dispatched:
        clip_gradients(gradients, 3.0)
    free = ("_foreach", "unbind", "view", "split")
    work = [name for name in dispatched.names if not any(part in name for part in free)]
    assert len(work) <= 9
