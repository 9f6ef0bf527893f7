"""RetinaNet with FLSL ViT-S/16 on COCO, 1x.

    tools/train_net.py --config-file configs/coco/retinanet_flsl_vit_s16_1x.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

Detectron2's RetinaNet with the schedule and the optimiser of mask_rcnn_flsl_vit_s16_1x.py.
Hardware, time and score: not measured.
"""

from ..common.models.retinanet_flsl_vit import model
from .faster_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

train.output_dir = "./output/retinanet_flsl_vit_s16_1x"
