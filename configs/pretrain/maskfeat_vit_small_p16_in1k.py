"""MaskFeat pre-training of ViT-S/16 on ImageNet-1k (arXiv 2112.09133).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/maskfeat_vit_small_p16_in1k.py

Masks, cells, rates and clipping are those of the authors' recipe for ViT-B. Hardware and time:
not measured. Expected: no score was measured here, and the paper has none for ViT-S.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.maskfeat import MaskFeat

from .mae_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .mae_vit_small_p16_in1k import model as _mae

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.global_scale = (0.5, 1.0)
model = L(MaskFeat)(
    backbone=_mae.backbone,
    mask_share=0.4,
    num_orientations=9,
    cell_size=8,
)
schedules.update(base_lr=2e-4, final_lr=1e-6, warmup_fraction=0.1)
dataloader.total_batch_size = 2048

train.update(
    epochs=300,
    betas=(0.9, 0.999),
    clip_norm=0.02,
    clip_mode="global",
    output_dir="./output/maskfeat_vit_small_p16_in1k",
)
