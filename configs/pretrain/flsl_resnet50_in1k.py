"""FLSL pre-training of ResNet-50 on ImageNet-1k: the method of arXiv 2306.06203 on a CNN.

    tools/pretrain_net.py --config-file configs/pretrain/flsl_resnet50_in1k.py --num-gpus 8

The tokens are the positions of the last map, 7 x 7 in the global view. The paper leaves CNNs open,
so all other settings are those of ViT-S/16. teacher_backbone.pth has timm's names. Hardware and
time: not measured. Expected: none known.
"""

from detectron2.config import LazyCall as L

from flsl_d2.modeling.timm_backbone import TimmBackbone

from .flsl_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone = L(TimmBackbone)(name="resnet50", pretrained=False, use_act_checkpoint=False)
model.head.in_dim = 2048
# The stride of the last map.
views.update(patch_size=32, global_window=2, local_window=1)
train.output_dir = "./output/flsl_resnet50_in1k"
