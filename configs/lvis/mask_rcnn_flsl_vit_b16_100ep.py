"""Mask R-CNN with FLSL ViT-B/16 on LVIS v1, ViTDet's recipe of 100 epochs (arXiv 2203.16527).

    tools/train_net.py --config-file configs/lvis/mask_rcnn_flsl_vit_b16_100ep.py --num-gpus 64 \\
        train.init_checkpoint=output/flsl_vit_base_p16_in1k/teacher_backbone.pth

Classes, sampling of rare classes (repeat factor at 0.001), federated loss, 300 detections above a
score of 0.02 and the doubled learning rate are those of Detectron2's
projects/ViTDet/configs/LVIS/mask_rcnn_vitdet_b_100ep.py. Needs the package lvis
(pip install --no-deps lvis). Hardware, time and score: not measured.
"""

from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler

from flsl_d2.detection.lvis import LVISEvaluator, federated_loss_weights

from ..coco.mask_rcnn_flsl_vit_b16_100ep import dataloader, lr_multiplier, model, optimizer, train

__all__ = ["dataloader", "lr_multiplier", "model", "optimizer", "train"]

dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    )
)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(LVISEvaluator)(
    dataset_name="${dataloader.test.dataset.names}",
    output_dir="${train.output_dir}/inference",
    max_dets_per_image=300,
)

model.roi_heads.num_classes = 1203
model.roi_heads.box_predictor.update(
    test_score_thresh=0.02,
    test_topk_per_image=300,
    use_sigmoid_ce=True,
    use_fed_loss=True,
    get_fed_loss_cls_weights=L(federated_loss_weights)(
        names="${dataloader.train.dataset.names}", power=0.5
    ),
)

optimizer.lr = 2e-4
# 100 epochs of 100k images in batches of 64; the milestones are fractions of it.
train.max_iter = 100 * 100_000 // 64
train.eval_period = 30000
train.output_dir = "./output/lvis_mask_rcnn_flsl_vit_b16_100ep"
lr_multiplier.warmup_length = 250 / train.max_iter
