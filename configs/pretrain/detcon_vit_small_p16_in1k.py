"""DetCon pre-training of ViT-S/16 on ImageNet-1k (arXiv 2103.10957).

    tools/pretrain_net.py --num-gpus 8 \\
        --config-file configs/pretrain/detcon_vit_small_p16_in1k.py

DetCon-B with Felzenszwalb's segments. The paper trains a ResNet-50 by LARS; here are its views,
heads and temperature with AdamW. Hardware and time: not measured. Expected: no score was measured
here, and the paper has none for a ViT.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.detcon import DetCon

from .dino_vit_small_p16_in1k import dataloader, dataset, schedules, train, views
from .dino_vit_small_p16_in1k import model as _dino

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views.update(
    num_local=0,
    global_scale=(0.08, 1.0),
    segments="felzenszwalb",
    segment_scale=1000.0,
    segment_size=1000,
)
model = L(DetCon)(
    backbone=_dino.backbone,
    hidden_dim=4096,
    output_dim=256,
    num_segments=16,
    temperature=0.1,
)
dataloader.total_batch_size = 4096

train.update(epochs=300, output_dir="./output/detcon_vit_small_p16_in1k")
