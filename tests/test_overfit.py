"""A small FLSLViT under Mask R-CNN learns a handful of real images by heart: AP50 above 80."""

from __future__ import annotations

import re

import pytest
from forked import run_tool

CONFIG = "configs/coco/mask_rcnn_flsl_vit_s16_1x.py"
OVERRIDES = """
    train.device=cpu train.seed=1 train.max_iter=400 train.log_period=20 train.eval_period=0
    dataloader.train.dataset.names=pennfudan_train dataloader.test.dataset.names=pennfudan_val
    dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 dataloader.test.num_workers=0
    dataloader.train.mapper.augmentations.0.short_edge_length=[224]
    dataloader.test.mapper.augmentations.0.short_edge_length=224
    +dataloader.train.mapper.augmentations.1.prob=0.0
    model.roi_heads.num_classes=1 model.roi_heads.batch_size_per_image=64
    model.roi_heads.box_head.conv_dims=[64] model.roi_heads.mask_head.conv_dims=[64,64]
    model.proposal_generator.head.conv_dims=[64] model.proposal_generator.post_nms_topk=[200,50]
    model.backbone.net.embed_dim=192 model.backbone.net.depth=6 model.backbone.net.num_heads=3
    model.backbone.net.drop_path_rate=0.0 optimizer.lr=5e-4 optimizer.weight_decay=0.01
    optimizer.params.lr_factor_func.decay_rate=1.0
""".split()


@pytest.mark.slow
def test_overfits_eight_images_of_penn_fudan(few_images, tmp_path):
    root = few_images("pennfudan", count=8, same=True)
    done = run_tool(
        *("train_net", "--config-file", CONFIG, *OVERRIDES, f"train.output_dir={tmp_path}"),
        timeout=3600,
        DETECTRON2_DATASETS=str(root),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"(?:bbox|segm): (AP .*)$", done.stdout, re.MULTILINE)
    box, mask = ([float(pair.split()[1]) for pair in row.split(", ")] for row in rows)
    print(f"box AP {box[0]:.1f}, AP50 {box[1]:.1f}; mask AP {mask[0]:.1f}, AP50 {mask[1]:.1f}")
    assert box[1] > 80
    assert mask[1] > 80
