"""Data sets: registration, checks of annotation files, and the demo's own scenes.

Importing this package registers `pennfudan_train/val`, `flsl_scenes_train/val`, `uavdt_train/test`,
`objects365_train/val` and `imagenet_boxes_train/val` under $DETECTRON2_DATASETS.
"""

from flsl_d2.data.annotations import check_coco_files, check_registered_dataset
from flsl_d2.data.datasets import register_builtin, register_coco_format, register_scenes

register_builtin()

__all__ = [
    "check_coco_files",
    "check_registered_dataset",
    "register_builtin",
    "register_coco_format",
    "register_scenes",
]
