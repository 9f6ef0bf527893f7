"""COCO's evaluation on annotations as the project reads them."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from flsl_d2.data.coco_records import read_coco_api

__all__ = ["FLSLCOCOEvaluator"]

_EMPTY = '{"images": [], "annotations": [], "categories": []}'


class FLSLCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, except that the annotation file is read by the project's reader.

    pycocotools, which Detectron2 reads it with, refuses a byte order mark and sizes such as 96.0,
    and takes polygons of two points for boxes.

    Args:
        dataset_name: registered data set in COCO format.
        *arguments: further arguments of Detectron2's evaluator.
        **keywords: likewise.
    """

    def __init__(self, dataset_name: str, *arguments: Any, **keywords: Any) -> None:
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
