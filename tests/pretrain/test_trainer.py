"""Steps: what moves, what stays, what the optimiser sees, and that a run can be repeated."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from detectron2.utils.events import EventStorage

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.hooks import save_teacher_backbone
from pretrain.methods.flsl import FLSL
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.optimizer import build_adamw, clip_gradients
from pretrain.run import ddp_options
from pretrain.schedules import Schedules
from pretrain.step_inputs import StepInputs
from pretrain.step_numbers import BadNumbersError
from pretrain.trainer import (
    PretrainTrainer,
    records_graphs,
    resolve_compile,
    resolve_precision,
)


def small_model(**options) -> FLSL:
    torch.manual_seed(0)
    backbone = FLSLViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    head = FLSLHead(24, num_centroids=16, hidden_dim=32, bottleneck_dim=8)
    return FLSL(backbone, head, FLSLLoss(16), **options)


def batches(count: int) -> list[StepInputs]:
    generator = torch.Generator().manual_seed(1)

    def image(size: int) -> torch.Tensor:
        return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)

    def every_fourth(tokens: int) -> torch.Tensor:
        return torch.arange(0, tokens, 4).expand(4, -1)

    return [
        StepInputs(
            [image(32), image(32), image(16), image(16)],
            [every_fourth(16), every_fourth(4), every_fourth(4)],
        )
        for _ in range(count)
    ]


def trained(
    steps: int = 4, start: int = 0, trainer_state=None, model=None, reads_now=None, **schedule
):
    model = model or small_model()
    schedules = Schedules(4, iters_per_epoch=2, total_iters=8, **{"base_lr": 0.1, **schedule})
    trainer = PretrainTrainer(model, batches(8)[start:], build_adamw(model), schedules)
    if trainer_state:
        trainer.load_state_dict(trainer_state)
    trainer.start_iter, trainer.max_iter = start, steps
    trainer.reads_now = reads_now or trainer.reads_now
    with EventStorage(start) as trainer.storage:
        for trainer.iter in range(start, steps):
            trainer.run_step()
            trainer.storage.step()
    return trainer


def test_student_learns_and_teacher_follows():
    before = small_model()
    trainer = trained(frozen_last_layer_epochs=0, teacher_momentum=(0.5, 0.5))
    for name in ("student", "teacher"):
        old = dict(getattr(before, name).named_parameters())
        for key, new in getattr(trainer.method, name).named_parameters():
            fixed = key in ("backbone.pos_embed", "head.last_layer.weight_g")
            assert torch.equal(old[key], new) == fixed, f"{name}.{key}"
    assert not any(p.grad is not None for p in trainer.method.teacher.parameters())


def test_accumulated_gradients_are_the_mean_of_the_parts():
    """Without the volume term, which looks at a part's mean, they are those of the whole batch."""
    gradients = []
    for parts in (1, 2, 4):
        model = small_model()
        model.loss.volume_weight = 0.0
        schedules = Schedules(4, iters_per_epoch=2, total_iters=8)
        trainer = PretrainTrainer(
            model, batches(1), build_adamw(model), schedules, accumulation_steps=parts
        )
        losses = trainer._accumulate(batches(1)[0], schedules(0))
        assert trainer.monitored["assigned"].sum() == 4 * (4 + 1 + 1)
        gradients.append([p.grad for p in model.student.parameters() if p.grad is not None])
        assert losses["loss"].item() > 0
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            # Parts of a batch are summed in another order in float32.
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(InputError, match="accumulation_steps is 3"):
        batches(1)[0].split(3)


def test_teacher_is_the_moving_average():
    model = small_model()
    with torch.no_grad():
        for p in model.student.parameters():
            p.add_(1.0)
    expected = [
        0.9 * t + 0.1 * s
        for t, s in zip(model.teacher.parameters(), model.student.parameters(), strict=True)
    ]
    model.update_teacher(0.9)
    for p, e in zip(model.teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)


