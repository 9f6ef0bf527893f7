"""Every number of one training step against the published implementation.

Each ``*.npz`` in ``tests/golden``, or in the folder that FLSL_GOLDEN names, is one step; the file
holds its sizes.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_FILES

from flsl_d2.mean_shift import attention, mean_shift, mix_attention, sharpened_prior
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods import StepInputs
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss, query_indexes
from pretrain.methods.previous_stage import PreviousStage
from pretrain.schedules import StepValues

# Relative, in the Euclidean norm of a tensor. Both sides compute in float32 (rounding error 6e-8)
# and sum in another order; up to 1.5e-6 was seen, and libraries of other processors get ten times
# that. Positions without their offset change gradients by 1e-2. Only a norm's epsilon of 1e-5 in
# place of 1e-6 (1e-5) would go unnoticed.
TOLERANCE = 2e-5
# Parameters of the prior in the reference run (tests/golden/README.md).
PRIOR_SHARPNESS, PRIOR_SCALE, MIXTURE = 1e3, 0.2, 0.3


class Golden:
    """One reference step: its sizes, its arrays, and our model with its weights."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        self.meta = ast.literal_eval(str(arrays["__meta__"]))
        self.tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "__meta__"}
        meta = self.meta
        _, inter, volume = meta["coefficients"]
        sizes = {"img_size": meta["img"], "patch_size": meta["p"], "embed_dim": meta["d"]}
        self.model = FLSL(
            FLSLViT(**sizes, depth=meta["depth"], num_heads=meta["h"]),
            FLSLHead(meta["d"], meta["K"], meta["hid"], meta["bot"]),
            FLSLLoss(meta["K"], inter, volume, meta["student_temp"]),
        )
        for name in ("student", "teacher"):
            weights = self.below(name)
            weights = {k: v for k, v in weights.items() if "cls_token" not in k}
            getattr(self.model, name).load_state_dict(weights)
        # The reference views are normalised floats already.
        self.model.pixel_mean.zero_()
        self.model.pixel_std.fill_(1)

    def values(self) -> StepValues:
        root = self.meta["d"] ** 0.5
        return StepValues(
            lr=0, weight_decay=0, teacher_momentum=1, teacher_temp=self.meta["teacher_temp"],
            intra_weight=self.meta["coefficients"][0], self_scale=self.meta["sa"] * root,
            cross_scale=self.meta["ca"] * root, last_layer_frozen=False,
        )  # fmt: skip

    def below(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors whose names start with this one, by what follows."""
        return {k[len(name) + 1 :]: v for k, v in self.tensors.items() if k.startswith(f"{name}.")}

    def step(self, pack_views: bool) -> dict[str, torch.Tensor]:
        """Return the losses of our step."""
        self.model.pack_views = pack_views
        views = [self[f"view{i}"] for i in range(4)]
        queries = [query_indexes(self[f"mask{i}"]) for i in range(1, 4)]
        return self.model(StepInputs(views, queries), self.values())[0]

    def group(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        views = [["view1"], ["view2", "view3"]][index]
        images = torch.cat([self[v] for v in views])
        return images, torch.cat([self[v.replace("view", "mask")] for v in views])

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]


@pytest.fixture(params=GOLDEN_FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def assert_equal(ours: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    assert ours.shape == reference.shape, f"{what}: {ours.shape} against {reference.shape}"
    error = (ours - reference).norm() / reference.norm().clamp_min(1e-12)
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def test_encodings(golden: Golden) -> None:
    assert_equal(
        golden.model.teacher.backbone.forward_tokens(golden["view0"]),
        golden["teacher_tokens"],
        "teacher",
    )
    for index in range(2):
        tokens = golden.model.student.backbone.forward_tokens(golden.group(index)[0])
        assert_equal(tokens, golden[f"group{index}.enc_s"], f"student group {index}")


def test_modes_and_prior(golden: Golden) -> None:
    meta = golden.meta
    for index in range(2):
        tokens, mask = golden[f"group{index}.enc_s"], golden.group(index)[1]
        queries = gather_tokens(tokens, query_indexes(mask))
        keys = golden["teacher_tokens"].repeat(len(tokens) // meta["B"], 1, 1)
        name = f"group{index}."
        assert_equal(mean_shift(queries, tokens, meta["sa"]), golden[name + "mode_s"], "self modes")
        assert_equal(mean_shift(queries, keys, meta["ca"]), golden[name + "mode_t"], "cross modes")
        prior = sharpened_prior(
            attention(queries, keys, PRIOR_SCALE / meta["d"] ** 0.5), PRIOR_SHARPNESS
        )
        assert_equal(prior, golden[name + "prior_attention"], "prior attention")
        mixed = mix_attention(attention(queries, keys, meta["ca"]), prior, MIXTURE) @ keys
        assert_equal(mixed, golden[name + f"mode_t_mixture{MIXTURE}"], "mixture")


def test_modes_of_a_later_stage(golden: Golden) -> None:
    """The model's own path, with a previous stage whose features are the reference's."""
    meta = golden.meta
    stage = PreviousStage(golden.model.teacher.backbone, 1, PRIOR_SCALE, PRIOR_SHARPNESS)
    for index in range(2):
        name = f"group{index}."
        images, mask = golden.group(index)
        known = {len(images): golden[name + "enc_s"]}
        stage.tokens = lambda crops, known=known: known[len(crops)]
        keys = golden["teacher_tokens"].repeat(len(images) // meta["B"], 1, 1)
        prior = stage.prior(images, query_indexes(mask), keys)
        queries = gather_tokens(golden[name + "enc_s"], query_indexes(mask))
        modes = golden.model._cross_modes(queries, keys, meta["ca"], [prior], MIXTURE)
        assert_equal(modes, golden[name + f"mode_t_mixture{MIXTURE}"], "cross modes")


@pytest.mark.parametrize("pack_views", [False, True])
def test_losses_in_half_precision(golden: Golden, pack_views: bool) -> None:
    """bfloat16 has 8 significant bits: losses agree to about one part in a hundred."""
    with torch.autocast("cpu", torch.bfloat16):
        losses = golden.step(pack_views)
    names = {"loss_intra": "intra_view", "loss_inter": "inter_view", "loss": "total"}
    for ours, theirs in names.items():
        reference = golden[f"loss.{theirs}"]
        assert losses[ours].dtype == torch.float32
        assert abs(losses[ours] - reference) < 0.02 * abs(reference), ours


@pytest.mark.parametrize("pack_views", [False, True])
def test_losses_and_gradients(golden: Golden, pack_views: bool) -> None:
    assert_step_equals(golden, pack_views)


@pytest.mark.parametrize(
    ("pack_views", "compiled", "backend"),
    [
        (True, "blocks", "aot_eager"),
        (True, "branches", "aot_eager"),
        (False, "blocks", "inductor"),  # takes the longest, so it runs once
    ],
)
def test_losses_and_gradients_of_compiled_code(
    pack_views: bool, compiled: str, backend: str
) -> None:
    """One file is enough: compiling takes seconds, and sizes play no part in it."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    assert_step_equals(Golden(GOLDEN_FILES[0]), pack_views, compiled, backend)


def assert_step_equals(
    golden: Golden, pack_views: bool, compiled: str = "", backend: str = ""
) -> None:
    """Compare every loss and gradient of a step with the reference."""
    if compiled == "blocks":
        golden.model.compile_blocks(backend)
    for block in golden.model.student.backbone.blocks if compiled == "branches" else ():
        block.drop_path.probability = 1e-9  # as in training with stochastic depth
        block.compile_in_place(backend)
        block.drop_path.probability = 0.0
    losses = golden.step(pack_views)
    names = {"loss_intra": "intra_view", "loss_inter": "inter_view", "loss_volume": "volume"}
    for ours, theirs in (*names.items(), ("loss", "total")):
        assert_equal(losses[ours], golden[f"loss.{theirs}"], ours)
    losses["loss"].backward()
    expected = golden.below("grad")
    renamed = {f"backbone.norm.{k}": f"backbone.final_norm.{k}" for k in ("weight", "bias")}
    parameters = dict(golden.model.student.named_parameters())
    for name in expected:
        gradient = parameters[renamed.get(name, name)].grad
        assert_equal(gradient, golden[f"grad.{name}"], f"gradient of {name}")
    trained = {name for name, p in parameters.items() if p.grad is not None}
    assert trained == {renamed.get(name, name) for name in expected}
