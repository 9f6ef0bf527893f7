"""Two steps of each method against its authors' code (tests/golden/make_methods.py).

``pytest -s`` prints for each method the worst relative difference of losses, gradients and buffers.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_FILES
from omegaconf import OmegaConf
from tiny_methods import VALUES, tiny_config, tiny_method
from torch import Tensor

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods import StepInputs
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss, query_indexes
from pretrain.methods.masking import masks_of_share
from pretrain.optimizer import build_adamw, clip_gradients
from pretrain.schedules import Schedules

FOLDER = Path(__file__).parent.parent / "golden/methods"
FILES = sorted(path for path in FOLDER.glob("*.npz") if path.stem != "flsl")
# Both sides compute in float32 (rounding error 6e-8) and sum in another order, which batch norm
# over few images and temperatures of 0.05 magnify: up to 2e-6 was seen in a loss and 7e-5 in a
# gradient, and other processors differ by a few times that. A missing local view, another centre or
# another filter changes a loss by 1e-3 and more.
LOSS, GRADIENT = 2e-5, 2e-4
TOY = {
    **{"model.backbone.embed_dim": 8, "model.backbone.img_size": 16, "model.output_dim": 6},
    **{"model.head.num_centroids": 6, "model.patch_head.num_centroids": 6},
}


class Golden:
    """A file, and this project's method with the weights of its start."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        self.name = path.stem
        self.meta = ast.literal_eval(str(arrays["__meta__"]))
        self.tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "__meta__"}
        config = tiny_config(self.name)
        toy = [f"{key}={value}" for key, value in TOY.items() if OmegaConf.select(config, key)]
        self.method = tiny_method(self.name, *toy, *self.meta["overrides"]).train()
        for group in self.groups("start"):
            ours, theirs = self.ours(group), self.theirs("start", group)
            assert len(ours) == len(theirs), group
            for i, tensor in theirs.items():
                assert ours[i].squeeze().shape == tensor.squeeze().shape, (group, i)
                ours[i].data.copy_(tensor.view(ours[i].shape))

    def groups(self, prefix: str) -> list[str]:
        keys = [k.removeprefix(f"{prefix}.") for k in self.tensors if k.startswith(f"{prefix}.")]
        return sorted({key.rpartition(".")[0] for key in keys})

    def theirs(self, prefix: str, group: str) -> dict[int, Tensor]:
        head = f"{prefix}.{group}."
        found = {k.removeprefix(head): v for k, v in self.tensors.items() if k.startswith(head)}
        return {int(k): v for k, v in found.items() if k.isdigit()}

    def ours(self, group: str) -> list[Tensor]:
        """Weights of a module in their order, or one tensor."""
        part = attrgetter(group)(self.method)
        if isinstance(part, Tensor):
            return [part]
        return [p for name, p in part.named_parameters() if not name.endswith("pos_embed")]

    def buffer(self, name: str) -> Tensor:
        if not name.endswith(".statistics"):
            return attrgetter(name)(self.method)
        module = attrgetter(name.removesuffix(".statistics"))(self.method)
        return torch.cat([b for b in module.buffers() if b.is_floating_point()])

    def inputs(self, number: int, monkeypatch) -> StepInputs:
        count = len(self.meta["sizes"])
        views = [self.tensors[f"step{number}.view{i}"].float() for i in range(count)]
        draws = {
            key.removeprefix("draw."): value[number]
            for key, value in self.tensors.items()
            if key.startswith("draw.") and key != "draw.masks"
        }
        if "codes" in draws:
            monkeypatch.setattr(self.method.tokens, "forward", lambda _: draws["codes"])
        if "drawn" in draws:
            drawn = iter(draws["drawn"])
            monkeypatch.setattr(self.method, "_draw", lambda _: next(drawn))
        boxes, labels = (list(draws.get(name, [])) for name in ("boxes", "labels"))
        return StepInputs(views, [], boxes, [], min(count, 2), labels)

    def steps(self, monkeypatch) -> Iterator[tuple[str, str, float]]:
        """Take both steps; yield kind, name and relative difference of every quantity."""
        values = replace(VALUES, teacher_temp=self.meta["temperature"], **self.meta["values"])
        for number in range(2):
            random.seed(number)
            inputs = self.inputs(number, monkeypatch)
            torch.manual_seed(number)
            losses, _ = self.method(inputs, values)
            losses["loss"].backward()
            for key, loss in losses.items():
                theirs = self.tensors.get(f"step{number}.{key}")
                if theirs is not None:
                    yield "loss", f"{key} {number}", difference(loss, theirs)
            prefix = f"step{number}.grad"
            for group in self.groups(prefix):
                ours, theirs = self.ours(group), self.theirs(prefix, group)
                whole = torch.cat([each.flatten() for each in theirs.values()]).norm().item()
                for i, expected in theirs.items():
                    found = ours[i].grad
                    assert found is not None, (group, i)
                    # A part whose gradient almost vanishes is held to a hundredth of its module.
                    error = difference(found.view(expected.shape), expected, whole / 100)
                    yield "gradient", f"{group} {i} {number}", error
            with torch.no_grad():
                for parameter in self.method.parameters():
                    if parameter.grad is not None:
                        parameter -= self.meta["learning_rate"] * parameter.grad
                        parameter.grad = None
            self.method.update_teacher(self.meta["momentum"])
            prefix = f"step{number}.buffer."
            for key, theirs in self.tensors.items():
                if key.startswith(prefix):
                    ours = self.buffer(key.removeprefix(prefix)).view(theirs.shape)
                    yield "buffer", key, difference(ours, theirs)


