"""VICRegL pre-training of ViT-S/16 on ImageNet-1k (arXiv 2210.01571).

    tools/pretrain_net.py --config-file configs/pretrain/vicregl_vit_small_p16_in1k.py --num-gpus 8

The paper trains ResNet-50 and ConvNeXt. Views, heads, weights and rates are those of the authors'
code for ConvNeXt, which AdamW trains as well, without clipping. Hardware and time: not measured.
Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.vicreg import VICRegL

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(num_local=6, global_scale=(0.4, 1.0), local_scale=(0.08, 0.4))
model = L(VICRegL)(
    backbone=_dino.backbone,
    hidden_dim=8192,
    output_dim=8192,
    local_dim=512,
    alpha=0.75,
    num_matches=(20, 4),
    all_by_feature=True,
)
schedules.update(final_lr=1e-6, warmup_fraction=10 / 400, weight_decay=(0.05, 0.05))
dataloader.total_batch_size = 512

train.update(epochs=400, clip_mode="none", output_dir="./output/vicregl_vit_small_p16_in1k")
