"""Strangers' files: they train and evaluate, or one true sentence says before why not.

``QUIRKY_FILES=2000 pytest tests/annotations/test_quirky_files.py`` draws that many files anew.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quirky_coco import Coco, plain_coco, quirky_files, write_files

import flsl_d2.annotations.checks
from flsl_d2.annotations import (
    FLSLDatasetMapper,
    Use,
    check_registered_dataset,
    register_coco_format,
)
from flsl_d2.detection.coco_evaluator import FLSLCOCOEvaluator
from flsl_d2.errors import InputError
from flsl_d2.images.listing import image_files

FILES = int(os.environ.get("QUIRKY_FILES", 0))

AUGMENTATIONS = [T.ResizeShortestEdge(40, 90), T.RandomFlip()]
CROPS = [T.RandomCrop("relative_range", (0.6, 0.6)), T.ResizeShortestEdge(40, 90)]
MAPPERS = {
    (masks, crops): FLSLDatasetMapper(
        is_train=True,
        augmentations=CROPS if crops else AUGMENTATIONS,
        image_format="BGR",
        use_instance_mask=True,
        recompute_boxes=crops,
    )
    for masks in (False, True)
    for crops in (False, True)
}


@contextmanager
def logged() -> Iterator[list[str]]:
    """Messages of the package from WARNING up."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("flsl_d2")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@contextmanager
def registered(json_file: Path, root: Path) -> Iterator[str]:
    name = f"quirky_{uuid.uuid4().hex}"
    register_coco_format(name, json_file, root)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def train(name: str, masks: bool, crops: bool) -> int:
    """Map every image as a training step does, with the targets of the mask head.

    Returns:
        The number of objects that are learned, where no crop may cut them off.
    """
    objects = 0
    for record in get_detection_dataset_dicts(name, filter_empty=True):
        mapped = MAPPERS[masks, crops](record)
        instances = mapped["instances"]
        objects += len(instances)
        assert mapped["image"].dtype == torch.uint8
        assert torch.isfinite(instances.gt_boxes.tensor).all()
        if masks and len(instances):
            instances.gt_masks.crop_and_resize(instances.gt_boxes.tensor, 14)
    return objects


def evaluate(name: str, masks: bool) -> dict[str, Any]:
    """COCO's evaluation of made-up detections of every class in every image."""
    records = DatasetCatalog.get(name)
    evaluator = FLSLCOCOEvaluator(name, output_dir=None)
    evaluator.reset()
    mapper = FLSLDatasetMapper(is_train=False, augmentations=AUGMENTATIONS[:1], image_format="BGR")
    classes = len(MetadataCatalog.get(name).thing_classes)
    for record in records:
        mapped = mapper(record)
        found = Instances((record["height"], record["width"]))
        found.pred_boxes = Boxes(torch.tensor([[2.0, 3.0, 11.0, 11.0]] * classes))
        found.scores = torch.full((classes,), 0.9)
        found.pred_classes = torch.arange(classes)
        if masks:
            found.pred_masks = torch.zeros(classes, *found.image_size, dtype=torch.bool)
            found.pred_masks[:, 3:11, 2:11] = True
        evaluator.process([mapped], [{"instances": found}])
    return evaluator.evaluate()


def reported_losses(messages: list[str]) -> int:
    left_out = [m for m in messages if m.endswith("they are left out.")]
    return sum(int(re.search(r": (\d+) x ", message)[1]) for message in left_out)


def run(coco: Coco, kinds: list[str], encoding: str, use: Use, crops: bool, folder: Path) -> str:
    """Use a data set as a run does; what became of it."""
    json_file, root = write_files(folder, coco, kinds, encoding)
    checked = False
    with registered(json_file, root) as name, logged() as messages:
        try:
            if not use:
                assert len(image_files(name=name)) == len(coco["images"])
                return "pictures"
            check_registered_dataset(name, use, open_pictures=True, image_format="BGR")
            checked = True
            if use & Use.BOXES:
                objects = train(name, bool(use & Use.MASKS), crops)
                expected = sum(not a.get("iscrowd") for a in coco["annotations"])
                if not crops:
                    assert objects == expected - reported_losses(messages)
            if use & Use.EVALUATION:
                evaluate(name, bool(use & Use.MASKS))
        except InputError as error:
            text = str(error)
            text.encode()  # a terminal can show it
            # The header of a picture that is cut off shows nothing, so that it is found late.
            if checked and "cut" not in kinds:
                pytest.fail(f"found late: {text}")
            names_file = str(folder) in text
            one_sentence = text.count("\n") == text.count("\n  - ") and "Traceback" not in text
            if not (names_file and one_sentence):
                pytest.fail(text)
            return "refused"
    assert not any("\n" in message for message in messages)
    "".join(messages).encode()
    return "used with a word" if messages else "used"


USES = [
    Use.BOXES,
    Use.EVALUATION,
    Use.BOXES | Use.MASKS,
    Use.EVALUATION | Use.MASKS,
    Use.BOXES | Use.MASKS | Use.EVALUATION,
    Use.PICTURES,
]


def test_a_file_is_used_or_refused_in_one_sentence() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=FILES or 120,
        deadline=None,
        derandomize=not FILES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        file=quirky_files(), use=st.sampled_from(USES), crops=st.booleans(),
        lenient=st.booleans(), seed=st.integers(0, 99),
    )  # fmt: skip
    def use_one(
        file: tuple[Coco, list[str], str], use: Use, crops: bool, lenient: bool, seed: int
    ) -> None:
        np.random.seed(seed)
        share = flsl_d2.annotations.checks.MAX_UNUSABLE_SHARE
        flsl_d2.annotations.checks.MAX_UNUSABLE_SHARE = 0.99 if lenient else share
        try:
            with tempfile.TemporaryDirectory() as folder:
                outcomes[run(*file, use, crops, Path(folder))] += 1
        finally:
            flsl_d2.annotations.checks.MAX_UNUSABLE_SHARE = share

    use_one()
    print(dict(outcomes))
    assert outcomes.keys() == {"pictures", "refused", "used", "used with a word"}


@pytest.mark.parametrize("use", USES)
def test_a_plain_file_is_used(use: Use, tmp_path: Path) -> None:
    coco = plain_coco(3)
    assert run(coco, ["RGB"] * 3, "utf-8", use, False, tmp_path) in ("used", "pictures")
