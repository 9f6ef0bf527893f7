"""Mask R-CNN with FLSL ViT-L/16 on COCO, ViTDet's recipe of 100 epochs (arXiv 2203.16527).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_l16_100ep.py --num-gpus 64 \\
        train.init_checkpoint=output/flsl_vit_large_p16_in1k/teacher_backbone.pth

Stochastic depth 0.4 and layer decay 0.8 are those of Detectron2's mask_rcnn_vitdet_l_100ep.py.
Hardware, time and score: not measured.
"""

from ..common.vit_sizes import large as _size
from .mask_rcnn_flsl_vit_s16_100ep import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

model.backbone.net.update(_size, drop_path_rate=0.4)
optimizer.params.lr_factor_func.decay_rate = 0.8
train.output_dir = "./output/mask_rcnn_flsl_vit_l16_100ep"
