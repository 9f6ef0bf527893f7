"""Registered data sets as the measures use them: images with labelled pixels and boxes.

Shape suffixes: H x W pixels of the image as annotated.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.structures import BoxMode, polygons_to_bitmask
from pycocotools import mask as coco_mask

from flsl_d2.data import check_registered_dataset
from flsl_d2.data.datasets import use_own_loader
from flsl_d2.data.images import MAX_PIXELS_LIMIT, printable, read_rgb
from flsl_d2.errors import InputError

__all__ = ["IGNORED", "LabelledBox", "LabelledDataset", "LabelledImage", "load_labelled"]

IGNORED = -1


class LabelledBox(NamedTuple):
    """A box in pixels, (x0, y0, x1, y1), and the index of its class."""

    box: tuple[float, float, float, float]
    category: int


class LabelledDataset(NamedTuple):
    """A registered data set, or a part of it.

    Attributes:
        name: as registered.
        images: only those with annotations.
        box_classes: names of the classes of boxes; empty where there are none.
        pixel_classes: names of the classes of pixels. Those of instances come after `background`,
            which is every pixel that no instance covers.
    """

    name: str
    images: list[LabelledImage]
    box_classes: tuple[str, ...]
    pixel_classes: tuple[str, ...]


class LabelledImage:
    """One image and what its annotations say; nothing is read before it is asked for.

    Args:
        record: Detectron2's standard dict of an image.
        dataset: its name, for messages.
        num_pixel_classes: how many classes pixels have, background included.
        ignore_label: the value of unlabelled pixels in a file of semantic labels.
    """

    def __init__(
        self,
        record: dict[str, Any],
        dataset: str,
        num_pixel_classes: int,
        ignore_label: int = 255,
    ) -> None:
        self.record, self.dataset = record, dataset
        self.num_pixel_classes, self.ignore_label = num_pixel_classes, ignore_label

    def read(self) -> np.ndarray:
        """The image, (H, W, 3) uint8 RGB, turned as its EXIF entry says.

        Raises:
            InputError: the file cannot be read, or has another size than the annotations say.
        """
        name = self.record["file_name"]
        try:
            image = read_rgb(name, MAX_PIXELS_LIMIT)
            utils.check_image_size(dict(self.record), image)
        except (OSError, utils.SizeMismatchError) as error:
            raise InputError(
                f"the image {printable(name)} of {self.dataset!r} cannot be used "
                f"({' '.join(str(error).split())}); replace it or take it out of the annotations."
            ) from error
        return image

    @cached_property
    def semantic(self) -> np.ndarray:
        """Class of every pixel, (H, W) int64, `IGNORED` where there is none.

        Instances are merged by class: 0 is background, class c of the boxes is c + 1. Where they
        overlap, the smaller one is in front. Crowds are ignored.

        Raises:
            InputError: the data set has neither masks nor semantic labels, or labels of unknown
                classes.
        """
        file_name = self.record.get("sem_seg_file_name")
        if file_name is None:
            return self._paint([a["category_id"] + 1 for a in self._annotations])
        try:
            labels = utils.read_image(file_name).astype(np.int64)
        except OSError as error:
            raise InputError(
                f"the labels {file_name} of {self.dataset!r} cannot be read ({error}); "
                "put the file there."
            ) from error
        labels[labels == self.ignore_label] = IGNORED
        if labels.min() < IGNORED or labels.max() >= self.num_pixel_classes:
            raise InputError(
                f"the labels {file_name} have the value {labels.max()}, but {self.dataset!r} has "
                f"{self.num_pixel_classes} classes (and {self.ignore_label} for none); correct the "
                "file, or `stuff_classes` and `ignore_label` in the metadata."
            )
        return labels

    @cached_property
    def segments(self) -> np.ndarray:
        """Ground-truth segment of every pixel, (H, W) int64, `IGNORED` where there is none.

        Segment 0 is what no instance covers, and each instance is one; in data without instances
        each class is one.

        Raises:
            InputError: see :attr:`semantic`.
        """
        if "annotations" not in self.record:
            return np.where(self.semantic == IGNORED, IGNORED, self.semantic + 1)
        return self._paint(range(1, len(self._annotations) + 1))

    @cached_property
    def largest_box(self) -> LabelledBox | None:
        """The box of the largest area, crowds apart; None where no box has an area."""
        boxes = []
        for annotation in self._annotations:
            if annotation.get("iscrowd", 0) or "bbox" not in annotation:
                continue
            mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
            x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS)
            if x1 > x0 and y1 > y0:
                box = LabelledBox((x0, y0, x1, y1), annotation["category_id"])
                boxes.append(((x1 - x0) * (y1 - y0), box))
        return max(boxes, key=lambda pair: pair[0])[1] if boxes else None

    @property
    def _annotations(self) -> list[dict[str, Any]]:
        return self.record.get("annotations", [])

    def _paint(self, labels: Any) -> np.ndarray:
        size = self.record["height"], self.record["width"]
        painted = np.zeros(size, dtype=np.int64)
        masks = [self._mask(annotation, size) for annotation in self._annotations]
        crowds = [bool(annotation.get("iscrowd", 0)) for annotation in self._annotations]
        parts = sorted(
            zip(masks, crowds, labels, strict=True), key=lambda part: (not part[1], -part[0].sum())
        )
        for mask, crowd, label in parts:
            painted[mask] = IGNORED if crowd else label
        return painted

    def _mask(self, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        segmentation = annotation.get("segmentation")
        if segmentation is None or (isinstance(segmentation, list) and not segmentation):
            raise InputError(
                f"the data set {self.dataset!r} has annotations without masks, for example in "
                f"{self.record['file_name']}; use one with masks or semantic labels."
            )
        if isinstance(segmentation, dict):
            if isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, *size)
            return coco_mask.decode(segmentation).astype(bool)
        return polygons_to_bitmask(segmentation, *size)


def load_labelled(name: str, max_images: int | None = None, seed: int = 0) -> LabelledDataset:
    """Check a registered data set and take the images that have annotations.

    Args:
        name: in Detectron2's catalog, with boxes, masks or semantic labels.
        max_images: bound; more are thinned to a sample drawn by the seed, in their order.
        seed: of that sample.

    Raises:
        InputError: the name is not known, the files are faulty, or nothing is annotated.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"max_images is {max_images}; give at least 1, or None for all images.")
    check_registered_dataset(name)
    use_own_loader(name)
    try:
        records = DatasetCatalog.get(name)
    except (OSError, KeyError, AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the data set {name!r} cannot be loaded ({' '.join(str(error).split())}); "
            "check its files below DETECTRON2_DATASETS."
        ) from error
    metadata = MetadataCatalog.get(name)
    records = [r for r in records if r.get("annotations") or r.get("sem_seg_file_name")]
    if not records:
        raise InputError(
            f"the data set {name!r} has no annotations, which every measure compares the features "
            "with; name one that is labelled."
        )
    if max_images is not None and len(records) > max_images:
        chosen = np.random.default_rng(seed).choice(len(records), max_images, replace=False)
        records = [records[i] for i in sorted(chosen)]
    box_classes = tuple(metadata.get("thing_classes", ()))
    if "sem_seg_file_name" in records[0]:
        pixel_classes = tuple(metadata.get("stuff_classes", ()))
    else:
        pixel_classes = ("background", *box_classes)
    _check_categories(name, records, len(box_classes))
    images = [
        LabelledImage(record, name, len(pixel_classes), metadata.get("ignore_label", 255))
        for record in records
    ]
    return LabelledDataset(name, images, box_classes, pixel_classes)


def _check_categories(name: str, records: list[dict[str, Any]], count: int) -> None:
    """A loader of the user's own may give what the check of COCO files never saw."""
    for record in records:
        for annotation in record.get("annotations", []):
            if not 0 <= annotation["category_id"] < count:
                raise InputError(
                    f"{record['file_name']} of {name!r} has an annotation of category "
                    f"{annotation['category_id']}, but `thing_classes` in the metadata names "
                    f"{count}; correct either."
                )
