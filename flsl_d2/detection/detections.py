"""Detections of one image, whose masks are as small as their boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.layers.mask_ops import _do_paste_mask

from flsl_d2.errors import InputError

# Longest side in pixels of a drawn picture.
_MOST_DRAWN = 4096
_OPACITY = 0.45


class Crop(NamedTuple):
    """A mask inside its box: the column and the row of its corner, and bool pixels."""

    left: int
    top: int
    pixels: np.ndarray


class MaskCrops(Sequence[np.ndarray]):
    """Masks of an image as a sequence of (H, W) bool arrays, each made when it is asked for.

    ``np.asarray`` makes all of them, (M, H, W); ``size`` is the image's height and width.
    """

    def __init__(self, crops: Sequence[Crop], size: tuple[int, int]) -> None:
        self.crops, self.size = list(crops), size

    @classmethod
    def of_arrays(cls, masks: np.ndarray) -> MaskCrops:
        """Cut masks (M, H, W) to what they show."""
        crops = []
        for mask in masks:
            left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
            crops.append(Crop(left, top, mask[top : top + height, left : left + width].copy()))
        return cls(crops, (masks.shape[1], masks.shape[2]))

    @classmethod
    def of_predictions(
        cls, predicted: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
    ) -> MaskCrops:
        """Paste predictions (M, 1, h, w) into their boxes (M, 4), as Detectron2 does."""
        crops = []
        for mask, box in zip(predicted, boxes, strict=True):
            pasted, (rows, columns) = _do_paste_mask(mask[None], box[None], *size)
            pixels = (pasted[0] >= 0.5).numpy()
            crops.append(Crop(int(columns.start), int(rows.start), pixels))
        return cls(crops, size)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self), *self.size

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: Any) -> Any:
        crop, mask = self.crops[index], np.zeros(self.size, bool)
        height, width = crop.pixels.shape
        mask[crop.top : crop.top + height, crop.left : crop.left + width] = crop.pixels
        return mask

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        stacked = np.stack(list(self)) if self.crops else np.zeros(self.shape, bool)
        return stacked.astype(dtype) if dtype else stacked

    def chosen(self, indexes: np.ndarray) -> MaskCrops:
        return MaskCrops([self.crops[i] for i in indexes.tolist()], self.size)

    def moved(self, left: int, top: int, size: tuple[int, int]) -> MaskCrops:
        """Return the masks in a larger image, of which this one was a part."""
        moved = [Crop(crop.left + left, crop.top + top, crop.pixels) for crop in self.crops]
        return MaskCrops(moved, size)

    def run_lengths(self) -> Iterator[dict[str, Any]]:
        """Yield COCO's compressed run lengths of each mask."""
        height = self.size[0]
        for crop in self.crops:
            # Runs go down the columns of the image; one that ends at the bottom may go on.
            padded = np.pad(crop.pixels, ((1, 1), (0, 0))).T.astype(np.int8)
            columns, rows = np.nonzero(np.diff(padded, axis=1))
            changes = (crop.left + columns) * height + crop.top + rows
            joined = np.flatnonzero(changes[1:] == changes[:-1])
            changes = np.delete(changes, np.concatenate([joined, joined + 1]))
            ends, total = [0, *changes.tolist()], height * self.size[1]
            if ends[-1] < total or len(ends) == 1:
                ends.append(total)
            counts = {"counts": np.diff(ends).tolist(), "size": list(self.size)}
            code = mask_util.frPyObjects(counts, *self.size)
            yield {"size": code["size"], "counts": code["counts"].decode()}