def test_last_layer_is_frozen_for_its_epochs():
    start = small_model().student.head.last_layer.weight_v
    assert torch.equal(trained(2).method.student.head.last_layer.weight_v, start)
    assert not torch.equal(trained(3).method.student.head.last_layer.weight_v, start)


def test_a_run_interrupted_and_continued_is_the_same_to_the_bit():
    whole = trained(6)
    first = trained(3)
    state = copy.deepcopy(first.state_dict())
    weights = copy.deepcopy(first.method.state_dict())
    model = small_model()
    model.load_state_dict(weights)
    second = trained(6, start=3, trainer_state=state, model=model)
    for (name, a), b in zip(
        whole.method.state_dict().items(), second.method.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_loss_that_is_not_finite_stops_with_its_terms():
    model = small_model()
    with torch.no_grad():
        model.student.backbone.blocks[0].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(BadNumbersError, match=r"iteration 0.*loss_inter = nan"):
        trained(1, model=model)


def test_numbers_that_are_read_a_step_late_are_the_same_numbers():
    at_once, late = trained(6), trained(6, reads_now=lambda done: done in (4, 6))
    for name, history in at_once.storage.histories().items():
        if name != "data_time":
            assert history.values() == late.storage.histories()[name].values(), name
    for a, b in zip(at_once.method.parameters(), late.method.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_numbers_are_found_a_step_late_under_their_own_number():
    model = small_model()
    with torch.no_grad():
        model.student.backbone.blocks[0].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(BadNumbersError, match="iteration 0 ") as found:
        trained(5, model=model, reads_now=lambda _: False)
    assert found.value.iteration == 0


def test_the_step_of_a_stop_is_read_before_its_checkpoint():
    trainer = trained(2, reads_now=lambda _: False)
    trainer.stop_asked = lambda: True
    with EventStorage(2) as trainer.storage:
        for trainer.iter in (2, 3):
            assert not trainer.stop_agreed
            trainer.run_step()
            trainer.storage.step()
    assert trainer.stop_agreed
    assert trainer._unread is None
    assert [step for _, step in trainer.storage.history("loss").values()] == [1, 2, 3]


def test_weight_decay_spares_biases_and_norms():
    model = small_model()
    decayed, exempt = build_adamw(model).param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in exempt["params"])
    assert exempt["weight_decay"] == 0
    count = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(exempt["params"]) == count


def test_clipping_by_tensor_and_by_all():
    gradients = [torch.full((4,), 3.0), torch.full((1,), 0.5)]  # norms 6 and 0.5
    total = clip_gradients(gradients, 3.0)
    assert total.item() == pytest.approx((36.25) ** 0.5)
    assert gradients[0].norm().item() == pytest.approx(3.0, rel=1e-5)
    assert gradients[1].item() == 0.5
    clip_gradients(gradients, 1.0, "global")
    # PyTorch adds 1e-6 to the norm that it divides by.
    assert torch.cat(gradients).norm().item() == pytest.approx(1.0, rel=1e-5)
    before = [g.clone() for g in gradients]
    clip_gradients(gradients, 1e-3, "none")
    assert all(map(torch.equal, gradients, before))
    with pytest.raises(InputError, match="'max'"):
        clip_gradients(gradients, 1.0, "max")


def test_schedules_at_their_corners():
    schedules = Schedules(512, iters_per_epoch=10, total_iters=1000, intra_weight=(-0.03, 0.03))
    first, peak, last = schedules(0), schedules(99), schedules(999)
    assert first.lr == pytest.approx(1e-3 / 100)
    assert peak.lr == pytest.approx(1e-3)
    assert 1e-6 <= last.lr < 2e-6
    assert first.weight_decay == pytest.approx(0.04)
    # The cosine ends one step after the last.
    assert last.weight_decay == pytest.approx(0.4, rel=1e-3)
    assert first.teacher_momentum == pytest.approx(0.996)
    assert first.teacher_temp == pytest.approx(0.04)
    assert schedules(150).teacher_temp == pytest.approx(0.055)
    assert schedules(300).teacher_temp == last.teacher_temp == pytest.approx(0.07)
    assert first.last_layer_frozen
    assert not schedules(10).last_layer_frozen
    assert first.intra_weight == pytest.approx(-0.03)
    # The middle of the two ends, in float64.
    assert schedules(500).intra_weight == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match="0 steps"):
        Schedules(1, 1, 0)


