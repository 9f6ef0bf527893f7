"""What recipes take from their sources, and that children change nothing else."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from detectron2.config import instantiate
from omegaconf import OmegaConf
from recipes import FLSL, LONG, ONE_X, TEXTS, recipe

from flsl_d2.engine.config_files import load_lazy_config


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
    ours, theirs = (flat(recipe(name)) for name in (child, parent))
    return {
        key.removeprefix("model.backbone.").removeprefix("net.")
        for key in ours.keys() | theirs.keys()
        if ours.get(key, "absent") != theirs.get(key, "absent")
    } - {"train.output_dir"}


SIZE, PATCH = "embed_dim num_heads", "patch_size use_act_checkpoint"
DEEP = f"{SIZE} depth drop_path_rate optimizer.params.lr_factor_func.decay_rate"


@pytest.mark.parametrize(
    ("child", "parent", "differences"),
    [
        ("pretrain/flsl_vit_tiny_p16_in1k.py", FLSL, SIZE),
        ("pretrain/flsl_vit_small_p8_in1k.py", FLSL, PATCH),
        ("pretrain/flsl_vit_base_p16_in1k.py", FLSL, SIZE),
        ("pretrain/flsl_vit_large_p16_in1k.py", FLSL, f"{SIZE} depth use_act_checkpoint"),
        ("coco/mask_rcnn_flsl_vit_s8_1x.py", ONE_X, PATCH),
        ("coco/mask_rcnn_flsl_vit_b16_1x.py", ONE_X, SIZE),
        ("coco/mask_rcnn_flsl_vit_s8_100ep.py", LONG, PATCH),
        ("coco/mask_rcnn_flsl_vit_b16_100ep.py", LONG, SIZE),
        ("coco/mask_rcnn_flsl_vit_l16_100ep.py", LONG, DEEP),
    ],
)
def test_children_hold_their_differences_alone(child, parent, differences):
    assert changed(child, parent) == {*differences.split()}


def test_lvis_is_vitdets():
    cfg = recipe("lvis/mask_rcnn_flsl_vit_b16_100ep.py")
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
    cfg = recipe("coco/cascade_mask_rcnn_flsl_vit_b16_100ep.py")
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
        assert recipe(name).model.backbone.net.depth == depth
        assert recipe(name).optimizer.params.lr_factor_func.decay_rate == decay


def test_the_semantic_schedule_falls_linearly_to_0():
    cfg = recipe("ade20k/semantic_fpn_flsl_vit_s16_40k.py")
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0) == pytest.approx(1e-6)
    assert multiplier(1500 / 40000) == pytest.approx(1 - 1500 / 40000)
    assert multiplier(20000 / 40000) == pytest.approx(0.5)
    assert multiplier(39999 / 40000) == pytest.approx(1 / 40000)
    assert cfg.train.max_iter == 40000
    sizes = list(cfg.dataloader.train.mapper.augmentations[0].short_edge_length)
    assert (min(sizes), max(sizes), len(sizes)) == (256, 1024, 16)
    assert cfg.dataloader.train.mapper.image_format == "RGB"


# Recipe, the recipe whose values it takes where it names none, source, values. Sources are files
# and lines of the authors' repositories at the commits of tests/golden/make_methods.py.
METHOD_VALUES = """
dino | | main_dino.py:82-105 | schedules.base_lr=5e-4 schedules.final_lr=1e-6 schedules.warmup_fraction=10/800 schedules.weight_decay=(0.04,0.4) schedules.frozen_last_layer_epochs=1 train.clip_norm=3.0 train.clip_mode=per_tensor train.betas=(0.9,0.999) model.backbone.drop_path_rate=0.1 dataloader.total_batch_size=1024
dino | | main_dino.py:55-61,108-115 | schedules.teacher_momentum=(0.996,1.0) views.num_global=2 views.num_local=8 views.global_scale=(0.4,1.0) views.local_scale=(0.05,0.4) model.head.num_centroids=65536
dino | | README.md:188-197 | schedules.teacher_temp=(0.04,0.07) schedules.teacher_temp_epochs=30 model.head.learn_scale=True
dino | | main_dino.py:357-460 | model.student_temp=0.1 model.center_momentum=0.9 views.flip=0.5 views.jitter=(0.4,0.4,0.2,0.1) views.jitter_probability=0.8 views.grey=0.2 views.blur=(1.0,0.1,0.5) views.solarise=(0.0,0.2,0.0)
dino | | vision_transformer.py:257 | model.head.hidden_dim=2048 model.head.bottleneck_dim=256
dino | | ours | train.epochs=800 views.global_size=224 views.local_size=96
adclr | dino | ours (no public code) | views.num_local=10 views.local_size=16 views.global_scale=(0.25,1.0) views.local_scale=(0.05,0.25) model.query_weight=0.5 model.student_temp=0.1 model.center_momentum=0.9 model.head.num_centroids=65536 model.head.hidden_dim=2048 model.head.bottleneck_dim=256 model.head.learn_scale=True
ibot | dino | README.md:60-77 | views.num_local=10 views.global_scale=(0.25,1.0) views.local_scale=(0.05,0.25) model.head.num_centroids=8192 model.head.learn_scale=True model.mask_share=(0.1,0.5)
ibot | dino | main_ibot.py:480-491; models/head.py | model.student_temp=0.1 model.center_momentum=0.9 model.patch_weight=1.0 model.head.hidden_dim=2048 model.head.bottleneck_dim=256
selfpatch | dino | main_selfpatch.py:57-119 | schedules.warmup_fraction=10/300 schedules.teacher_temp=(0.04,0.04) train.epochs=300 views.global_scale=(0.25,1.0) views.local_scale=(0.05,0.25) model.head.num_centroids=65536 model.head.learn_scale=False model.patch_head.learn_scale=False model.patch_head.num_centroids=4096 model.num_neighbours=4
selfpatch | dino | main_selfpatch.py:408-445 | model.patch_weight=0.1 model.student_temp=0.1 model.center_momentum=0.9 model.aggregation_depth=2 model.head.hidden_dim=2048 model.head.bottleneck_dim=256 model.patch_head.hidden_dim=2048 model.patch_head.bottleneck_dim=256
mae | dino | PRETRAIN.md:9-15; main_pretrain.py | schedules.base_lr=1.5e-4 schedules.final_lr=0.0 schedules.warmup_fraction=40/800 schedules.weight_decay=(0.05,0.05) train.clip_mode=none dataloader.total_batch_size=4096 model.mask_share=0.75 model.backbone.drop_path_rate=0.0 model.normalise_pixels=True model.decoder_dim=512 model.decoder_depth=8 model.decoder_heads=16
mae | dino | main_pretrain.py:123-128,180 | train.betas=(0.9,0.95) views.num_global=1 views.num_local=0 views.global_scale=(0.2,1.0) views.jitter_probability=0.0 views.grey=0.0 views.blur=(0.0,0.0,0.0) views.solarise=(0.0,0.0,0.0)
droppos | mae | PRETRAIN.md:9-30; main_pretrain.py:108 | schedules.warmup_fraction=10/800 train.clip_norm=5.0 train.clip_mode=per_tensor model.mask_share=0.75 model.drop_share=0.75 model.smoothing=1.0 model.attention_temp=0.1 model.decoder_dim=512 model.decoder_depth=2 model.decoder_heads=16
beit | mae | beit/README.md:136-141; run_beit_pretraining.py:75,85 | schedules.base_lr=1.5e-3/8 schedules.final_lr=1e-5 schedules.warmup_fraction=10/800 train.clip_norm=3.0 train.clip_mode=global train.betas=(0.9,0.999) dataloader.total_batch_size=2048 model.backbone.drop_path_rate=0.1 model.mask_share=75/196 model.num_codes=8192 model.tokenizer=''
beit | mae | beit/datasets.py:33-45 | views.jitter_probability=1.0 views.jitter=(0.4,0.4,0.4,0.0) views.global_scale=(0.08,1.0)
maskfeat | mae | configs/masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml | schedules.base_lr=2e-4 schedules.final_lr=1e-6 schedules.warmup_fraction=30/300 train.epochs=300 train.clip_norm=0.02 train.clip_mode=global train.betas=(0.9,0.999) dataloader.total_batch_size=2048 views.global_scale=(0.5,1.0) model.mask_share=0.4
maskfeat | mae | slowfast/models/masked.py:48-57 | model.num_orientations=9 model.cell_size=8
rotation | mae | ours | train.epochs=100 views.flip=0.0 dataloader.total_batch_size=512
context | mae | ours | train.epochs=100 views.flip=0.0 dataloader.total_batch_size=512 model.hidden_dim=4096
jigsaw | mae | ours | train.epochs=100 views.grey=0.3 dataloader.total_batch_size=512 model.hidden_dim=4096 model.num_permutations=1000
colorization | mae | ours | train.epochs=100 dataloader.total_batch_size=512
moco_v3 | dino | README.md:112-121; main_moco.py:95-104 | schedules.base_lr=1.5e-4 schedules.final_lr=0.0 schedules.warmup_fraction=40/300 schedules.weight_decay=(0.1,0.1) schedules.teacher_momentum=(0.99,1.0) train.epochs=300 train.clip_mode=none model.temperature=0.2 model.freeze_patches=True model.hidden_dim=4096 model.output_dim=256 model.backbone.drop_path_rate=0.0
moco_v3 | dino | main_moco.py:117,263-281 | views.num_local=0 views.global_scale=(0.08,1.0)
simclr | moco_v3 | tf2/run.py:184; tf2/data_util.py (colour strength 1, blur 0.5); paper, Sec. 2.1 (head) | views.jitter=(0.8,0.8,0.8,0.2) views.blur=(0.5,0.5,0.5) views.solarise=(0.0,0.0,0.0) model.temperature=0.1 model.hidden_dim=2048 model.output_dim=128
swav | moco_v3 | scripts/swav_800ep_pretrain.sh; src/multicropdataset.py | views.num_local=6 views.global_scale=(0.14,1.0) views.local_scale=(0.05,0.14) views.jitter=(0.8,0.8,0.8,0.2) views.blur=(0.5,0.5,0.5) views.solarise=(0.0,0.0,0.0) model.num_prototypes=3000 model.hidden_dim=2048 model.output_dim=128 model.temperature=0.1 model.epsilon=0.05
vicreg | moco_v3 | main_vicreg.py:38-60 | model.hidden_dim=8192 model.output_dim=8192 model.invariance_weight=25.0 model.variance_weight=25.0 model.covariance_weight=1.0
vicregl | dino | main_vicregl.py:30-90 | schedules.warmup_fraction=10/400 schedules.weight_decay=(0.05,0.05) train.clip_mode=none dataloader.total_batch_size=512 views.num_local=6 views.local_scale=(0.08,0.4) model.hidden_dim=8192 model.output_dim=8192 model.local_dim=512 model.alpha=0.75 model.num_matches=(20,4) model.all_by_feature=True
vicregl | dino | paper, Sec. 4 | train.epochs=400
densecl | dino | configs/selfsup/densecl/densecl_imagenet_200ep.py | schedules.teacher_momentum=(0.999,0.999) schedules.warmup_fraction=10/200 train.epochs=200 dataloader.total_batch_size=256 views.num_local=0 views.global_scale=(0.2,1.0) views.jitter=(0.4,0.4,0.4,0.1) views.blur=(0.5,0.5,0.5) views.solarise=(0.0,0.0,0.0) model.hidden_dim=2048 model.output_dim=128 model.queue_length=65536 model.temperature=0.2 model.dense_weight=0.5
detcon | moco_v3 | detcon_b_config.py; detcon_b.py:95; utils/losses.py:33 | schedules.teacher_momentum=(0.996,1.0) views.segments=felzenszwalb model.hidden_dim=4096 model.output_dim=256 model.num_segments=16 model.temperature=0.1
detcon | moco_v3 | generate_fh_masks_for_imagenet.py:109-111 | views.segment_scale=1000.0 views.segment_size=1000
"""
HELD = ("schedules.", "views.", "model.", "train.epochs", "train.clip", "train.betas")
HELD += ("dataloader.total_batch",)
# What FLSL alone uses, and what describes the encoder or the machine.
FREE = ("_target_", "intra_weight", "_scale.", "self_scale", "cross_scale", "mixture_bias")
FREE += ("frozen_encoder", "schedules.total", "per_epoch", "on_device", "in_dim", "patch_size")


def method_values() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for line in METHOD_VALUES.strip().splitlines():
        name, parent, source, values = (part.strip() for part in line.split("|"))
        assert source
        if name not in table:
            kept = table.get(parent, {}).items()
            own = "model.backbone."
            table[name] = {k: v for k, v in kept if not k.startswith("model.") or own in k}
        for pair in values.split():
            key, _, text = pair.partition("=")
            top, _, bottom = text.partition("/")
            value = (
                text
                if text.isidentifier() and text not in ("True", "False")
                else ast.literal_eval(top)
            )
            value = value / ast.literal_eval(bottom) if bottom else value
            table[name][key] = list(value) if isinstance(value, tuple) else value
    return table


@pytest.mark.parametrize("name", sorted(method_values()))
def test_values_of_a_methods_recipe(name):
    """Every value of a recipe has its row, so that none is changed by the way."""
    cfg = load_lazy_config(f"pretrain/{name}_vit_small_p16_in1k.py")
    OmegaConf.resolve(cfg.views)
    found = {
        key: value
        for key, value in flat(cfg).items()
        if key.startswith(HELD) and not any(free in key for free in FREE)
    }
    encoder = "model.backbone."
    found = {k: v for k, v in found.items() if encoder not in k or "drop_path" in k}
    assert found == method_values()[name]


def test_every_method_has_its_values():
    recipes = {name for name in TEXTS if "_vit_small_" in name}
    named = {f"pretrain/{name}_vit_small_p16_in1k.py" for name in method_values()}
    assert not {name for name in recipes - named if "flsl" not in name and "navit" not in name}
