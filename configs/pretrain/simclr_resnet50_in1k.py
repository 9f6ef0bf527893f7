"""SimCLR pre-training of ResNet-50 on ImageNet-1k (arXiv 2002.05709).

    tools/pretrain_net.py --config-file configs/pretrain/simclr_resnet50_in1k.py --num-gpus 8

The paper's encoder; the optimiser is AdamW with this project's schedules. The tokens are the
positions of the last map, and the global output is their mean. teacher_backbone.pth has timm's
names. Hardware and time: not measured. Expected: no score was measured here.
"""

from detectron2.config import LazyCall as L

from flsl_d2.modeling.timm_backbone import TimmBackbone

from .simclr_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone = L(TimmBackbone)(name="resnet50", pretrained=False, use_act_checkpoint=False)
views.patch_size = 32
train.output_dir = "./output/simclr_resnet50_in1k"
