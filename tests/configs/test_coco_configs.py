"""The detection configs: both kinds build the same detector, recipe and input."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from recipes import LONG, ONE_X, YAML, recipe

from flsl_d2.detection.solver import build_yaml_optimizer, layer_decay
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import FLSLViT


@pytest.fixture(scope="module")
def lazy():
    cfg = load_lazy_config(ONE_X)
    cfg.optimizer.params.model = instantiate(cfg.model)
    return cfg


@pytest.fixture(scope="module")
def yaml():
    return load_yaml_config(YAML, ["MODEL.DEVICE", "cpu"])


@pytest.fixture(scope="module")
def yaml_model(yaml):
    return build_model(yaml)


def by_name(model, optimizer) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (round(group["lr"], 12), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_vit_s16(lazy):
    net = lazy.optimizer.params.model.backbone.net
    wanted = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "img_size": 224}
    assert wanted.items() <= net.architecture.items()
    windows = [block.window_size for block in net.blocks]
    assert [i for i, size in enumerate(windows) if size == 0] == [2, 5, 8, 11]
    assert set(windows) == {0, 14}


def test_yaml_and_lazy_config_build_the_same_detector(lazy, yaml_model):
    ours, theirs = lazy.optimizer.params.model.state_dict(), yaml_model.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    model = lazy.optimizer.params.model
    model.load_state_dict(theirs)
    image = torch.randint(0, 256, (3, 200, 160)).float()
    inputs = [{"image": image, "height": 200, "width": 160}]
    for detector in (model, yaml_model):
        detector.eval()
        detector.roi_heads.box_predictor.test_score_thresh = 0.0
        detector.roi_heads.box_predictor.test_topk_per_image = 5
        detector.proposal_generator.post_nms_topk[False] = 20  # 1000 take long
    with torch.no_grad():
        a, b = model(inputs)[0]["instances"], yaml_model(inputs)[0]["instances"]
    assert len(a) == 5
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_yaml_and_lazy_config_optimise_alike(lazy, yaml, yaml_model):
    ours, theirs = instantiate(lazy.optimizer), build_yaml_optimizer(yaml, yaml_model)
    assert type(ours) is type(theirs) is torch.optim.AdamW
    assert ours.defaults["fused"]
    assert theirs.defaults["fused"]
    rates = by_name(lazy.optimizer.params.model, ours)
    assert rates == by_name(yaml_model, theirs)
    assert rates["backbone.net.blocks.11.mlp.fc1.weight"] == (round(1e-4 * 0.7, 12), 0.1)
    assert rates["backbone.net.patch_embed.proj.weight"] == (round(1e-4 * 0.7**13, 12), 0.1)
    assert rates["backbone.net.blocks.0.norm1.weight"][1] == 0
    assert rates["roi_heads.box_predictor.cls_score.weight"] == (1e-4, 0.1)
    scheduler = DefaultTrainer.build_lr_scheduler(yaml, theirs)
    multiplier = instantiate(lazy.lr_multiplier)
    for step in (0, 10, 999, 1000, 59999, 60000, 82499, 82500, 89999):
        scheduler.last_epoch = step
        assert scheduler.get_lr()[-1] / scheduler.base_lrs[-1] == pytest.approx(
            multiplier(step / lazy.train.max_iter)
        )


def test_gradients_that_are_clipped_are_unscaled_first(yaml):
    """A fused optimiser divides by the scale of float16 gradients behind the clipping."""
    yaml = yaml.clone()
    yaml.defrost()
    yaml.SOLVER.CLIP_GRADIENTS.ENABLED = True
    assert not build_yaml_optimizer(yaml, torch.nn.Linear(1, 1)).defaults["fused"]


def test_yaml_and_lazy_config_see_the_same_images(lazy, yaml):
    for is_train, node in ((True, lazy.dataloader.train), (False, lazy.dataloader.test)):
        ours = instantiate(node.mapper)
        theirs = DatasetMapper(yaml, is_train=is_train)
        assert ours.image_format == theirs.image_format == "RGB"
        resizes = [m.augmentations.augs[0] for m in (ours, theirs)]
        assert list(resizes[0].short_edge_length) == list(resizes[1].short_edge_length)
        assert (resizes[0].max_size, len(ours.augmentations.augs)) == (1333, 1 + is_train)
        assert resizes[1].max_size == 1333
    assert lazy.dataloader.train.total_batch_size == yaml.SOLVER.IMS_PER_BATCH == 16
    assert lazy.train.max_iter == yaml.SOLVER.MAX_ITER == 90000
    assert lazy.dataloader.train.dataset.names == yaml.DATASETS.TRAIN[0]


def test_the_long_recipe_is_vitdets():
    cfg = recipe(LONG)
    multiplier = instantiate(cfg.lr_multiplier)
    iters = cfg.train.max_iter
    steps = {0: 0.001, 250: 1.0, 163888: 1.0, 163889: 0.1, 177545: 0.1, 177546: 0.01}
    for step, value in steps.items():
        assert multiplier(step / iters) == pytest.approx(value)
    assert (iters, cfg.dataloader.train.total_batch_size) == (184375, 64)
    assert cfg.model.backbone.square_pad == 1024
    names = [a._target_.__name__ for a in cfg.dataloader.train.mapper.augmentations]
    assert names == ["RandomFlip", "ResizeScale", "FixedSizeCrop"]


def test_loading_one_recipe_leaves_the_other_as_it_is():
    before = OmegaConf.to_container(load_lazy_config(ONE_X).dataloader.train)
    load_lazy_config(LONG)
    assert OmegaConf.to_container(load_lazy_config(ONE_X).dataloader.train) == before


def test_a_shorter_run_keeps_the_shape_of_its_schedule():
    multiplier = instantiate(load_lazy_config(ONE_X, ["train.max_iter=12"]).lr_multiplier)
    values = [round(multiplier(step / 12), 6) for step in range(12)]
    assert values == [0.001] + [1.0] * 7 + [0.1] * 3 + [0.01]


def test_layer_decay_follows_depth():
    detector = torch.nn.Module()
    detector.backbone = FLSLViT(embed_dim=8, num_heads=1, depth=4)
    factor = layer_decay(0.5)(detector)
    assert factor("backbone.net.patch_embed.proj.weight") == 0.5**5
    assert [factor(f"backbone.net.blocks.{i}.norm1.weight") for i in range(4)] == [
        0.5 ** (4 - i) for i in range(4)
    ]
    assert factor("roi_heads.mask_head.deconv.weight") == 1
