"""Every key of the method, from the config to the step: it changes what it says, nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage

from flsl_d2.engine.config_files import load_lazy_config
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.hooks import save_teacher_backbone
from pretrain.optimizer import build_adamw
from pretrain.trainer import PretrainTrainer

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
TINY = [
    "views.global_size=64",
    "views.local_size=48",
    "model.backbone.patch_size=8",
    "model.backbone.embed_dim=24",
    "model.backbone.depth=3",
    "model.backbone.num_heads=2",
    "model.head.num_centroids=16",
    "model.head.hidden_dim=32",
    "model.head.bottleneck_dim=8",
    "schedules.teacher_momentum=[0.9,1.0]",  # so that a change of the student is seen in it
]
TOTAL = 5

# What follows from the objective's value; and from a part of it that the head has no share in.
ENCODER_LEARNT = {"gradients", "student", "teacher"}
LEARNT = {"centroid_gradients", *ENCODER_LEARNT}
TARGETS = {"loss", "loss_inter", *LEARNT}
MODES = {"loss_intra", "loss_volume", *TARGETS}

SWITCHES = {
    "views.random_pooling=False": {"queries", *MODES},
    "views.global_window=2": {"queries", *MODES},
    "views.local_window=3": {"queries", *MODES},
    "schedules.intra_weight=[0.5,0.03]": {"intra_weight", "loss", *ENCODER_LEARNT},
    "schedules.self_scale=[0.05,0.1]": {"self_scale", *MODES},
    "schedules.cross_scale=[0.8,0.2]": {"cross_scale", *TARGETS},
    "schedules.teacher_temp=[0.02,0.07]": {"teacher_temp", *TARGETS},
    "schedules.teacher_temp_epochs=1": {"teacher_temp", *TARGETS},
    "schedules.teacher_momentum=[0.5,1.0]": {"teacher_momentum", "teacher"},
    "schedules.weight_decay=[0.2,0.4]": {"weight_decay", "student", "teacher"},
    "schedules.base_lr=0.1": {"lr", "student", "teacher"},
    "schedules.warmup_fraction=0.8": {"lr", "student", "teacher"},
    "schedules.frozen_last_layer_epochs=9": {
        "last_layer_frozen",
        "centroid_gradients",
        "student",
        "teacher",
    },
    "schedules.frozen_encoder_fraction=0.9": {
        "encoder_frozen",
        "lr",
        "gradients",
        "student",
        "teacher",
    },
    "schedules.mixture_bias=0.5": {"own_attention"},  # one stage: a schedule without effect
    "model.loss.inter_weight=0.5": {"loss", *LEARNT},
    "model.loss.volume_weight=1.0": {"loss", *LEARNT},
    "model.loss.volume_weight=0.0": {"loss_volume", "loss", *LEARNT},
    "model.loss.student_temp=0.2": {"loss_inter", "loss_volume", "loss", *LEARNT},
    "model.loss.sinkhorn_steps=3": TARGETS,
    "views.flip=1.0": {"views", "regions", *MODES},
    "views.photometry=0.5": {"views", *MODES},
    "model.partner=place": TARGETS,
    "model.position_drop=1.0": MODES,
    "model.partner=place model.position_share=0.01": TARGETS,
    "model.partner=place model.image_share=0.01": TARGETS,
    "model.token_share=0.5": MODES,
    "model.partner=place model.token_share=0.5 model.prediction_blocks=1": MODES,
    "model.head.learn_scale=True": {"gradients", "student", "teacher"},
    "train.clip_mode=global": LEARNT,
    "train.clip_mode=none": LEARNT,
    "train.clip_norm=0.001": LEARNT,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    files = []
    for i in range(8):
        files.append(str(folder / f"{i}.png"))
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        cv2.imwrite(files[-1], cv2.resize(coarse, (112, 80), interpolation=cv2.INTER_CUBIC))
    return files


def quantities(images: list[str], *overrides: str, at: int = 2) -> dict[str, object]:
    """Everything that a step in the middle of a run reads, computes and changes."""
    cfg = load_lazy_config(CONFIG, [*TINY, "schedules.frozen_last_layer_epochs=0", *overrides])
    cfg.schedules.update(total_batch_size=4, iters_per_epoch=1, total_iters=TOTAL)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    # Away from its start, where biases are zero, centroids even and gradients small.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in (model.student, model.teacher):
            for name, parameter in network.named_parameters():
                if "weight_g" not in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=0.3)
    views = instantiate(cfg.views)
    views.keep_crops = model.needs_crops
    loader = build_pretrain_loader(PretrainDataset(images, views), 4, 0, start_iter=at)
    batch = next(iter(loader))
    trainer = PretrainTrainer(
        model,
        [batch],
        build_adamw(model),
        instantiate(cfg.schedules),
        clip_norm=cfg.train.clip_norm,
        clip_mode=cfg.train.clip_mode,
    )
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1.0  # AdamW's first step would hardly depend on a gradient's length
    trainer.iter = at
    with EventStorage(at) as trainer.storage:
        trainer.run_step()
        logged = trainer.storage.latest()
    beside = ("data_time", "grad_norm", "feature_std")
    seen: dict[str, object] = {
        name: value for name, (value, _) in logged.items() if name not in beside
    }
    head = dict(model.student.head.last_layer.named_parameters())
    seen.update(views=batch.views, queries=batch.queries, crops=batch.crops)
    seen.update(regions=[region.tolist() for region in batch.regions])
    seen["gradients"] = {
        name: p.grad for name, p in model.student.named_parameters() if "last_layer" not in name
    }
    seen["gradients"]["scale"] = head["weight_g"].requires_grad
    seen["centroid_gradients"] = {"": head["weight_v"].grad}
    seen["student"] = dict(model.student.named_parameters())
    seen["teacher"] = dict(model.teacher.named_parameters())
    return seen


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def changed(before: dict[str, object], after: dict[str, object]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not same(before[name], after[name])}


@pytest.fixture(scope="module")
def default(images) -> dict[str, object]:
    seen = quantities(images)
    assert not changed(seen, quantities(images)), "a step must be repeatable to mean anything here"
    return seen


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch[:48])
def test_switch(images, default, switch):
    assert changed(default, quantities(images, *switch.split())) == SWITCHES[switch]


def test_every_key_of_the_method_is_tested():
    cfg = load_lazy_config(CONFIG, [])
    tested = {part.split("=")[0] for switch in SWITCHES for part in switch.split()}
    elsewhere = {
        # what is trained on, not the method's own switches
        "schedules.final_lr",
        "model.backbone",
        "model.head",
        "model.loss",
        "model.pack_views",  # changes speed and no result: test_golden, test_packing
        "model.loss.num_centroids",
        "model.previous_stage",
    }
    groups = {"schedules": cfg.schedules, "model": cfg.model, "model.loss": cfg.model.loss}
    for group, node in groups.items():
        for key in node:
            name = f"{group}.{key}"
            assert key == "_target_" or name in tested | elsewhere, f"{name} has no test"


class TestPreviousStage:
    @pytest.fixture
    def weights(self, tmp_path) -> str:
        cfg = load_lazy_config(CONFIG, [*TINY, "model.backbone.embed_dim=32"])
        torch.manual_seed(3)
        model = instantiate(cfg.model)
        with torch.no_grad():
            for parameter in model.teacher.backbone.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.3)
        path = tmp_path / "teacher_backbone.pth"
        save_teacher_backbone(model, path)
        return str(path)

    def test_it_changes_the_targets_and_keeps_the_crops(self, images, default, weights):
        after = quantities(images, f"model.previous_stage.weights={weights}")
        assert changed(default, after) == {"crops", *TARGETS}

    def test_own_attention_alone_is_training_in_one_stage(self, images, default, weights):
        """At the end of a run with bias 0 the previous stage has no share left."""
        late = quantities(images, "schedules.mixture_bias=0.0", at=TOTAL)
        staged = quantities(
            images,
            "schedules.mixture_bias=0.0",
            f"model.previous_stage.weights={weights}",
            at=TOTAL,
        )
        assert late["own_attention"] == 1.0
        # Sums of float32 in another order.
        assert late["loss"] == pytest.approx(staged["loss"], rel=1e-5)

    @pytest.mark.parametrize(
        "key", ["scale=0.4", "sharpness=10.0", "num_blocks=1"], ids=lambda key: key
    )
    def test_its_keys_change_the_targets_alone(self, images, weights, key):
        stage = f"model.previous_stage.weights={weights}"
        before = quantities(images, stage)
        after = quantities(images, stage, f"model.previous_stage.{key}")
        assert changed(before, after) == TARGETS

    def test_bias_moves_the_mixture(self, images, weights):
        stage = f"model.previous_stage.weights={weights}"
        before = quantities(images, stage)
        after = quantities(images, stage, "schedules.mixture_bias=0.5")
        assert before["own_attention"] == 0.0
        assert changed(before, after) == {"own_attention", *TARGETS}
