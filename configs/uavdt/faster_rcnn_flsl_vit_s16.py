"""Faster R-CNN with FLSL ViT-S/16 on UAVDT: cars, trucks and buses seen from drones.

    tools/convert_uavdt.py
    tools/train_net.py --config-file configs/uavdt/faster_rcnn_flsl_vit_s16.py --num-gpus 8 \\
        train.init_checkpoint=output/flsl_vit_small_p16_in1k/teacher_backbone.pth

The COCO recipe 1x, 12 epochs of UAVDT long: the FLSL paper (arXiv 2306.06203) reports UAVDT, but
its schedule was not at hand. Anchors begin at 16 pixels, because vehicles are small, and up to 300
detections count, because a frame holds many. Evaluated with the AP of the UAVDT benchmark (IoU 0.7)
and with COCO's. Hardware, time and score: not measured.
"""

from detectron2.config import LazyCall as L

from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator
from flsl_d2.detection.uavdt_ap import UAVDTEvaluator

from ..coco.faster_rcnn_flsl_vit_s16_1x import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.dataset.names = "uavdt_train"
dataloader.test.dataset.names = "uavdt_test"
dataloader.evaluator = [
    L(FLSLCOCOEvaluator)(
        dataset_name="${dataloader.test.dataset.names}",
        output_dir="${train.output_dir}/inference",
        max_dets_per_image=300,
    ),
    L(UAVDTEvaluator)(dataset_name="${dataloader.test.dataset.names}"),
]

model.roi_heads.num_classes = 3
model.roi_heads.box_predictor.test_topk_per_image = 300
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]

# 12 epochs of 24k images in batches of 16.
train.max_iter = 12 * 24_000 // 16
train.output_dir = "./output/uavdt_faster_rcnn_flsl_vit_s16"
lr_multiplier.warmup_length = 1000 / train.max_iter
