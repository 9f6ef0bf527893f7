"""FLSL pre-training of ViT-S/8 on ImageNet-1k (arXiv 2306.06203).

    tools/pretrain_net.py --config-file configs/pretrain/flsl_vit_small_p8_in1k.py --num-gpus 8

The recipe of ViT-S/16 with four times the tokens: 784 of a global view, 144 of a local one, 81 and
36 of them queries. Blocks are recomputed in the backward pass; where memory allows,
model.backbone.use_act_checkpoint=false is faster. On fewer GPUs lower dataloader.total_batch_size,
the learning rate follows. Hardware and time: not measured. Expected: Mask R-CNN fine-tuned from its
weights reaches 46.5 box and 42.1 mask AP on COCO, the paper's figures, not ours.
"""

from .flsl_vit_small_p16_in1k import dataloader, dataset, model, schedules, train, views

__all__ = ["dataloader", "dataset", "model", "schedules", "train", "views"]

model.backbone.update(patch_size=8, use_act_checkpoint=True)
train.output_dir = "./output/flsl_vit_small_p8_in1k"
