"""Every recipe, built at full size, and run at reduced size through the engines of the tools.

A run is one step on drawn scenes, with weights written and evaluated.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from recipes import DETECTION, ONE_X, PRETRAINING, SEMANTIC, TEXTS, recipe

from flsl_d2.annotations import register_coco_format
from flsl_d2.detection.train import run_lazy_detection
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.scenes import CLASS_NAMES, make_scenes
from pretrain.run import run_pretraining

SIDE = 64
# What augmentations and models take as a size in pixels.
SIZES = {"short_edge_length": SIDE, "max_size": 96, "crop_size": SIDE}
SIZES |= {"target_height": SIDE, "target_width": SIDE}
WIDTH_KEYS = ("channels", "in_channels", "out_channels", "conv_dims", "fc_dims")
WIDTHS = {256: 32, 1024: 64, 128: 32, 64: 64}
# Encoders' parameters in millions, patch and position tables included (ViT-S: 22).
ENCODERS = {"mini": 1.23, "tiny": 5.5, "small": 21.6, "base": 85.8, "large": 303.2}
NAMED = {"t16": "tiny", "s16": "small", "s8": "small", "b16": "base", "l16": "large"}
TINY_ENCODER = {"embed_dim": 32, "depth": 5, "num_heads": 2}


def encoder_of(name: str) -> tuple[str, int]:
    """Size and patch that a recipe's name promises."""
    words = Path(name).stem.split("_")
    if name in PRETRAINING:
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
        name, labels = f"every_config_{split}", root / f"labels_{split}"
        register_coco_format(name, root / f"annotations/instances_{split}.json", root / split)
        MetadataCatalog.get(name).set(class_image_count=counts)
        labels.mkdir()
        records = []
        for picture in sorted((root / split).glob("*.jpg")):
            file = labels / f"{picture.stem}.png"
            Image.fromarray(rng.choice([0, 1, 2, 255], (80, 96)).astype(np.uint8)).save(file)
            records.append({"file_name": str(picture), "sem_seg_file_name": str(file)})
        DatasetCatalog.register(f"{name}_labels", lambda records=records: records)
        MetadataCatalog.get(f"{name}_labels").set(
            evaluator_type="sem_seg", stuff_classes=["sky", "grass", "road"], ignore_label=255,
            image_root=str(root / split), sem_seg_root=str(labels),
        )  # fmt: skip
    yield root
    for name in [n for n in DatasetCatalog.list() if n.startswith(("every_config", str(root)))]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


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


def small_detection_config(name: str, scenes: Path, output: Path) -> DictConfig:
    overrides = """
        train.device=cpu train.max_iter=1 train.seed=1 train.log_period=1
        dataloader.train.total_batch_size=1 dataloader.train.num_workers=0
        dataloader.test.num_workers=0
    """.split()
    overrides += [f"model.backbone.net.{key}={value}" for key, value in TINY_ENCODER.items()]
    for split, folder in (("train", "train"), ("test", "val")):
        dataset, suffix = f"dataloader.{split}.dataset", "_labels" if name in SEMANTIC else ""
        if name in SEMANTIC or name.startswith("lvis"):
            overrides.append(f"{dataset}.names=every_config_{folder}{suffix}")
        else:
            overrides.append(f"{dataset}.json_file={scenes}/annotations/instances_{folder}.json")
            overrides.append(f"{dataset}.image_root={scenes}/{folder}")
    if name in SEMANTIC:
        overrides.append("model.sem_seg_head.num_classes=3")
    if name.startswith("lvis"):
        overrides += [f"model.roi_heads.num_classes={len(CLASS_NAMES)}"]
        overrides += ["+model.roi_heads.box_predictor.fed_loss_num_classes=3"]
    if "rcnn" in name:
        proposals = "model.proposal_generator"
        overrides += [f"{proposals}.pre_nms_topk=[50,20]", f"{proposals}.post_nms_topk=[20,10]"]
        overrides += [f"{proposals}.batch_size_per_image=16"]
        overrides += ["model.roi_heads.batch_size_per_image=8"]
    cfg = load_lazy_config(name, [*overrides, f"train.output_dir={output}"])
    shrink(cfg.dataloader)
    shrink(cfg.model)
    if cfg.model.backbone.square_pad:
        cfg.model.backbone.square_pad = SIDE
    if name.startswith("lvis"):  # its own evaluator needs LVIS's package and files
        cfg.dataloader.evaluator = recipe(ONE_X).dataloader.evaluator
    return cfg


