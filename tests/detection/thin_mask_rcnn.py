"""COCO's recipe with thin heads and few proposals, for tests of fine-tuning."""

from detectron2.layers import ShapeSpec

from flsl_d2.model_zoo import get_config

CHANNELS = 16
_recipe = get_config("coco/mask_rcnn_flsl_vit_s16_1x.py")
dataloader, lr_multiplier = _recipe["dataloader"], _recipe["lr_multiplier"]
model, optimizer, train = _recipe["model"], _recipe["optimizer"], _recipe["train"]

model.backbone.net.window_size = 0
model.backbone.out_channels = CHANNELS
model.proposal_generator.head.update(in_channels=CHANNELS, conv_dims=[-1])
model.proposal_generator.update(
    batch_size_per_image=16, pre_nms_topk=(50, 20), post_nms_topk=(20, 10)
)
model.roi_heads.batch_size_per_image = 8
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7), conv_dims=[CHANNELS], fc_dims=[32]
)
model.roi_heads.box_predictor.update(input_shape=ShapeSpec(channels=32), test_score_thresh=0.01)
model.roi_heads.mask_head.update(
    input_shape=ShapeSpec(channels=CHANNELS, height=14, width=14), conv_dims=[CHANNELS] * 2
)
