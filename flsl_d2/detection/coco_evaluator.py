"""COCO's evaluation on annotations as the project reads them, by the fastest code installed."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flsl_d2.annotations.records import read_coco_api

_EMPTY = '{"images": [], "annotations": [], "categories": []}'
_HAS_FASTER = importlib.util.find_spec("faster_coco_eval") is not None
_COMPILED = coco_evaluation.COCOeval_opt
_HAS_COMPILED = _COMPILED is not COCOeval


def coco_eval(truth: COCO, found: COCO, kind: str) -> COCOeval:
    """Make the object that computes COCO's figures of ``bbox``, ``segm`` or ``keypoints``.

    Detectron2's compiled evaluator is taken where it was built, else ``faster-coco-eval`` (extra
    ``evaluation``) for boxes and masks, else pycocotools, which alone takes ids that are no
    numbers. The figures are the same.
    """
    if _HAS_COMPILED:
        return _COMPILED(truth, found, kind)
    numbers = all(isinstance(key, (int, float)) for key in (*truth.imgs, *truth.cats))
    if _HAS_FASTER and numbers and kind in ("bbox", "segm"):
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster

        return COCOeval_faster(truth, found, kind)
    return COCOeval(truth, found, kind)


def evaluate_coco(truth: COCO, results: Sequence[dict[str, Any]], kind: str) -> COCOeval | None:
    """Evaluate detections in COCO's results format as ``bbox`` or ``segm``, without printing.

    ``stats`` and ``eval["precision"]`` of the result hold the figures; without detections, which
    pycocotools cannot take, it is None.
    """
    if not results:
        return None
    if kind == "segm":  # a mask counts by its own area and not by that of its box
        results = [{k: v for k, v in each.items() if k != "bbox"} for each in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = coco_eval(truth, truth.loadRes([dict(each) for each in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


class FLSLCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator with the project's reader of annotations and :func:`coco_eval`.

    pycocotools, which Detectron2 reads annotations with, refuses a byte order mark and sizes such
    as 96.0, and takes polygons of two points for boxes.
    """

    def __init__(self, dataset_name: str, *arguments: Any, **keywords: Any) -> None:
        self._fast = keywords.setdefault("use_fast_impl", True)
        keywords["use_fast_impl"] = self._fast and _HAS_COMPILED
        metadata = MetadataCatalog.get(dataset_name)
        json_file = metadata.get("json_file")
        if json_file is None:
            super().__init__(dataset_name, *arguments, **keywords)
            return
        # Detectron2 reads a file in its constructor, whatever it contains.
        stand_in = f"{dataset_name}_{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory() as folder:
            empty = Path(folder, "empty.json")
            empty.write_text(_EMPTY)
            MetadataCatalog.get(stand_in).set(json_file=str(empty))
            try:
                super().__init__(stand_in, *arguments, **keywords)
            finally:
                MetadataCatalog.remove(stand_in)
        self._metadata = metadata
        self._coco_api = read_coco_api(json_file)
        self._do_evaluation = "annotations" in self._coco_api.dataset

    def _eval_predictions(self, predictions: list[Any], img_ids: Any = None) -> None:
        self._use_fast_impl = self._fast and (_HAS_COMPILED or _HAS_FASTER)
        # Detectron2 has no argument for the class that it computes with.
        own = coco_evaluation.COCOeval_opt
        coco_evaluation.COCOeval_opt = coco_eval
        try:
            super()._eval_predictions(predictions, img_ids)
        finally:
            coco_evaluation.COCOeval_opt = own
