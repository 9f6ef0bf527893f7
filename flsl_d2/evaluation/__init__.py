"""Dense evaluations of an encoder.

Importing this package registers `imagenet_boxes_train/val` under $DETECTRON2_DATASETS/imagenet.
"""

import os

from flsl_d2.data.datasets import datasets_root
from flsl_d2.data.imagenet_boxes import register_imagenet_boxes
from flsl_d2.evaluation.features import TokenFeatures, extract_tokens
from flsl_d2.evaluation.measures import MEASURES, measure_all, measure_features

register_imagenet_boxes(os.path.join(datasets_root(), "imagenet"))

__all__ = ["MEASURES", "TokenFeatures", "extract_tokens", "measure_all", "measure_features"]
