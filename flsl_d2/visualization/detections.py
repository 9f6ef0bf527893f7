"""Detections beside the ground truth, a row an image."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import Visualizer

from flsl_d2.data.annotations import check_registered_dataset
from flsl_d2.data.datasets import use_own_loader
from flsl_d2.data.images import read_image
from flsl_d2.errors import InputError
from flsl_d2.visualization.figures import (
    enlarge,
    new_figure,
    overlay_masks,
    palette,
    save_figure,
    show_image,
)

# A model: takes (H, W, 3) uint8 BGR like Detectron2's DefaultPredictor and gives what that gives,
# {"instances": Instances}, or the Instances themselves.
Predictor = Callable[[np.ndarray], Any]
# What COCOEvaluator writes to coco_instances_results.json, or the path of that file.
Results = Sequence[dict[str, Any]] | str | os.PathLike[str]


@dataclass(frozen=True)
class DrawnObjects:
    """Objects of one image, ready to be drawn.

    Attributes:
        boxes: (M, 4) float, x0, y0, x1, y1 in pixels of the original image.
        masks: M bool arrays (H, W), or None for each object without a mask.
        classes: M contiguous class numbers.
        scores: M scores in [0, 1], None for ground truth.
    """

    boxes: np.ndarray
    masks: list[np.ndarray | None]
    classes: list[int]
    scores: list[float] | None


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray | None:
    """A COCO segmentation (polygons, RLE of either kind) as bool (H, W); None for none."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(segmentation).astype(bool)


def ground_truth(record: dict[str, Any]) -> DrawnObjects:
    """The annotations of one Detectron2 dataset record; crowds are left out."""
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    size = record["height"], record["width"]
    return DrawnObjects(
        boxes=np.asarray(boxes, float).reshape(-1, 4),
        masks=[decode_mask(a.get("segmentation"), *size) for a in annotations],
        classes=[a["category_id"] for a in annotations],
        scores=None,
    )


def _from_instances(instances: Instances, score_threshold: float) -> DrawnObjects:
    instances = instances.to("cpu")
    instances = instances[instances.scores >= score_threshold]
    masks = instances.pred_masks.numpy() if instances.has("pred_masks") else [None] * len(instances)
    return DrawnObjects(
        boxes=instances.pred_boxes.tensor.detach().numpy().reshape(-1, 4),
        masks=[None if mask is None else mask.astype(bool) for mask in masks],
        classes=instances.pred_classes.tolist(),
        scores=instances.scores.tolist(),
    )


