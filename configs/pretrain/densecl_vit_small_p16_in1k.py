"""DenseCL pre-training of ViT-S/16 on ImageNet-1k (arXiv 2011.09157).

    tools/pretrain_net.py --config-file configs/pretrain/densecl_vit_small_p16_in1k.py --num-gpus 8

The paper trains a ResNet-50 by SGD. Views (MoCo v2's), heads, queue and weights are its; learning
rate, weight decay and warm-up are those of DINO's ViT-S by AdamW. Hardware and time: not measured.
Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.densecl import DenseCL

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    num_local=0,
    global_scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    blur=(0.5, 0.5, 0.5),
    solarise=(0.0, 0.0, 0.0),
)
model = L(DenseCL)(
    backbone=_dino.backbone,
    hidden_dim=2048,
    output_dim=128,
    queue_length=65536,
    temperature=0.2,
    dense_weight=0.5,
)
schedules.update(teacher_momentum=(0.999, 0.999), warmup_fraction=10 / 200)
dataloader.total_batch_size = 256

train.update(epochs=200, output_dir="./output/densecl_vit_small_p16_in1k")