def difference(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """Difference relative to the norm of the authors' value, or to a least one."""
    return ((ours.detach() - theirs).norm() / theirs.norm().clamp(min=max(least, 1e-12))).item()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_two_steps_equal_the_authors(path, monkeypatch):
    golden = Golden(path)
    found: dict[str, list[tuple[float, str]]] = {"loss": [], "gradient": [], "buffer": []}
    for kind, name, error in golden.steps(monkeypatch):
        found[kind].append((error, name))
    worst = {kind: max(errors, default=(0.0, "none")) for kind, errors in found.items()}
    columns = " | ".join(f"{kind} {error:.1e} ({name})" for kind, (error, name) in worst.items())
    print(f"\n{golden.name} | {golden.meta['source']}@{golden.meta['revision']} | {columns}")
    assert len(found["gradient"]) >= 10
    for kind, (error, name) in worst.items():
        assert error < (GRADIENT if kind == "gradient" else LOSS), (kind, name, error)


def test_there_is_a_file_of_every_method_with_public_code():
    names = {path.stem for path in FILES}
    assert len(names) == 14
    assert GOLDEN_FILES  # and those of FLSL, which tests/test_golden.py compares


def test_masks_are_the_authors():
    ibot, beit = (Golden(FOLDER / f"{name}.npz")
                  for name in ("ibot", "beit"))  # fmt: skip
    random.seed(7)
    assert torch.equal(ibot.method._draw_masks(40, 196), ibot.tensors["draw.masks"])
    random.seed(7)
    assert torch.equal(masks_of_share(20, 14, 75 / 196), beit.tensors["draw.masks"])


def test_three_steps_of_flsl_equal_the_published_code():
    """Schedules, clipping, AdamW, moving average and drawn queries (tests/golden/make.py)."""
    arrays = np.load(FOLDER / "flsl.npz")
    meta = ast.literal_eval(str(arrays["__meta__"]))
    tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "__meta__"}
    root = meta["d"] ** 0.5
    encoder = FLSLViT(
        img_size=48, patch_size=12, embed_dim=8, depth=meta["depth"], num_heads=meta["h"]
    )
    _, inter, volume = meta["coefficients"]
    loss = FLSLLoss(meta["K"], inter, volume, meta["student_temp"])
    method = FLSL(encoder, FLSLHead(8, meta["K"], meta["hid"], meta["bot"]), loss).train()
    method.pixel_mean.zero_()
    method.pixel_std.fill_(1)  # the reference views are normalised already

    def weights(prefix: str) -> dict[str, Tensor]:
        named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        named = {k.replace("backbone.norm", "backbone.final_norm"): v for k, v in named.items()}
        return {k: v for k, v in named.items() if "cls_token" not in k}

    for name in ("student", "teacher"):
        getattr(method, name).load_state_dict(weights(f"{name}."))
    schedules = Schedules(
        256, 5, 20, base_lr=0.01, final_lr=1e-6, warmup_fraction=0.25, weight_decay=(0.04, 0.4),
        teacher_momentum=(0.9, 1.0), teacher_temp=(meta["teacher_temp"],) * 2,
        intra_weight=(0.3, 0.03), self_scale=(0.1, 0.2), cross_scale=(0.5, 0.7),
    )  # fmt: skip
    names = {"weight_decay": "weight_decay", "momentum": "teacher_momentum", "lr": "lr"}
    names |= {"intra": "intra_weight", "self": "self_scale", "cross": "cross_scale"}
    for theirs, ours in names.items():
        factor = root if theirs in ("self", "cross") else 1.0
        values = [getattr(schedules(i), ours) / factor for i in range(20)]
        # The published warm-up begins with a step of learning rate 0, which is left out here.
        first = 5 if theirs == "lr" else 0
        expected = tensors[f"schedule.{theirs}"].tolist()
        assert values[first:] == pytest.approx(expected[first:], rel=1e-6), theirs
    assert [schedules(i).lr for i in range(5)] == pytest.approx([0.002 * i for i in range(1, 6)])
    optimizer = build_adamw(method)
    for number in range(3):
        values = schedules(5 + number)
        for group in optimizer.param_groups:
            group["lr"] = values.lr
        optimizer.param_groups[0]["weight_decay"] = values.weight_decay
        views = [tensors[f"step{number}.view{i}"].float() for i in range(4)]
        queries = [query_indexes(tensors[f"step{number}.mask{i}"]) for i in range(1, 4)]
        losses, _ = method(StepInputs(views, queries), values)
        assert difference(losses["loss"], tensors[f"step{number}.loss"]) < LOSS
        optimizer.zero_grad()
        losses["loss"].backward()
        trained = [p for p in method.parameters() if p.grad is not None]
        clip_gradients([p.grad for p in trained if p.grad is not None], meta["clip"])
        optimizer.step()
        method.update_teacher(values.teacher_momentum)
    for name in ("student", "teacher"):
        start, end = weights(f"{name}."), weights(f"end.{name}.")
        for key, value in getattr(method, name).state_dict().items():
            # AdamW takes rounding errors for gradients where these are 0: at the bias of the keys.
            kept = slice(None) if "qkv.bias" not in key else [*range(8), *range(16, 24)]
            moved = (end[key] - start[key])[kept].norm().item()
            assert (value - end[key])[kept].norm().item() <= 1e-2 * moved + 1e-6, key
