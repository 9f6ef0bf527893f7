"""Mask R-CNN with FLSL ViT-S/16 on COCO, 1x (arXiv 2306.06203).

    tools/train_net.py --config-file configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

Length, image sizes, warm-up of 1000 steps and the drops of the learning rate (after 8 and 11 of 12
epochs) are those of the published FLSL detection config; the batch of 16 is Detectron2's 1x. The
detector, AdamW at 1e-4 with weight decay 0.1 and layer decay 0.7, and stochastic depth 0.1 are
ViTDet's (arXiv 2203.16527), where the published config has an FPN on four blocks, 5e-5, 0.05, no
layer decay and 0.05.

Hardware and time: made for 8 GPUs with 2 images each; not measured here. Expected: 44.9 box AP
and 40.8 mask AP, reported by the paper, not reproduced here.

On fewer GPUs keep the learning rate in proportion to the batch, and the number of images:
``dataloader.train.total_batch_size=4 optimizer.lr=2.5e-5 train.max_iter=360000``.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.coco_loader import dataloader
from ..common.models.mask_rcnn_flsl_vit import model
from ..common.optim import optimizer
from ..common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

# 12.2 epochs of 118k images in batches of 16.
train.max_iter = 90000
train.output_dir = "./output/mask_rcnn_flsl_vit_s16_1x"

lr_multiplier = L(WarmupParamScheduler)(
    # Milestones are fractions of the run: the same schedule for any train.max_iter.
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[8, 11], num_updates=12
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 90000,
)
