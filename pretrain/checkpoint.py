"""From a pre-trained teacher to a file that any Detectron2 project loads."""

from __future__ import annotations

from pathlib import Path

import torch

from flsl_d2.checkpoint.export import encoder_file
from flsl_d2.files import replaced_file
from pretrain.model import FLSL

__all__ = ["save_teacher_backbone"]


def save_teacher_backbone(model: FLSL, path: str | Path) -> None:
    """Write the teacher's encoder (:func:`encoder_file`); a reader never sees half of it.

    Raises:
        OSError: it cannot be written; a file that was there before still is.
    """
    with replaced_file(path) as file:
        torch.save(encoder_file(model.teacher.backbone), file)
