"""Semantic FPN with FLSL ViT-S/16 on ADE20K, 40k steps at 512 x 512.

    tools/train_net.py --config-file configs/ade20k/semantic_fpn_flsl_vit_s16_40k.py --num-gpus 4 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

Length, crop, learning rate 6e-5 that falls linearly after 1500 steps of warm-up, weight decay 0.01
and stochastic depth 0.1 are those of the published FLSL segmentation config (4 images a GPU). The
pyramid is the simple one of ViTDet, where the published config has an FPN on four blocks.

Evaluated with mIoU by Detectron2. Hardware, time and score: not measured.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler

from ..common.ade20k_loader import dataloader
from ..common.models.semantic_fpn_flsl_vit import model
from ..common.optim import optimizer
from ..common.train import train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

optimizer.lr = 6e-5
optimizer.weight_decay = 0.01
optimizer.params.lr_factor_func.decay_rate = 1.0

train.max_iter = 40000
train.eval_period = 4000
train.output_dir = "./output/semantic_fpn_flsl_vit_s16_ade20k_40k"

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(PolynomialDecayParamScheduler)(base_value=1.0, power=1.0),
    warmup_factor=1e-6,
    warmup_length=1500 / 40000,
)