@dataclass(frozen=True)
class Detections:
    """Objects of one image, by falling score.

    Attributes:
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels of the image.
        scores: (M,) float32 in [0, 1].
        classes: (M,) int64, class numbers from 0.
        class_names: name of every class; empty where they are not known.
        masks: M masks (H, W) bool, or an array (M, H, W); None for a detector without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: Sequence[str] = ()
    masks: MaskCrops | None = None

    def __post_init__(self) -> None:
        if isinstance(self.masks, np.ndarray):
            object.__setattr__(self, "masks", MaskCrops.of_arrays(self.masks))

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, chosen: np.ndarray) -> Detections:
        """Return the objects of an index array or a mask of bools."""
        indexes = np.arange(len(self))[chosen]
        return replace(
            self,
            boxes=self.boxes[indexes],
            scores=self.scores[indexes],
            classes=self.classes[indexes],
            masks=None if self.masks is None else self.masks.chosen(indexes),
        )

    @property
    def names(self) -> list[str]:
        """Name of each object's class, or its number as text."""
        known = self.class_names
        return [known[c] if c < len(known) else str(c) for c in self.classes.tolist()]

    def at_least(self, score: float) -> Detections:
        return self[self.scores >= score]

    def drawn_on(self, image: np.ndarray) -> np.ndarray:
        """Draw masks, boxes, names and scores on an image (H, W, 3) uint8 RGB.

        A small image is enlarged first, and a large one is reduced to 4,096 pixels.
        """
        from flsl_d2.visualization.detections import DrawnObjects, draw_objects
        from flsl_d2.visualization.figures import enlarge, palette

        canvas, factor = enlarge(image)
        if max(canvas.shape[:2]) > _MOST_DRAWN:
            factor = _MOST_DRAWN / max(canvas.shape[:2])
            size = [max(round(side * factor), 1) for side in canvas.shape[1::-1]]
            canvas = cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)
        canvas = canvas.copy()
        boxes = self.boxes * factor
        if self.masks is not None:
            sizes = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            colours = palette(len(boxes))
            for i in np.argsort(-sizes, kind="stable").tolist():  # small ones in front
                _tint(canvas, self.masks.crops[i], factor, colours[i])
        none: list[np.ndarray | None] = [None] * len(self)
        objects = DrawnObjects(boxes, none, self.classes.tolist(), self.scores.tolist())
        return draw_objects(canvas, objects, list(self.class_names))

    def coco_results(self, image_id: int, category_ids: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Entries of a COCO results file; without ids of the classes, their numbers plus 1."""
        rows = zip(self.boxes.tolist(), self.classes.tolist(), self.scores.tolist(), strict=True)
        entries: list[dict[str, Any]] = [
            {
                "image_id": image_id,
                "category_id": category_ids[number] if category_ids else number + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for (x0, y0, x1, y1), number, score in rows
        ]
        if self.masks is not None:
            for entry, code in zip(entries, self.masks.run_lengths(), strict=True):
                entry["segmentation"] = code
        return entries

    def to_supervision(self) -> Any:
        """Convert to ``supervision.Detections``; needs the package ``supervision``."""
        try:
            import supervision
        except ImportError as error:
            raise InputError(
                "the package supervision is not installed; run pip install 'flsl-d2[formats]'."
            ) from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            mask=None if self.masks is None else np.asarray(self.masks),
            data={"class_name": np.array(self.names)},
        )


def _tint(canvas: np.ndarray, crop: Crop, factor: float, colour: np.ndarray) -> None:
    """Tint a mask, scaled by a factor, and draw its outline; holes stay clear."""
    height, width = crop.pixels.shape
    left, top = round(crop.left * factor), round(crop.top * factor)
    right = min(round((crop.left + width) * factor), canvas.shape[1])
    bottom = min(round((crop.top + height) * factor), canvas.shape[0])
    if right <= left or bottom <= top:
        return
    soft = cv2.resize(crop.pixels.astype(np.float32), (right - left, bottom - top))
    inside = soft >= 0.5
    region = canvas[top:bottom, left:right]
    region[inside] = (1 - _OPACITY) * region[inside] + _OPACITY * colour
    contours, _ = cv2.findContours(
        inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top)
    )
    thickness = max(1, min(canvas.shape[:2]) // 250)
    cv2.drawContours(canvas, contours, -1, colour.tolist(), thickness)
