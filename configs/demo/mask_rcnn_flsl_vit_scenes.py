"""A small Mask R-CNN on the demo's own scenes, minutes on a CPU.

    tools/train_net.py --config-file configs/demo/mask_rcnn_flsl_vit_scenes.py \\
        train.init_checkpoint=output/demo/pretrain/teacher_backbone.pth

The detector of the COCO recipes with thinner heads, fewer proposals and no windows. The scenes are
made by ``make demo`` (flsl_d2.scenes) below $DETECTRON2_DATASETS/flsl_scenes.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from ..coco.mask_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, model, optimizer, train
from .flsl_vit_scenes import model as _pretrained

CHANNELS = 64

for key in ("patch_size", "embed_dim", "depth", "num_heads", "drop_path_rate"):
    model.backbone.net[key] = _pretrained.backbone[key]
model.backbone.net.img_size = 80
model.backbone.net.window_size = 0
model.backbone.out_channels = CHANNELS
model.proposal_generator.head.update(in_channels=CHANNELS, conv_dims=[-1])
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.proposal_generator.update(
    batch_size_per_image=64, pre_nms_topk=(400, 200), post_nms_topk=(200, 60)
)
model.roi_heads.update(num_classes=6, batch_size_per_image=32)
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7),
    conv_dims=[CHANNELS],
    fc_dims=[256],
)
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=256)
model.roi_heads.mask_head.update(
    input_shape=ShapeSpec(channels=CHANNELS, height=14, width=14), conv_dims=[CHANNELS] * 3
)

dataloader.train.dataset.names = "flsl_scenes_train"
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 0
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
dataloader.test.dataset.names = "flsl_scenes_val"
dataloader.test.mapper.augmentations = []
dataloader.test.num_workers = 0

optimizer.lr = 1e-3
optimizer.weight_decay = 0.05
optimizer.params.lr_factor_func.decay_rate = 0.9
train.update(
    device="cpu",
    max_iter=400,
    eval_period=0,
    log_period=20,
    seed=0,
    output_dir="./output/demo/detection",
)
lr_multiplier.warmup_length = 0.1
