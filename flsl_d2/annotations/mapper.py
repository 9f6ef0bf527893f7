"""Detectron2's dataset mapper on the project's reader of images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from fvcore.transforms.transform import TransformList

from flsl_d2.annotations.shapes import box_polygon
from flsl_d2.errors import InputError
from flsl_d2.images.labels import read_labels
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import read_image


class FLSLDatasetMapper(DatasetMapper):
    """Detectron2's mapper, with these differences.

    Pixels are those of :func:`flsl_d2.images.reader.read_image`. Masks become bitmasks in images
    that have run-length masks, whatever ``instance_mask_format`` is. An annotation without a mask
    gets that of its box: data with a few of them train masks, and data with boxes alone train
    boxes, also recomputed ones. Whatever fails is an :class:`InputError` that names the file and
    the annotation.
    """

    instance_mask_format: str
    recompute_boxes: bool

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one image with its annotations."""
        record = copy.deepcopy(dataset_dict)
        try:
            return self._map(record)
        except InputError:
            raise
        except Exception as error:  # Detectron2 checks nothing: KeyError, AssertionError...
            name = printable(str(dataset_dict.get("file_name", "")))
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise InputError(
                f"the image '{name}'{self._culprit(dataset_dict)} cannot be used ({reason}); "
                "correct its annotations or leave it out."
            ) from error

    def _map(self, record: dict[str, Any]) -> dict[str, Any]:
        image = read_image(record["file_name"], self.image_format)
        utils.check_image_size(record, image)
        labels = None
        if "sem_seg_file_name" in record:
            labels = read_labels(record.pop("sem_seg_file_name"), size=image.shape[:2])
        augmented = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(augmented)
        image, labels = augmented.image, augmented.sem_seg
        size = image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if labels is not None:
            record["sem_seg"] = torch.as_tensor(labels.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(record, size, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, size)
        return record

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: TransformList, image_shape: tuple[int, int]
    ) -> None:
        annotations = dataset_dict["annotations"]
        settings = self.instance_mask_format, self.recompute_boxes
        if self.use_instance_mask:
            for annotation in annotations:
                segmentation = annotation.get("segmentation")
                if segmentation is None or (isinstance(segmentation, list) and not segmentation):
                    box, mode = [*annotation["bbox"]], annotation["bbox_mode"]
                    corners = BoxMode.convert(box, mode, BoxMode.XYXY_ABS)
                    annotation["segmentation"] = [box_polygon(*corners)]
            learned = [a["segmentation"] for a in annotations if not a.get("iscrowd")]
            if any(not isinstance(segmentation, list) for segmentation in learned):
                self.instance_mask_format = "bitmask"
            # Detectron2 gives an image without objects no masks to recompute boxes from.
            self.recompute_boxes = self.recompute_boxes and bool(learned)
        try:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
        finally:
            self.instance_mask_format, self.recompute_boxes = settings

    def _culprit(self, dataset_dict: dict[str, Any]) -> str:
        """Name the annotation that fails even alone and untransformed, as part of a sentence."""
        size = dataset_dict.get("height", 1), dataset_dict.get("width", 1)
        for index, annotation in enumerate(dataset_dict.get("annotations", ())):
            alone = {"annotations": [copy.deepcopy(annotation)]}
            try:
                self._transform_annotations(alone, TransformList([]), size)
            except Exception:
                return f" with the annotation {annotation.get('id', index)}"
        return ""
