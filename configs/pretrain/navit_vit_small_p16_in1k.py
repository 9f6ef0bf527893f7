"""FLSL pre-training of ViT-S/16 on views of native aspect ratio (arXiv 2306.06203, 2307.06304).

    tools/pretrain_net.py --config-file configs/pretrain/navit_vit_small_p16_in1k.py --num-gpus 8

FLSL's recipe, whose views keep the aspect ratio of the image, as NaViT's do, within as many tokens
as a square of views.global_size has. Hardware and time: not measured. Expected: none known.
"""

from detectron2.config import LazyCall as L

from pretrain.methods.navit import NaViT
from pretrain.native_views import NativeViews

from .flsl_vit_small_p16_in1k import dataloader, dataset, schedules, train
from .flsl_vit_small_p16_in1k import model as _flsl

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

views = L(NativeViews)(
    patch_size="${model.backbone.patch_size}",
    # Sides of squares with as many tokens as a view has at most.
    global_size=224,
    local_size=96,
    num_local=2,
    teacher_scale=(0.8, 1.0),
    global_scale=(0.5, 1.0),
    local_scale=(0.05, 0.4),
)
model = L(NaViT)(
    backbone=_flsl.backbone,
    head=_flsl.head,
    loss=_flsl.loss,
    # Largest number of tokens that are encoded in one pass.
    pack_tokens=50176,
    global_window=3,
    local_window=2,
)
train.output_dir = "./output/navit_vit_small_p16_in1k"