def test_all_kinds_are_there_and_write_to_their_own_folders():
    assert len(PRETRAINING) >= 6
    assert len(DETECTION) >= 18
    folders = {Path(name).parts[0] for name in TEXTS}
    assert {"coco", "lvis", "objects365", "uavdt", "ade20k", "pretrain", "demo"} <= folders
    outputs = [re.findall(r'output_dir ?= ?"(\./output/.+)"', text) for text in TEXTS.values()]
    assert len({folder for (folder,) in outputs}) == len(TEXTS)


# tests/modeling/test_timm_backbone.py builds encoders of timm.
@pytest.mark.parametrize(
    "name", [r for r in TEXTS if not r.startswith("demo") and "resnet" not in r]
)
def test_full_size(name):
    cfg = recipe(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    size, patch = encoder_of(name)
    net = model.student.backbone if name in PRETRAINING else model.backbone.net
    count = sum(p.numel() for p in net.parameters()) / 1e6
    # The table has the counts of the papers, rounded to one decimal.
    assert count == pytest.approx(ENCODERS[size], rel=0.02)
    assert net.patch_size == patch
    assert net.output_shape()["last_feat"].stride == patch
    assert cfg.train.output_dir in TEXTS[name]
    if name in PRETRAINING:
        return
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    levels = (3, 7) if "retinanet" in name else (2, 5) if name in SEMANTIC else (2, 6)
    assert strides == {f"p{i}": 2**i for i in range(levels[0], levels[1] + 1)}
    masks = any("mask_head" in name for name, _ in model.named_parameters())
    learned = OmegaConf.select(cfg, "dataloader.train.mapper.use_instance_mask", default=False)
    assert masks == ("mask_rcnn" in name) == learned
    if "rcnn" in name:
        used = cfg.model.proposal_generator.anchor_generator.strides
        assert list(used) == [strides[level] for level in cfg.model.proposal_generator.in_features]


@pytest.mark.parametrize("name", DETECTION)
def test_detection_trains_a_step_and_evaluates(name, scenes, tmp_path):
    cfg = small_detection_config(name, scenes, tmp_path)
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
    assert ("sem_seg/mIoU" if name in SEMANTIC else "bbox/AP") in logged
    if "mask_rcnn" in name:
        assert "segm/AP" in logged
    if name.startswith("uavdt"):
        assert {"uavdt/AP70", "uavdt/mAP50"} <= logged.keys()
    if name.startswith("coco") and name not in SEMANTIC:
        assert cfg.dataloader.test.dataset.names.startswith("instances_val.json@")


# tests/pretrain/test_methods.py takes the steps of the other methods.
@pytest.mark.parametrize("name", [name for name in PRETRAINING if "flsl_vit" in name])
def test_pretraining_takes_a_step(name, scenes, tmp_path):
    small = """
        dataset.name= train.device=cpu train.max_iter=1 train.log_period=1 views.global_size=64
        views.local_size=32 dataloader.total_batch_size=2 dataloader.num_workers=0
        model.head.num_centroids=16 model.head.hidden_dim=32 model.head.bottleneck_dim=8
    """.split()
    small += [f"model.backbone.{key}={value}" for key, value in TINY_ENCODER.items()]
    small += [f"dataset.root={scenes}/train", f"train.output_dir={tmp_path}"]
    run_pretraining(load_lazy_config(name, small), resume=False)
    (line,) = (tmp_path / "metrics.json").read_text().splitlines()
    assert math.isfinite(json.loads(line)["loss"])
    written = torch.load(tmp_path / "teacher_backbone.pth", weights_only=True)
    assert written["encoder"]["patch_size"] == recipe(name).model.backbone.patch_size
