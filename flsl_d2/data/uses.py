"""What a data set is used for, which decides on what is a fault in it."""

from __future__ import annotations

import enum

__all__ = ["Use"]


class Use(enum.Flag):
    """Parts of a data set that a run reads; several are combined by ``|``.

    Attributes:
        PICTURES: nothing but the pictures, as in pre-training by name.
        BOXES: boxes and classes, as in training a detector, box-aligned k-NN and figures.
        MASKS: masks, too.
        EVALUATION: what COCO's evaluation computes with: ``id``, ``area`` and ``iscrowd``.
            Annotations may be missing as a whole, as in COCO's test sets.
    """

    PICTURES = 0
    BOXES = enum.auto()
    MASKS = enum.auto()
    EVALUATION = enum.auto()
