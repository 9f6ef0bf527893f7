"""DetCon pre-training of ViT-S/16 on ImageNet-1k (arXiv 2103.10957).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/detcon_vit_small_p16_in1k.py

DetCon-B with Felzenszwalb's segments. The paper trains a ResNet-50 by LARS. Views, heads and
temperature are its; learning rate, weight decay, warm-up and length are those of MoCo v3's ViT-S by
AdamW. Hardware and time: not measured. Expected: no score was measured here, and
the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.detcon import DetCon

from .moco_v3_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .moco_v3_vit_small_p16_in1k import model as _moco

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    segments="felzenszwalb",
    segment_scale=1000.0,
    segment_size=1000,
)
model = L(DetCon)(
    backbone=_moco.backbone,
    hidden_dim=4096,
    output_dim=256,
    num_segments=16,
    temperature=0.1,
)
schedules.teacher_momentum = (0.996, 1.0)
train.output_dir = "./output/detcon_vit_small_p16_in1k"
