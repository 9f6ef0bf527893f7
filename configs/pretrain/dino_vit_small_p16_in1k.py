"""DINO pre-training of ViT-S/16 on ImageNet-1k (arXiv 2104.14294).

    tools/pretrain_net.py --config-file configs/pretrain/dino_vit_small_p16_in1k.py --num-gpus 8

The other methods' recipes start from this one. Crops, rates and head are those of the authors'
code, the teacher's temperatures and the learned scale those of its README for ViT-S. The global
output is the mean of the tokens, where the original takes a class token; docs/METHODS.md has all
differences. Hardware and time: not measured. Expected: no score was measured here; the authors
report 74.5% accuracy on ImageNet by k-NN and 77.0% by a linear layer for ViT-S/16 with a class
token (README of github.com/facebookresearch/dino).
"""

from detectron2.config import LazyCall as L

from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.dino import DINO
from pretrain.multi_crop import MultiCropViews

from .flsl_vit_small_p16_in1k import dataloader, dataset, schedules, train
from .flsl_vit_small_p16_in1k import model as _flsl

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views = L(MultiCropViews)(
    patch_size="${model.backbone.patch_size}",
    global_size=224,
    local_size=96,
    num_global=2,
    num_local=8,
    global_scale=(0.4, 1.0),
    local_scale=(0.05, 0.4),
    # Probability that a view is mirrored.
    flip=0.5,
    # Largest change of brightness, contrast, saturation and hue.
    jitter=(0.4, 0.4, 0.2, 0.1),
    jitter_probability=0.8,
    grey=0.2,
    # Probabilities for the first global view, further global views, and local ones.
    blur=(1.0, 0.1, 0.5),
    solarise=(0.0, 0.2, 0.0),
    # Work of the training device instead of the workers: "nothing" or "augmentation".
    on_device="nothing",
)

model = L(DINO)(
    backbone=_flsl.backbone,
    head=L(FLSLHead)(
        in_dim="${model.backbone.embed_dim}",
        num_centroids=65536,
        hidden_dim=2048,
        bottleneck_dim=256,
        learn_scale=True,
    ),
    student_temp=0.1,
    center_momentum=0.9,
)

# Ten epochs of warm-up, as in main_dino.py.
schedules.warmup_fraction = 10 / 800
dataloader.total_batch_size = 1024
train.update(epochs=800, output_dir="./output/dino_vit_small_p16_in1k")
