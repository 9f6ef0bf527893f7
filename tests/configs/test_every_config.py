"""Every recipe, built at full size, and run at reduced size through the engines of the tools.

A run is one step on drawn scenes, with weights written and evaluated.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image

from flsl_d2.annotations import register_coco_format
from flsl_d2.detection.train import run_lazy_detection
from flsl_d2.engine.config_files import CONFIGS_FOLDER, load_lazy_config
from flsl_d2.scenes import CLASS_NAMES, make_scenes
from pretrain.run import run_pretraining

RECIPES = sorted(
    str(path.relative_to(CONFIGS_FOLDER))
    for path in CONFIGS_FOLDER.rglob("*.py")
    if "common" not in path.parts
)
PRETRAINING = [
    name for name in RECIPES if "tools/pretrain_net" in (CONFIGS_FOLDER / name).read_text()
]
DETECTION = [name for name in RECIPES if name not in PRETRAINING]
SEMANTIC = [name for name in DETECTION if "semantic" in name]
SIDE = 64
# What augmentations and models take as a size in pixels.
SIZES = {
    "short_edge_length": SIDE,
    "max_size": 96,
    "target_height": SIDE,
    "target_width": SIDE,
    "crop_size": SIDE,
}
WIDTH_KEYS = ("channels", "in_channels", "out_channels", "conv_dims", "fc_dims")
WIDTHS = {256: 32, 1024: 64, 128: 32, 64: 64}
# Encoders' parameters in millions, patch and position tables included (ViT-S: 22).
ENCODERS = {"mini": 1.23, "tiny": 5.5, "small": 21.6, "base": 85.8, "large": 303.2}
NAMED = {"t16": "tiny", "s16": "small", "s8": "small", "b16": "base", "l16": "large"}
TINY_ENCODER = {"embed_dim": 32, "depth": 5, "num_heads": 2}


def encoder_of(recipe: str) -> tuple[str, int]:
    """Size and patch that a recipe's name promises."""
    words = Path(recipe).stem.split("_")
    if recipe in PRETRAINING:
        size = words.index("vit") + 1
        return words[size], int(words[size + 1][1:])
    word = next(word for word in words if word in NAMED)
    return NAMED[word], int(word[1:])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Scenes with annotations, label images, and names with what LVIS's metadata has."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    make_scenes(root, num_train=2, num_val=1, image_size=(96, 80))
    counts = [{"id": i + 1, "image_count": i + 1} for i in range(len(CLASS_NAMES))]
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        name = f"every_config_{split}"
        annotations = root / "annotations" / f"instances_{split}.json"
        register_coco_format(name, annotations, root / split)
        MetadataCatalog.get(name).set(class_image_count=counts)
        labels = root / f"labels_{split}"
        labels.mkdir()
        for picture in (root / split).glob("*.jpg"):
            drawn = rng.choice([0, 1, 2, 255], (80, 96)).astype(np.uint8)
            Image.fromarray(drawn).save(labels / f"{picture.stem}.png")
        _register_labels(f"{name}_labels", root / split, labels)
    yield root
    for name in [n for n in DatasetCatalog.list() if n.startswith(("every_config", str(root)))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _register_labels(name: str, pictures: Path, labels: Path) -> None:
    def records() -> list[dict]:
        return [
            {"file_name": str(p), "sem_seg_file_name": str(labels / f"{p.stem}.png")}
            for p in sorted(pictures.glob("*.jpg"))
        ]

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(
        evaluator_type="sem_seg",
        stuff_classes=["sky", "grass", "road"],
        ignore_label=255,
        image_root=str(pictures),
        sem_seg_root=str(labels),
    )


def shrink(node) -> None:
    """Sizes in pixels and widths of heads, however deep they lie."""
    if isinstance(node, ListConfig):
        for value in node:
            shrink(value)
    if not isinstance(node, DictConfig):
        return
    for key in list(node):
        value = OmegaConf.select(node, str(key))
        if key in SIZES and value is not None:
            several = isinstance(value, (ListConfig, list, tuple))
            count = 2 if key == "crop_size" else 1
            node[key] = [SIZES[key]] * count if several else SIZES[key]
        elif key in WIDTH_KEYS and isinstance(value, int):
            node[key] = WIDTHS.get(value, value)
        elif key in WIDTH_KEYS:
            node[key] = [WIDTHS.get(each, each) for each in value]
        else:
            shrink(value)


def own_files(scenes: Path) -> list[str]:
    return [
        f"dataloader.{split}.dataset.{override}"
        for split, folder in (("train", "train"), ("test", "val"))
        for override in (
            f"json_file={scenes}/annotations/instances_{folder}.json",
            f"image_root={scenes}/{folder}",
        )
    ]


def names(suffix: str = "") -> list[str]:
    return [
        f"dataloader.{split}.dataset.names=every_config_{folder}{suffix}"
        for split, folder in (("train", "train"), ("test", "val"))
    ]


def small_detection_config(recipe: str, scenes: Path, output: Path) -> DictConfig:
    overrides = [
        "train.device=cpu",
        "train.max_iter=1",
        "train.seed=1",
        "train.log_period=1",
        f"train.output_dir={output}",
        "dataloader.train.total_batch_size=1",
        "dataloader.train.num_workers=0",
        "dataloader.test.num_workers=0",
        *(f"model.backbone.net.{key}={value}" for key, value in TINY_ENCODER.items()),
    ]
    if recipe in SEMANTIC:
        overrides += [*names("_labels"), "model.sem_seg_head.num_classes=3"]
    elif recipe.startswith("lvis"):
        overrides += [*names(), f"model.roi_heads.num_classes={len(CLASS_NAMES)}"]
        overrides += ["+model.roi_heads.box_predictor.fed_loss_num_classes=3"]
    else:
        overrides += own_files(scenes)
    if "rcnn" in recipe:
        overrides += [
            "model.roi_heads.batch_size_per_image=8",
            "model.proposal_generator.batch_size_per_image=16",
            "model.proposal_generator.pre_nms_topk=[50,20]",
            "model.proposal_generator.post_nms_topk=[20,10]",
        ]
    cfg = load_lazy_config(recipe, overrides)
    shrink(cfg.dataloader)
    shrink(cfg.model)
    if cfg.model.backbone.square_pad:
        cfg.model.backbone.square_pad = SIDE
    if recipe.startswith("lvis"):  # its own evaluator needs LVIS's package and files
        cfg.dataloader.evaluator = load_lazy_config(
            "coco/mask_rcnn_flsl_vit_s16_1x.py"
        ).dataloader.evaluator
    return cfg


def test_all_kinds_are_there():
    assert len(PRETRAINING) >= 6
    assert len(DETECTION) >= 18
    folders = {Path(name).parts[0] for name in RECIPES}
    assert {"coco", "lvis", "objects365", "uavdt", "ade20k", "pretrain", "demo"} <= folders


# tests/modeling/test_timm_backbone.py builds encoders of timm.
@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if not r.startswith("demo") and "resnet" not in r]
)
def test_full_size(recipe):
    cfg = load_lazy_config(recipe)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    size, patch = encoder_of(recipe)
    net = model.student.backbone if recipe in PRETRAINING else model.backbone.net
    count = sum(p.numel() for p in net.parameters()) / 1e6
    # The table has the counts of the papers, rounded to one decimal.
    assert count == pytest.approx(ENCODERS[size], rel=0.02)
    assert net.patch_size == patch
    assert net.output_shape()["last_feat"].stride == patch
    assert Path(cfg.train.output_dir).name not in ("output", "")
    if recipe in PRETRAINING:
        return
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    levels = (3, 7) if "retinanet" in recipe else (2, 5) if recipe in SEMANTIC else (2, 6)
    assert strides == {f"p{i}": 2**i for i in range(levels[0], levels[1] + 1)}
    masks = any("mask_head" in name for name, _ in model.named_parameters())
    learned = OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask", default=False)
    assert masks == ("mask_rcnn" in recipe) == learned
    if "rcnn" in recipe:
        used = cfg.model.proposal_generator.anchor_generator.strides
        assert list(used) == [strides[level] for level in cfg.model.proposal_generator.in_features]


