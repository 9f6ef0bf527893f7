"""AP of vehicles on UAVDT (arXiv 1804.00518): PASCAL's AP at IoU 0.7, with ignored regions."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from detectron2.utils import comm
from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

# A detection of which a larger share lies in one ignored region is left out.
MAX_IGNORED_SHARE = 0.5


def average_precision(
    detections: dict[Any, tuple[np.ndarray, np.ndarray]],
    truth: dict[Any, np.ndarray],
    iou_threshold: float,
) -> float:
    """PASCAL VOC's average precision in percent; nan where there are no boxes to find.

    It is that of 2010 and later, the area under the precision envelope. Detections, boxes (N, 4)
    and scores (N,) by image, are taken by falling score. One is right if the true box of its image
    that it overlaps most has an IoU of at least the threshold and was not found before. Boxes are
    x0 y0 x1 y1.
    """
    total = sum(len(boxes) for boxes in truth.values())
    if not total:
        return float("nan")
    scores, right = [], []
    for image, (boxes, image_scores) in detections.items():
        order = np.argsort(-image_scores, kind="stable")
        scores.append(image_scores[order])
        right.append(_right(boxes[order], truth.get(image, np.zeros((0, 4))), iou_threshold))
    if not scores:
        return 0.0
    order = np.argsort(-np.concatenate(scores), kind="stable")
    found = np.cumsum(np.concatenate(right)[order])
    precision = found / np.arange(1, len(found) + 1)
    return 100 * float(voc_ap(found / total, precision))


def _right(boxes: np.ndarray, truth: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Mark the boxes of one image, sorted by falling score, that find an object: (N,) bool."""
    right = np.zeros(len(boxes), bool)
    if not len(truth) or not len(boxes):
        return right
    best, index = pairwise_iou(_boxes(boxes), _boxes(truth)).max(dim=1)
    enough = best >= iou_threshold  # compared in the tensor's precision, where 7 / 10 equals 0.7
    taken: set[int] = set()
    for i, match in enumerate(index.tolist()):
        if enough[i] and match not in taken:
            taken.add(match)
            right[i] = True
    return right


def _boxes(array: np.ndarray) -> Boxes:
    return Boxes(torch.as_tensor(array, dtype=torch.float32).reshape(-1, 4))


class UAVDTEvaluator(DatasetEvaluator):
    """AP of the vehicles of UAVDT.

    A detection that lies in an ignored region by more than half is left out. ``AP70`` (the
    benchmark's threshold) and ``AP50`` (PASCAL's) take car, truck and bus as one class;
    ``AP70-car`` and the like are of single classes, ``mAP70`` and ``mAP50`` the means over the
    classes. Ignored regions are the annotations with ``iscrowd``, as ``tools/convert_uavdt.py``
    writes them. The results were not compared with the benchmark's MATLAB toolkit.

    The registered data set is in COCO's format.
    """

    def __init__(self, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        coco = COCO(metadata.json_file)
        numbers = {category: i for i, category in enumerate(sorted(coco.cats))}
        self._classes = [coco.cats[category]["name"] for category in sorted(coco.cats)]
        # Rows of x0, y0, x1, y1 and the class, by image.
        self._truth: dict[int, list[list[float]]] = defaultdict(list)
        self._ignored: dict[int, list[list[float]]] = defaultdict(list)
        for annotation in coco.dataset["annotations"]:
            left, top, width, height = annotation["bbox"]
            row = [left, top, left + width, top + height, numbers[annotation["category_id"]]]
            rows = self._ignored if annotation["iscrowd"] else self._truth
            rows[annotation["image_id"]].append(row)
        self.reset()

    def reset(self) -> None:
        self._detections: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes, keep = instances.pred_boxes, slice(None)
            ignored = self._ignored.get(image["image_id"])
            if ignored and len(instances):
                share = pairwise_ioa(_boxes(np.array(ignored)[:, :4]), _boxes(boxes.tensor.numpy()))
                keep = (share.max(dim=0).values <= MAX_IGNORED_SHARE).numpy()
            values = (boxes.tensor, instances.scores, instances.pred_classes)
            self._detections.append((image["image_id"], *(v.numpy()[keep] for v in values)))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Compute the scores in percent on rank 0; None on the others."""
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return None
        detections = list(itertools.chain(*gathered))
        results = {}
        for threshold in (0.7, 0.5):
            name = f"AP{threshold * 100:.0f}"
            results[name] = self._ap(detections, threshold)
            by_class = [self._ap(detections, threshold, k) for k in range(len(self._classes))]
            seen = [ap for ap in by_class if not np.isnan(ap)]
            results[f"m{name}"] = float(np.mean(seen)) if seen else float("nan")
            results |= {f"{name}-{c}": ap for c, ap in zip(self._classes, by_class, strict=True)}
        logger.info("UAVDT: %s", ", ".join(f"{k} {v:.2f}" for k, v in results.items()))
        return OrderedDict(uavdt=results)

    def _ap(self, detections: list[Any], threshold: float, only_class: int | None = None) -> float:
        """AP of one class, or of all classes as one, over the images that were processed."""
        found, truth = {}, {}
        for image, boxes, scores, classes in detections:
            rows = np.array(self._truth[image], float).reshape(-1, 5)
            if only_class is not None:
                rows = rows[rows[:, 4] == only_class]
                kept = classes == only_class
                boxes, scores = boxes[kept], scores[kept]
            found[image], truth[image] = (boxes, scores), rows[:, :4]
        return average_precision(found, truth, threshold)
