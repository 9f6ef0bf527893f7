"""BEiT pre-training of ViT-S/16 on ImageNet-1k (arXiv 2106.08254).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/beit_vit_small_p16_in1k.py

The tokeniser is k-means learned along the way, since the original's weights were not at hand: of
the pixels of patches, or of the features of a given encoder (model.tokenizer=FILE, or timm:NAME).
Masks, number of codes and rates are those of the authors' command for ViT-B. Hardware and time: not
measured. Expected: no score was measured here, and the paper has none for ViT-S.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.beit import BEiT

from .mae_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .mae_vit_small_p16_in1k import model as _mae

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(jitter_probability=1.0, jitter=(0.4, 0.4, 0.4, 0.0), global_scale=(0.08, 1.0))
model = L(BEiT)(backbone=_mae.backbone, num_codes=8192, mask_share=75 / 196, tokenizer="")
model.backbone.drop_path_rate = 0.1
schedules.update(base_lr=1.5e-3 / 8, final_lr=1e-5, warmup_fraction=10 / 800)
dataloader.total_batch_size = 2048

train.update(
    epochs=800,
    betas=(0.9, 0.999),
    clip_norm=3.0,
    clip_mode="global",
    output_dir="./output/beit_vit_small_p16_in1k",
)
