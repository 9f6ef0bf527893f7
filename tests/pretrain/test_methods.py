"""Every pre-training method: steps on pictures, exact resume, an encoder that detection loads."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from tiny_methods import RECIPES, VALUES, tiny_config, tiny_method

from flsl_d2.engine.run_folder import flat_config
from flsl_d2.errors import InputError
from flsl_d2.modeling.timm_backbone import TimmBackbone
from flsl_d2.weights import build_encoder
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.hooks import save_teacher_backbone
from pretrain.methods.base import import_extra
from pretrain.optimizer import build_adamw
from pretrain.trainer import PretrainTrainer


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    files = []
    for i in range(8):
        files.append(str(folder / f"{i}.png"))
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        cv2.imwrite(files[-1], cv2.resize(coarse, (40, 32), interpolation=cv2.INTER_CUBIC))
    return files


def build(cfg, images: list[str], start: int = 0) -> PretrainTrainer:
    """Trainer of four images a step, whose loader begins with step ``start``."""
    cfg.schedules.update(total_batch_size=4, iters_per_epoch=2, total_iters=4, base_lr=0.05)
    torch.manual_seed(0)
    model = instantiate(cfg.model)
    views = instantiate(cfg.views)
    model.check_run(views, 4)
    loader = build_pretrain_loader(PretrainDataset(images, views), 4, 0, start_iter=start)
    return PretrainTrainer(model, loader, build_adamw(model), instantiate(cfg.schedules))


def train(trainer: PretrainTrainer, start: int, stop: int) -> dict[str, float]:
    trainer.start_iter, trainer.max_iter = start, stop
    with EventStorage(start) as trainer.storage:
        for trainer.iter in range(start, stop):
            trainer.run_step()
            trainer.storage.step()
        return {name: value for name, (value, _) in trainer.storage.latest().items()}


# Two methods with a ResNet are enough.
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"densecl_resnet50"}))
def test_method(name, images, tmp_path):
    """Steps change every trained weight, a run continues to the bit, and the encoder loads."""
    whole = build(tiny_config(name), images)
    before = copy.deepcopy(whole.method.state_dict())
    logged = train(whole, 0, 2)
    state = copy.deepcopy(whole.state_dict())
    weights = copy.deepcopy(whole.method.state_dict())
    logged = train(whole, 2, 3)
    assert all(math.isfinite(value) for value in logged.values())
    assert 0 < logged["feature_std"] < 2
    after = whole.method.state_dict()
    for key, parameter in whole.method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} has no part in the loss"
            assert not torch.equal(before[key], after[key]), f"{key} was not trained"

    resumed = build(tiny_config(name), images, start=2)
    resumed.method.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(resumed, 2, 3)
    for key, tensor in resumed.method.state_dict().items():
        assert torch.equal(tensor, after[key]), key

    path = tmp_path / "teacher_backbone.pth"
    save_teacher_backbone(whole.method, path)
    exported = whole.method.exported_encoder().eval()
    pictures = torch.randn(1, 3, 6 * exported.patch_size, 4 * exported.patch_size)
    if "resnet" in name:
        loaded = TimmBackbone("resnet10t", weights=str(path)).eval()
    else:
        loaded = build_encoder(str(path))
    expected = exported.forward_tokens(pictures)
    torch.testing.assert_close(loaded.forward_tokens(pictures), expected)


# One method with a ResNet is enough.
@pytest.mark.parametrize("name", sorted(RECIPES.keys() - {"densecl_resnet50", "simclr_resnet50"}))
def test_losses_keep_full_precision_beside_an_encoder_in_bf16(name, images):
    losses: list[torch.Tensor] = []
    for dtype in (None, torch.bfloat16):
        trainer = build(tiny_config(name), images)
        trainer.dtype = dtype
        trainer.method.register_forward_hook(lambda *call: losses.append(call[2][0]["loss"]))
        train(trainer, 0, 1)
    assert [loss.dtype for loss in losses] == [torch.float32, torch.float32]
    # Outputs are rounded to 1 in 256, and batch norm over four images divides by small spreads.
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", ["dino", "detcon"])
def test_method_on_device_augments_the_same_views(name, images):
    views = []
    for on_device in ("nothing", "augmentation"):
        trainer = build(tiny_config(name, f"views.on_device={on_device}"), images)
        assert math.isfinite(train(trainer, 0, 1)["loss"])
        views.append(trainer.last_batch.to_device(torch.device("cpu")).views)
        solarised = [each.solarise for each in trainer.last_batch.augmentations]
    for cpu, device, left_out in zip(*views, solarised, strict=True):
        # Roundings as in test_device_views.py; at the threshold of solarise a level decides.
        kept = ~torch.as_tensor(left_out)
        assert (cpu.float() - device.float())[kept].abs().mean() < 1.5


def test_a_teacher_leaves_out_nothing_and_norms_by_its_batch():
    method = tiny_method("densecl", "model.backbone.drop_path_rate=0.5").train()
    assert method.student.backbone.blocks[0].training
    assert not any(module.training for module in method.teacher.modules())
    resnet = tiny_method("densecl_resnet50").train().teacher
    norms = [m for m in resnet.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all(norm.training for norm in norms)


@pytest.mark.parametrize("name", ["dino", "selfpatch", "swav"])
def test_the_last_layer_is_frozen_at_first(name):
    method = tiny_method(name)
    frozen = list(method.frozen_parameters(replace(VALUES, last_layer_frozen=True)))
    assert len(frozen) == {"dino": 2, "selfpatch": 4, "swav": 1}[name]
    assert not list(method.frozen_parameters(replace(VALUES, last_layer_frozen=False)))


@pytest.mark.parametrize(
    ("name", "option", "views", "images", "message"),
    [
        ("dino", "views.num_global=1", "", 4, "num_global is 1, and DINO compares 2"),
        ("dino", "", "flsl_resnet50", 4, "DINO takes the views of MultiCropViews"),
        ("simclr", "", "", 1, "works off 1 image"),
        ("densecl", "model.queue_length=3", "", 4, "queue_length is 3, less than the 4 images"),
        (
            "droppos",
            "model.backbone.img_size=32",
            "",
            4,
            "global_size is 16, 16 tokens, and DropPos",
        ),
        ("detcon", "", "dino", 4, r"views\.segments is 'none'"),
        ("adclr", "", "dino", 4, "query crops have the size of a patch"),
        ("navit", "model.pack_tokens=15", "", 4, "pack_tokens is 15, less than the 16 tokens"),
    ],
)
def test_views_and_batches_that_do_not_fit_are_refused(name, option, views, images, message):
    cfg = tiny_config(name, *filter(None, [option]))
    cut = instantiate(tiny_config(views).views if views else cfg.views)
    with pytest.raises(InputError, match=message):
        instantiate(cfg.model).check_run(cut, images)


def test_masked_tokens_on_a_cnn_are_refused():
    cfg = tiny_config("mae")
    cfg.model.backbone = tiny_config("simclr_resnet50").model.backbone
    with pytest.raises(InputError, match="masks or drops tokens, and TimmBackbone"):
        instantiate(cfg.model)
    with pytest.raises(InputError, match="has no tokens and positions before"):
        instantiate(tiny_config("flsl_resnet50", "model.token_share=0.5").model)


@pytest.mark.parametrize("name", ["detcon", "selfpatch", "vicregl"])
def test_an_encoder_of_several_stages(name, images):
    cfg = tiny_config(name, "views.patch_size=32", "views.global_size=64")
    if "local_size" in cfg.views:
        cfg.views.local_size = 32
    swin = {"name": "swin_tiny_patch4_window7_224", "embed_dim": 24, "depths": [1, 1, 1, 1]}
    cfg.model.backbone = L(TimmBackbone)(pretrained=False, **swin)
    for head in {"head", "patch_head"} & set(cfg.model):
        cfg.model[head].in_dim = 192
    if name == "vicregl":
        cfg.model.num_matches = [1, 1]  # a local view is one token
    trainer = build(cfg, images)
    assert math.isfinite(train(trainer, 0, 1)["loss"])
    trained = [p for p in trainer.method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_a_key_that_refers_to_none_is_named():
    """The encoder of a recipe is another one, which has no patches to take the size from."""
    cfg = tiny_config("mae")
    cfg.model.backbone = {"name": "resnet18"}
    with pytest.raises(InputError, match=r"views\.patch_size refers to .*; set views\.patch_size"):
        flat_config(cfg)


def test_a_package_that_is_missing_is_named():
    with pytest.raises(InputError, match="needs the package nonsense"):
        import_extra("nonsense.loss")
