"""Annotations of any format: reading, checks, registration, and the mapper of Detectron2."""

from flsl_d2.annotations.checks import check_coco_files
from flsl_d2.annotations.datasets import (
    check_registered_dataset,
    register_builtin,
    register_coco_format,
    register_scenes,
)
from flsl_d2.annotations.findings import Use
from flsl_d2.annotations.mapper import FLSLDatasetMapper

__all__ = [
    "FLSLDatasetMapper",
    "Use",
    "check_coco_files",
    "check_registered_dataset",
    "register_builtin",
    "register_coco_format",
    "register_scenes",
]
