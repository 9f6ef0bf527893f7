"""Heads of Cascade Mask R-CNN (arXiv 1712.00726) as ViTDet builds them: three stages at IoU 0.5,
0.6 and 0.7, boxes regressed for all classes alike, 4 convolutions + 1 linear layer each.
"""

from detectron2 import model_zoo

roi_heads = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
for head in roi_heads.box_heads:
    head.update(conv_dims=[256, 256, 256, 256], fc_dims=[1024], conv_norm="LN")
roi_heads.mask_head.conv_norm = "LN"