def test_no_two_recipes_write_to_the_same_folder():
    folders = [load_lazy_config(recipe).train.output_dir for recipe in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("recipe", DETECTION)
def test_detection_trains_a_step_and_evaluates(recipe, scenes, tmp_path):
    cfg = small_detection_config(recipe, scenes, tmp_path)
    run_lazy_detection(cfg, resume=False, eval_only=False)
    logged: dict[str, float] = {}
    for line in (tmp_path / "metrics.json").read_text().splitlines():
        logged.update(json.loads(line))
    assert math.isfinite(logged["total_loss"])
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    optimizer = checkpoint["trainer"]["optimizer"]
    # AdamW has a state for those weights alone that were given a gradient.
    assert len(optimizer["state"]) == sum(len(g["params"]) for g in optimizer["param_groups"])
    first = next(iter(optimizer["state"].values()))
    assert torch.isfinite(first["exp_avg"]).all()
    assert ("sem_seg/mIoU" if recipe in SEMANTIC else "bbox/AP") in logged
    if "mask_rcnn" in recipe:
        assert "segm/AP" in logged
    if recipe.startswith("uavdt"):
        assert {"uavdt/AP70", "uavdt/mAP50"} <= logged.keys()
    if recipe.startswith("coco") and recipe not in SEMANTIC:
        assert cfg.dataloader.test.dataset.names.startswith("instances_val.json@")


# tests/pretrain/test_methods.py takes the steps of the other methods.
@pytest.mark.parametrize("recipe", [recipe for recipe in PRETRAINING if "flsl_vit" in recipe])
def test_pretraining_takes_a_step(recipe, scenes, tmp_path):
    overrides = [
        f"dataset.root={scenes}/train",
        "dataset.name=",
        "train.device=cpu",
        "train.max_iter=1",
        "train.log_period=1",
        f"train.output_dir={tmp_path}",
        "dataloader.total_batch_size=2",
        "dataloader.num_workers=0",
        "views.global_size=64",
        "views.local_size=32",
        *(f"model.backbone.{key}={value}" for key, value in TINY_ENCODER.items()),
        "model.head.num_centroids=16",
        "model.head.hidden_dim=32",
        "model.head.bottleneck_dim=8",
    ]
    run_pretraining(load_lazy_config(recipe, overrides), resume=False)
    (line,) = (tmp_path / "metrics.json").read_text().splitlines()
    assert math.isfinite(json.loads(line)["loss"])
    written = torch.load(tmp_path / "teacher_backbone.pth", weights_only=True)
    assert written["encoder"]["patch_size"] == load_lazy_config(recipe).model.backbone.patch_size
