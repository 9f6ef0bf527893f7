"""Data sets: registration, checks, one reader of images, and the demo's own scenes.

Importing this package registers `pennfudan_train/val`, `flsl_scenes_train/val`, `uavdt_train/test`,
`objects365_train/val` and `imagenet_boxes_train/val` under $DETECTRON2_DATASETS.
"""

from flsl_d2.annotations.checks import check_coco_files, check_registered_dataset
from flsl_d2.annotations.datasets import register_builtin, register_coco_format, register_scenes
from flsl_d2.annotations.findings import Use
from flsl_d2.annotations.mapper import FLSLDatasetMapper

register_builtin()

__all__ = [
    "FLSLDatasetMapper",
    "Use",
    "check_coco_files",
    "check_registered_dataset",
    "register_builtin",
    "register_coco_format",
    "register_scenes",
]
