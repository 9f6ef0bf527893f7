"""Detections beside the ground truth, a row an image."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer

from flsl_d2.data.annotations import check_registered_dataset
from flsl_d2.errors import InputError
from flsl_d2.visualization.detection_outputs import (
    DrawnObjects,
    Predictor,
    Results,
    detector,
    ground_truth,
)
from flsl_d2.visualization.figure_files import new_figure, save_figure, show_image
from flsl_d2.visualization.overlays import enlarge, overlay_masks, palette

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
