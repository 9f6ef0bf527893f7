"""Checks of a run's input that need no real data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data.common import DatasetFromList, MapDataset
from PIL import Image
from torch.utils.data import DataLoader

from flsl_d2.annotations import FLSLDatasetMapper, coco_file, register_coco_format
from flsl_d2.detection.checks import CheckedMapper, check_datasets
from flsl_d2.errors import InputError


@pytest.fixture
def registered(tmp_path, request) -> str:
    """Register an image with two categories, one annotation with and one without mask."""
    box = {"image_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {**box, "id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 5]]},
            {**box, "id": 2, "category_id": 2},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    name = f"checked_{request.node.name}"
    register_coco_format(name, tmp_path / "a.json", tmp_path)
    return name


def test_a_fitting_data_set_passes(registered):
    check_datasets([registered], [registered], 2, "classes=")
    check_datasets([registered], [], None, "classes=")


def test_long_checks_give_signs_of_life(registered, caplog, monkeypatch):
    monkeypatch.setattr(coco_file, "LARGE", 0)
    monkeypatch.setattr(coco_file.Heartbeat, "seconds", 0.0)
    monkeypatch.setattr(coco_file.Heartbeat, "every", 1)
    with caplog.at_level("INFO"):
        check_datasets([registered], [], 2, "classes=")
    for what in ("Reading: 5", "Checking annotations: 2", "Opening pictures: 1"):
        assert f"{what} entries so far" in caplog.text


def test_another_number_of_classes_names_both_and_the_override(registered):
    with pytest.raises(InputError, match=r"2 categories \(cat, dog\).*80 classes; set classes=2\."):
        check_datasets([], [registered], 80, "classes=")


@pytest.mark.parametrize("split", [0, 1])
def test_missing_masks_matter_where_they_are_learnt_or_evaluated(split, registered):
    sets = [[registered], []] if split == 0 else [[], [registered]]
    with pytest.raises(InputError, match=r"1 x annotations without a mask, .*: masks=off\): 2"):
        check_datasets(*sets, 2, "classes=", "masks=off")
    check_datasets(*sets, 2, "classes=")


def register(tmp_path, name: str, categories: dict[int, str]) -> str:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
        "categories": [{"id": i, "name": text} for i, text in categories.items()],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
            | {"category_id": min(categories)}
        ],
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    register_coco_format(name, tmp_path / f"{name}.json", tmp_path, replace=True)
    return name


def test_data_sets_of_one_run_have_the_same_categories(tmp_path):
    first = register(tmp_path, "classes_first", {1: "cat", 2: "dog"})
    same = register(tmp_path, "classes_same", {7: "dog", 3: "cat"})  # in the order of their ids
    turned = register(tmp_path, "classes_turned", {1: "dog", 2: "cat"})
    other = register(tmp_path, "classes_other", {1: "cat", 2: "cow"})
    check_datasets([first, same], [same], 2, "classes=")
    for train, test in (([first, turned], []), ([first], [turned])):
        with pytest.raises(InputError, match=r"first'.*turned'.*their order differs"):
            check_datasets(train, test, 2, "classes=")
    with pytest.raises(InputError, match=r"'cow', 'dog'"):
        check_datasets([first, other], [], 2, "classes=")


def broken_mapper(record):
    raise KeyError("bbox")


@pytest.mark.parametrize("mapper", [DatasetMapper, FLSLDatasetMapper])
def test_detectron2s_own_mapper_is_named(mapper, caplog):
    CheckedMapper(mapper(is_train=False, augmentations=[], image_format="RGB"))
    assert ("turns 16-bit images white" in caplog.text) == (mapper is DatasetMapper)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mapper_that_fails_names_the_file_in_one_sentence(num_workers):
    records = MapDataset(DatasetFromList([{"file_name": "a.png"}]), CheckedMapper(broken_mapper))
    loader = DataLoader(records, num_workers=num_workers)
    sentence = r"^the image a\.png or its annotations cannot be used \(KeyError: 'bbox'\); [^\n]*$"
    with pytest.raises(InputError, match=sentence):
        next(iter(loader))