def test_scales_that_collapse_are_warned_of(caplog):
    Schedules(8, 1, 10, self_scale=(0.1, 0.1), cross_scale=(0.2, 0.2))
    assert not caplog.records
    Schedules(8, 1, 10, self_scale=(0.1, 0.1), cross_scale=(0.2, 0.05))
    assert "collapse" in caplog.text


def test_precision_follows_the_device():
    assert resolve_precision("auto", "cpu") == "fp32"
    with pytest.raises(InputError, match="'fp8'"):
        resolve_precision("fp8", "cpu")
    with pytest.raises(InputError, match="fp16"):
        resolve_precision("fp16", "cpu")


def test_blocks_are_compiled_by_default_on_a_gpu_alone(monkeypatch):
    encoder = small_model().exported_encoder()

    def chosen(setting, device, model=encoder, mode="default", changing=""):
        return resolve_compile(setting, mode, device, model, changing)

    assert not chosen("auto", "cpu")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not chosen("auto", "cpu")
    assert chosen("auto", "cuda") == "default"
    assert not chosen("auto", "cuda", torch.nn.Linear(1, 1))  # it has no blocks
    assert not chosen("auto", "cuda", changing="NaViT")
    with pytest.raises(InputError, match="shapes of NaViT change"):
        chosen(True, "cuda", changing="NaViT")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not chosen("auto", "cuda")
    assert chosen(True, "cpu") == "default"
    assert not chosen(False, "cuda")
    assert chosen("True", "cpu")  # as an override gives it
    assert not chosen("false", "cuda")
    with pytest.raises(InputError, match=r"train\.compile is 'yes'"):
        chosen("yes", "cpu")
    assert chosen(True, "cuda", mode="reduce-overhead") == "reduce-overhead"
    assert not chosen("auto", "cpu", mode="reduce-overhead")
    with pytest.raises(InputError, match=r"train\.compile_mode is 'fast'; use one of default"):
        chosen("auto", "cpu", mode="fast")
    with pytest.raises(InputError, match=r"'reduce-overhead', which records CUDA graphs, on .*cpu"):
        chosen(True, "cpu", mode="reduce-overhead")


@pytest.mark.parametrize(("mode", "marks"), [("default", 0), ("reduce-overhead", 4)])
def test_steps_with_cuda_graphs_are_told_apart(mode, marks, monkeypatch):
    """Each forward and backward pass, of which there are two in a step, begins a new one."""
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    model = small_model()
    schedules = Schedules(4, iters_per_epoch=2, total_iters=8)
    trainer = PretrainTrainer(
        model, batches(2), build_adamw(model), schedules,
        accumulation_steps=2, records_graphs=records_graphs(mode),
    )  # fmt: skip
    trainer.max_iter = 2
    with EventStorage() as trainer.storage:
        for trainer.iter in range(2):
            trainer.run_step()
    assert len(begun) == marks


def test_the_graph_is_static_where_gradients_are_not_accumulated():
    expected = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert ddp_options(1) == {**expected, "static_graph": True}
    assert ddp_options(2) == {**expected, "static_graph": False}


def test_exported_teacher_is_complete_and_plain(tmp_path):
    model, path = small_model(), tmp_path / "teacher_backbone.pth"
    save_teacher_backbone(model, path)
    content = torch.load(path, weights_only=True)
    encoder = FLSLViT(**content["encoder"])
    encoder.load_state_dict(content["model"])
    images = torch.randn(1, 3, 48, 32)
    expected = model.teacher.backbone.forward_tokens(images)
    torch.testing.assert_close(encoder.eval().forward_tokens(images), expected)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
