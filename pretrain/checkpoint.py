"""From a pre-trained teacher to a file that any Detectron2 project loads."""

from __future__ import annotations

from pathlib import Path

import torch

from flsl_d2.checkpoint.safe_saving import replaced_file
from pretrain.model import FLSL

__all__ = ["save_teacher_backbone"]


def save_teacher_backbone(model: FLSL, path: str | Path) -> None:
    """Write the teacher's encoder, by its bare names, with the architecture it needs.

    The file holds ``model`` (tensors), ``encoder`` (constructor arguments of ``FLSLViT``),
    ``format``, and ``matching_heuristics``, which tells Detectron2's own checkpointer to find
    these names wherever the encoder sits in a detector. A reader never sees half of it.

    Raises:
        OSError: it cannot be written; a file that was there before still is.
    """
    backbone = model.teacher.backbone
    content = {
        "model": {name: tensor.cpu() for name, tensor in backbone.state_dict().items()},
        "encoder": backbone.architecture,
        "format": "flsl_d2 encoder",
        "matching_heuristics": True,
    }
    with replaced_file(path) as file:
        torch.save(content, file)
