"""A small FLSLViT under Mask R-CNN learns a handful of real images by heart: AP50 above 80."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CONFIG = "configs/coco/mask_rcnn_flsl_vit_s16_1x.py"
IMAGES = 8
OVERRIDES = [
    "train.device=cpu",
    "train.seed=1",
    "train.max_iter=400",
    "train.log_period=20",
    "train.eval_period=0",
    "dataloader.train.dataset.names=pennfudan_train",
    "dataloader.test.dataset.names=pennfudan_val",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[224]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=224",
    "+dataloader.train.mapper.augmentations.1.prob=0.0",
    "model.roi_heads.num_classes=1",
    "model.roi_heads.batch_size_per_image=64",
    "model.roi_heads.box_head.conv_dims=[64]",
    "model.roi_heads.mask_head.conv_dims=[64,64]",
    "model.proposal_generator.head.conv_dims=[64]",
    "model.proposal_generator.post_nms_topk=[200,50]",
    "model.backbone.net.embed_dim=192",
    "model.backbone.net.depth=6",
    "model.backbone.net.num_heads=3",
    "model.backbone.net.drop_path_rate=0.0",
    "optimizer.lr=5e-4",
    "optimizer.weight_decay=0.01",
    "optimizer.params.lr_factor_func.decay_rate=1.0",
]


@pytest.mark.slow
def test_overfits_eight_images_of_penn_fudan(datasets_root, tmp_path):
    source = datasets_root / "pennfudan"
    if not source.is_dir():
        pytest.skip("DETECTRON2_DATASETS has no pennfudan")
    folder = tmp_path / "pennfudan"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").symlink_to(source / "images")
    content = json.loads((source / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:IMAGES]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    for split in ("train", "val"):  # evaluated on what it was trained on
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    command = [sys.executable, str(REPOSITORY / "tools" / "train_net.py"), "--config-file", CONFIG]
    done = subprocess.run(
        [*command, *OVERRIDES, f"train.output_dir={tmp_path / 'output'}"],
        env={**os.environ, "DETECTRON2_DATASETS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"(?:bbox|segm): (AP .*)$", done.stdout, re.MULTILINE)
    box, mask = ([float(pair.split()[1]) for pair in row.split(", ")] for row in rows)
    print(f"box AP {box[0]:.1f}, AP50 {box[1]:.1f}; mask AP {mask[0]:.1f}, AP50 {mask[1]:.1f}")
    assert box[1] > 80
    assert mask[1] > 80
