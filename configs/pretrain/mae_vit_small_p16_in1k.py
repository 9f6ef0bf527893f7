"""MAE pre-training of ViT-S/16 on ImageNet-1k (arXiv 2111.06377).

    tools/pretrain_net.py --config-file configs/pretrain/mae_vit_small_p16_in1k.py --num-gpus 8

Decoder, views and rates are those of the authors' command for ViT-B and ViT-L, which clips no
gradients. Hardware and time: not
measured. Expected: no score was measured here, and the paper has none for ViT-S.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.mae import MAE

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    num_global=1,
    num_local=0,
    global_scale=(0.2, 1.0),
    jitter_probability=0.0,
    grey=0.0,
    blur=(0.0, 0.0, 0.0),
    solarise=(0.0, 0.0, 0.0),
)
model = L(MAE)(
    backbone=_dino.backbone,
    mask_share=0.75,
    normalise_pixels=True,
    decoder_dim=512,
    decoder_depth=8,
    decoder_heads=16,
)
model.backbone.drop_path_rate = 0.0
schedules.update(base_lr=1.5e-4, final_lr=0.0, warmup_fraction=0.05, weight_decay=(0.05, 0.05))
dataloader.total_batch_size = 4096

train.update(
    epochs=800, clip_mode="none", betas=(0.9, 0.95), output_dir="./output/mae_vit_small_p16_in1k"
)