def _from_results(
    results: Sequence[dict[str, Any]],
    record: dict[str, Any],
    score_threshold: float,
    contiguous: dict[int, int] | None,
) -> DrawnObjects:
    own = [
        r for r in results
        if r["image_id"] == record["image_id"] and r["score"] >= score_threshold
    ]  # fmt: skip
    strange = {r["category_id"] for r in own} - set(contiguous) if contiguous else set()
    if strange:
        raise InputError(
            f"the detections have category_id {min(strange)}, which the data set does not: name "
            "the results of an evaluation on this data set."
        )
    boxes = np.asarray([r["bbox"] for r in own], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = record["height"], record["width"]
    return DrawnObjects(
        boxes=boxes,
        masks=[decode_mask(r.get("segmentation"), *size) for r in own],
        classes=[contiguous[r["category_id"]] if contiguous else r["category_id"] for r in own],
        scores=[r["score"] for r in own],
    )


def detector(
    source: Predictor | Results, score_threshold: float, contiguous: dict[int, int] | None
) -> Callable[[dict[str, Any], np.ndarray], DrawnObjects]:
    """A function from a dataset record and its image (BGR) to the detections to draw.

    Args:
        source: a model, or COCO results, or the path of a JSON file with them.
        score_threshold: detections with a lower score are left out.
        contiguous: the dataset's category ids to class numbers, for COCO results.

    Raises:
        InputError: the file of results cannot be read.
    """
    if callable(source):

        def predict(record: dict[str, Any], image_bgr: np.ndarray) -> DrawnObjects:
            output = source(image_bgr)
            instances = output if isinstance(output, Instances) else output["instances"]
            return _from_instances(instances, score_threshold)

        return predict

    if isinstance(source, (str, os.PathLike)):
        try:
            with PathManager.open(os.fspath(source), "r") as stream:
                source = json.load(stream)
        except (OSError, ValueError) as error:
            raise InputError(
                f"the detections {source} cannot be read ({error}): name the "
                "coco_instances_results.json that an evaluation wrote."
            ) from None
    results: Sequence[dict[str, Any]] = source

    def look_up(record: dict[str, Any], image_bgr: np.ndarray) -> DrawnObjects:
        return _from_results(results, record, score_threshold, contiguous)

    return look_up


_SHORTER_SIDE = 384
_PANEL_INCHES = 4.2


def choose_records(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` records spread evenly over those that have objects; always the same ones."""
    having = [r for r in records if any(not a.get("iscrowd") for a in r.get("annotations", []))]
    having = having or records
    chosen = np.linspace(0, len(having) - 1, min(count, len(having))).round().astype(int)
    return [having[i] for i in chosen]


def draw_objects(image: np.ndarray, objects: DrawnObjects, class_names: list[str]) -> np.ndarray:
    """Draw masks, boxes and names on an image, enlarged first if it is small.

    A class has the same colour everywhere. Masks are tinted by our own function, since
    Detectron2's Visualizer fills the holes of a mask.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: in pixels of that image.
        class_names: by class number.

    Returns:
        (H', W', 3) uint8 RGB, the shorter side at least 384 px.
    """
    large, factor = enlarge(image, _SHORTER_SIDE)
    if not objects.classes:
        return large
    colours = palette(max(*objects.classes, len(class_names) - 1) + 1)[objects.classes]
    masked = [i for i, mask in enumerate(objects.masks) if mask is not None]
    large = overlay_masks(large, [objects.masks[i] for i in masked], colours[masked])
    labels = [class_names[c] if c < len(class_names) else str(c) for c in objects.classes]
    if objects.scores is not None:
        pairs = zip(labels, objects.scores, strict=True)
        labels = [f"{label} {score:.0%}" for label, score in pairs]
    # The page shows every image equally wide: text on a large one has to be larger.
    visualizer = Visualizer(large, font_size_scale=max(1.1, large.shape[1] / _SHORTER_SIDE))
    drawn = visualizer.overlay_instances(
        boxes=objects.boxes * factor, labels=labels, assigned_colors=list(colours / 255)
    )
    return drawn.get_image()


def detections_beside_ground_truth(
    dataset_name: str,
    predictor_or_outputs: Predictor | Results,
    path: str | os.PathLike[str],
    num_images: int = 6,
    score_threshold: float = 0.5,
) -> None:
    """Write a page with a row an image: the image, its ground truth, what was detected.

    Args:
        dataset_name: a registered data set in COCO format.
        predictor_or_outputs: either a model that takes (H, W, 3) uint8 BGR and gives `Instances` or
            `{"instances": Instances}` in pixels of that image, as Detectron2's DefaultPredictor
            does; or COCO results (`image_id, category_id, bbox, score, segmentation`), or the path
            of the `coco_instances_results.json` that Detectron2's COCOEvaluator writes.
        path: the PNG to write.
        num_images: rows; the images are spread evenly over those with objects.
        score_threshold: detections with a lower score are not drawn.

    Raises:
        InputError: unknown data set, faulty data set files, unreadable results, or no image.
    """
    check_registered_dataset(dataset_name)
    use_own_loader(dataset_name)
    if num_images < 1:
        raise InputError(f"num_images={num_images} draws nothing: give 1 or more.")
    records = choose_records(DatasetCatalog.get(dataset_name), num_images)
    if not records:
        raise InputError(f"the data set {dataset_name!r} has no image: nothing can be drawn.")
    metadata = MetadataCatalog.get(dataset_name)
    class_names = list(metadata.get("thing_classes", []))
    detect = detector(
        predictor_or_outputs, score_threshold, metadata.get("thing_dataset_id_to_contiguous_id")
    )

    heights = [_PANEL_INCHES * record["height"] / record["width"] for record in records]
    figure = new_figure(3 * _PANEL_INCHES + 0.3, 0.8 + sum(heights) + 0.35 * len(heights))
    figure.suptitle(f"Detections on {dataset_name}", fontsize=15)
    axes = figure.subplots(
        len(records), 3, squeeze=False, gridspec_kw={"height_ratios": [h + 0.3 for h in heights]}
    )
    headings = ("image", "ground truth", f"detections (score at least {score_threshold:.0%})")
    for column, heading in enumerate(headings):
        axes[0, column].set_title(heading, fontsize=12)
    for row, record in zip(axes, records, strict=True):
        bgr = read_image(record["file_name"], "BGR")
        rgb = np.ascontiguousarray(bgr[..., ::-1])
        truth, found = ground_truth(record), detect(record, bgr)
        show_image(row[0], enlarge(rgb, _SHORTER_SIDE)[0], os.path.basename(record["file_name"]))
        show_image(row[1], draw_objects(rgb, truth, class_names), _counted(truth, "object"))
        show_image(row[2], draw_objects(rgb, found, class_names), _counted(found, "detection"))
    save_figure(figure, path)


def _counted(objects: DrawnObjects, noun: str) -> str:
    count = len(objects.classes)
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"
