"""SimCLR pre-training of ViT-S/16 on ImageNet-1k (arXiv 2002.05709).

    tools/pretrain_net.py --config-file configs/pretrain/simclr_vit_small_p16_in1k.py --num-gpus 8

The paper trains a ResNet-50 by LARS. Views, head and temperature are its; learning rate, weight
decay, warm-up and length are those of MoCo v3's ViT-S by AdamW. Hardware and time: not measured.
Expected: no score was measured here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.simclr import SimCLR

from .moco_v3_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .moco_v3_vit_small_p16_in1k import model as _moco

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    jitter=(0.8, 0.8, 0.8, 0.2),
    blur=(0.5, 0.5, 0.5),
    solarise=(0.0, 0.0, 0.0),
)
model = L(SimCLR)(backbone=_moco.backbone, hidden_dim=2048, output_dim=128, temperature=0.1)

train.output_dir = "./output/simclr_vit_small_p16_in1k"
