"""What recipes take from their sources, and that children change nothing else."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf

from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.modeling import FLSLViT

ROOT = "pretrain/flsl_vit_small_p16_in1k.py"
ONE_X = "coco/mask_rcnn_flsl_vit_s16_1x.py"
LONG = "coco/mask_rcnn_flsl_vit_s16_100ep.py"


def flat(node, prefix: str = "") -> dict:
    """Dotted keys and values, unresolved."""
    if not OmegaConf.is_config(node):
        return {prefix: node}
    if OmegaConf.is_list(node):
        return {prefix: OmegaConf.to_container(node, resolve=False)}
    values: dict = {}
    for key in node:
        child = node._get_node(key)
        inner = child if OmegaConf.is_config(child) else child._value()
        values.update(flat(inner, f"{prefix}.{key}" if prefix else key))
    return values


def changed(child: str, parent: str) -> set[str]:
    ours, theirs = (flat(load_lazy_config(name)) for name in (child, parent))
    return {
        key.removeprefix("model.backbone.").removeprefix("net.")
        for key in ours.keys() | theirs.keys()
        if ours.get(key, "absent") != theirs.get(key, "absent")
    } - {"train.output_dir"}


@pytest.mark.parametrize(
    ("child", "parent", "differences"),
    [
        ("pretrain/flsl_vit_tiny_p16_in1k.py", ROOT, {"embed_dim", "num_heads"}),
        ("pretrain/flsl_vit_small_p8_in1k.py", ROOT, {"patch_size", "use_act_checkpoint"}),
        ("pretrain/flsl_vit_base_p16_in1k.py", ROOT, {"embed_dim", "num_heads"}),
        (
            "pretrain/flsl_vit_large_p16_in1k.py",
            ROOT,
            {"embed_dim", "num_heads", "depth", "use_act_checkpoint"},
        ),
        ("coco/mask_rcnn_flsl_vit_s8_1x.py", ONE_X, {"patch_size", "use_act_checkpoint"}),
        ("coco/mask_rcnn_flsl_vit_b16_1x.py", ONE_X, {"embed_dim", "num_heads"}),
        ("coco/mask_rcnn_flsl_vit_s8_100ep.py", LONG, {"patch_size", "use_act_checkpoint"}),
        ("coco/mask_rcnn_flsl_vit_b16_100ep.py", LONG, {"embed_dim", "num_heads"}),
        (
            "coco/mask_rcnn_flsl_vit_l16_100ep.py",
            LONG,
            {"embed_dim", "num_heads", "depth", "drop_path_rate"}
            | {"optimizer.params.lr_factor_func.decay_rate"},
        ),
    ],
)
def test_children_hold_their_differences_alone(child, parent, differences):
    assert changed(child, parent) == differences


def test_lvis_is_vitdets():
    cfg = load_lazy_config("lvis/mask_rcnn_flsl_vit_b16_100ep.py")
    iters = cfg.train.max_iter
    assert (iters, cfg.optimizer.lr, cfg.dataloader.train.total_batch_size) == (156250, 2e-4, 64)
    multiplier = instantiate(cfg.lr_multiplier)
    # Within a step of 138889 and 150463.
    steps = {0: 0.001, 250: 1.0, 138888: 1.0, 138890: 0.1, 150462: 0.1, 150464: 0.01}
    for step, value in steps.items():
        assert multiplier(step / iters) == pytest.approx(value), step
    predictor = cfg.model.roi_heads.box_predictor
    assert (predictor.test_score_thresh, predictor.test_topk_per_image) == (0.02, 300)
    assert predictor.use_sigmoid_ce
    assert predictor.use_fed_loss
    assert predictor.num_classes == cfg.model.roi_heads.mask_head.num_classes == 1203
    assert instantiate(predictor.get_fed_loss_cls_weights)().shape == (1203,)


def test_cascade_is_vitdets():
    cfg = load_lazy_config("coco/cascade_mask_rcnn_flsl_vit_b16_100ep.py")
    heads = cfg.model.roi_heads
    assert [m.thresholds for m in heads.proposal_matchers] == [[0.5], [0.6], [0.7]]
    assert all(p.cls_agnostic_bbox_reg and p.num_classes == 80 for p in heads.box_predictors)
    assert [list(h.conv_dims) for h in heads.box_heads] == [[256] * 4] * 3
    assert [(list(h.fc_dims), h.conv_norm) for h in heads.box_heads] == [([1024], "LN")] * 3
    pair = (f"coco/{kind}mask_rcnn_flsl_vit_b16_1x.py" for kind in ("cascade_", ""))
    assert {key.rpartition("roi_heads")[0] for key in changed(*pair)} == {"model."}
    assert cfg.model.backbone.square_pad == 1024


def test_layer_decay_follows_the_encoders_depth():
    for name, depth, decay in (
        ("coco/mask_rcnn_flsl_vit_l16_100ep.py", 24, 0.8),
        ("coco/retinanet_flsl_vit_s16_1x.py", 12, 0.7),
        ("ade20k/semantic_fpn_flsl_vit_s16_40k.py", 12, 1.0),
    ):
        cfg = load_lazy_config(name)
        detector = torch.nn.Module()
        detector.backbone = torch.nn.Module()
        detector.backbone.net = FLSLViT(embed_dim=8, num_heads=1, depth=depth)
        assert cfg.model.backbone.net.depth == depth
        factor = instantiate(cfg.optimizer.params.lr_factor_func)(detector)
        assert factor("backbone.net.patch_embed.proj.weight") == pytest.approx(decay ** (depth + 1))
        last = factor(f"backbone.net.blocks.{depth - 1}.norm1.weight")
        assert last == pytest.approx(decay)


def test_the_semantic_schedule_falls_linearly_to_0():
    cfg = load_lazy_config("ade20k/semantic_fpn_flsl_vit_s16_40k.py")
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0) == pytest.approx(1e-6)
    assert multiplier(1500 / 40000) == pytest.approx(1 - 1500 / 40000)
    assert multiplier(20000 / 40000) == pytest.approx(0.5)
    assert multiplier(39999 / 40000) == pytest.approx(1 / 40000)
    assert cfg.train.max_iter == 40000
    sizes = list(cfg.dataloader.train.mapper.augmentations[0].short_edge_length)
    assert (min(sizes), max(sizes), len(sizes)) == (256, 1024, 16)
    assert cfg.dataloader.train.mapper.image_format == "RGB"
