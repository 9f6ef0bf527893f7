"""DropPos pre-training of ViT-S/16 on ImageNet-1k (arXiv 2309.03576).

    tools/pretrain_net.py --config-file configs/pretrain/droppos_vit_small_p16_in1k.py --num-gpus 8

Shares, smoothing, decoder, views and rates are those of the authors' command for ViT-B. Hardware
and time: not measured. Expected: no score was measured here, and the paper has none for ViT-S.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.droppos import DropPos

from .mae_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .mae_vit_small_p16_in1k import model as _mae

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model = L(DropPos)(
    backbone=_mae.backbone,
    mask_share=0.75,
    drop_share=0.75,
    smoothing=1.0,
    attention_temp=0.1,
    decoder_dim=512,
    decoder_depth=2,
    decoder_heads=16,
)
schedules.warmup_fraction = 10 / 800
train.update(
    epochs=800,
    clip_norm=5.0,
    clip_mode="per_tensor",
    output_dir="./output/droppos_vit_small_p16_in1k",
)
