"""Labelled data sets as the measures use them: images with classes of pixels, objects or images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco_mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from flsl_d2.annotations import check_registered_dataset
from flsl_d2.annotations.datasets import register_known, use_own_loader
from flsl_d2.errors import InputError
from flsl_d2.evaluation.benchmarks import IGNORED as IGNORED
from flsl_d2.evaluation.benchmarks import register_benchmarks
from flsl_d2.evaluation.features import read_for
from flsl_d2.images.labels import read_labels
from flsl_d2.images.listing import find_images
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import picture_size
from flsl_d2.modeling import InputFormat


class LabelledBox(NamedTuple):
    """A box in pixels, (x0, y0, x1, y1), and the index of its class."""

    box: tuple[float, float, float, float]
    category: int


class LabelledDataset(NamedTuple):
    """A labelled data set, or a part of it: the images with labels, and names of classes, if any.

    The class `background`, every pixel that no instance covers, comes before those of instances.
    """

    name: str
    images: list[LabelledImage]
    box_classes: tuple[str, ...] = ()
    pixel_classes: tuple[str, ...] = ()
    image_classes: tuple[str, ...] = ()


@dataclass
class LabelledImage:
    """One image and what its annotations say; files are read when they are asked for.

    The record is Detectron2's standard dict, and optionally has ``image_class``, the index of the
    class of the whole image. ``values`` are the class of each value of a label image, or of
    background and each class of boxes; None where the values are classes.
    """

    record: dict[str, Any]
    dataset: str
    num_pixel_classes: int = 0
    ignore_label: int = 255
    values: np.ndarray | None = None

    def read(self, taken: InputFormat | None = None) -> np.ndarray:
        """Read the image upright: (H, W, 3) uint8 RGB, or as an encoder takes it; or InputError."""
        name = self.record["file_name"]
        image = read_for(taken or InputFormat(), name)
        height, width = image.shape[:2]
        expected = self.record.get("height", height), self.record.get("width", width)
        if (height, width) != expected:
            raise InputError(
                f"the image '{printable(name)}' of {self.dataset!r} cannot be used (it has "
                f"{height} x {width} pixels, and the annotations say {expected[0]} x "
                f"{expected[1]}); replace it or correct the annotations."
            )
        return image

    @cached_property
    def semantic(self) -> np.ndarray:
        """Class of every pixel, (H, W) int64, `IGNORED` where there is none.

        Instances are merged by class: 0 is background, class c of the boxes is c + 1.
        """
        file_name = self.record.get("sem_seg_file_name")
        if file_name is None:
            classes = np.array(self._pixel_classes())
            return np.where(self.segments == IGNORED, IGNORED, classes[self.segments])
        if "height" in self.record and "width" in self.record:
            size = self.record["height"], self.record["width"]
        else:
            size = picture_size(PathManager.get_local_path(self.record["file_name"]))[0]
        labels = read_labels(file_name, dtype="int64", size=size)
        labels[labels == self.ignore_label] = IGNORED
        if self.values is not None:
            labels = self.values[labels]
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

        Segment 0 is what no instance covers, and i + 1 is instance i; smaller ones are in front,
        and crowds ignored. In data without instances each class is a segment.
        """
        if "annotations" not in self.record and "sem_seg_file_name" in self.record:
            return np.where(self.semantic == IGNORED, IGNORED, self.semantic + 1)
        painted = np.zeros((self.record["height"], self.record["width"]), dtype=np.int64)
        masks = []
        for annotation in self._annotations:
            mask = decode_mask(annotation.get("segmentation"), *painted.shape)
            if mask is None:
                raise InputError(
                    f"the data set {self.dataset!r} has annotations without masks, for example in "
                    f"{self.record['file_name']}; use one with masks or semantic labels."
                )
            masks.append(mask)
        crowds = [bool(annotation.get("iscrowd", 0)) for annotation in self._annotations]
        # Crowds are painted first and small masks last, so that small objects are in front.
        for i in sorted(range(len(masks)), key=lambda i: (not crowds[i], -masks[i].sum())):
            painted[masks[i]] = IGNORED if crowds[i] else i + 1
        return painted

    @property
    def boxes(self) -> list[LabelledBox]:
        """Boxes that have an area, crowds left out."""
        boxes = []
        for annotation in self._annotations:
            if annotation.get("iscrowd", 0) or "bbox" not in annotation:
                continue
            mode = annotation.get("bbox_mode", BoxMode.XYWH_ABS)
            x0, y0, x1, y1 = BoxMode.convert(list(annotation["bbox"]), mode, BoxMode.XYXY_ABS)
            if x1 > x0 and y1 > y0:
                boxes.append(LabelledBox((x0, y0, x1, y1), annotation["category_id"]))
        return boxes

    @property
    def largest_box(self) -> LabelledBox | None:
        """The box of the largest area, if there is one."""
        areas = [(b.box[2] - b.box[0]) * (b.box[3] - b.box[1]) for b in self.boxes]
        return self.boxes[areas.index(max(areas))] if areas else None

    @property
    def objects(self) -> list[tuple[np.ndarray, int]]:
        """Visible pixels (H, W) bool and class of pixels of every instance, crowds left out."""
        classes = enumerate(self._pixel_classes()[1:], 1)
        visible = [(self.segments == segment, category) for segment, category in classes]
        return [(mask, category) for mask, category in visible if mask.any()]

    def _pixel_classes(self) -> list[int]:
        """Classes of the background and of every instance."""
        classes = [0, *(annotation["category_id"] + 1 for annotation in self._annotations)]
        return classes if self.values is None else self.values[classes].tolist()

    @property
    def _annotations(self) -> list[dict[str, Any]]:
        return self.record.get("annotations", [])


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """Decode polygons or run lengths to bool (H, W); None for no segmentation."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def load_labelled(name: str, max_images: int | None = None, seed: int = 0) -> LabelledDataset:
    """Load a labelled data set and check its labels.

    The name is one of Detectron2's catalog; or ``ANNOTATIONS.json:IMAGES``, a file in COCO format
    and the folder of its images; or a folder with a subfolder of images for each class. More than
    ``max_images`` are thinned to a sample drawn by the seed, in their order.
    """
    if max_images is not None and max_images < 1:
        raise InputError(f"max_images is {max_images}; give at least 1, or None for all images.")
    register_known(name)
    folder = Path(name).expanduser()
    is_folder = name not in DatasetCatalog and folder.is_dir()
    dataset = _load_class_folders(folder) if is_folder else _load_registered(name)
    if max_images is not None and len(dataset.images) > max_images:
        chosen = np.random.default_rng(seed).choice(len(dataset.images), max_images, replace=False)
        dataset = dataset._replace(images=[dataset.images[i] for i in sorted(chosen)])
    return dataset


def _load_class_folders(folder: Path) -> LabelledDataset:
    files = [Path(file) for file in find_images(folder)]
    if loose := [file for file in files if file.parent == folder]:
        raise InputError(
            f"the folder '{folder}' holds images that are in no folder of a class, for example "
            f"{loose[0].name}; give a folder with a subfolder of images for each class."
        )
    names = [file.relative_to(folder).parts[0] for file in files]
    classes = tuple(sorted(set(names)))
    images = [
        LabelledImage({"file_name": str(file), "image_class": classes.index(name)}, str(folder))
        for file, name in zip(files, names, strict=True)
    ]
    return LabelledDataset(str(folder), images, image_classes=classes)


def _load_registered(name: str) -> LabelledDataset:
    register_benchmarks()
    check_registered_dataset(name)
    use_own_loader(name)
    try:
        records = DatasetCatalog.get(name)
    except InputError:
        raise
    except (OSError, KeyError, AssertionError, ValueError) as error:
        raise InputError(
            f"the data set {name!r} cannot be loaded ({' '.join(str(error).split())}); "
            "check its files below DETECTRON2_DATASETS."
        ) from error
    metadata = MetadataCatalog.get(name)
    labels = ("annotations", "sem_seg_file_name", "pair")
    records = [record for record in records if any(record.get(key) for key in labels)]
    if not records:
        raise InputError(
            f"the data set {name!r} has no annotations, which every measure compares the features "
            "with; name one that is labelled."
        )
    box_classes = tuple(metadata.get("thing_classes", ()))
    pixel_classes = ("background", *box_classes)
    if "sem_seg_file_name" in records[0] or metadata.get("label_values"):
        pixel_classes = tuple(metadata.get("stuff_classes", ()))
    for record in records:  # the check of COCO files does not see a user's own loader
        for annotation in record.get("annotations", []):
            if not 0 <= annotation["category_id"] < len(box_classes):
                raise InputError(
                    f"{record['file_name']} of {name!r} has an annotation of category "
                    f"{annotation['category_id']}, but `thing_classes` in the metadata names "
                    f"{len(box_classes)}; correct either."
                )
    values = np.array(metadata.label_values) if metadata.get("label_values") else None
    settings = len(pixel_classes), metadata.get("ignore_label", 255), values
    images = [LabelledImage(record, name, *settings) for record in records]
    return LabelledDataset(name, images, box_classes, pixel_classes)
