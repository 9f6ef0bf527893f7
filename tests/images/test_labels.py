"""Label images: read on today's numpy, checked before training."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from flsl_d2.detection.checks import check_datasets
from flsl_d2.errors import InputError
from flsl_d2.images.labels import check_label_images, read_labels


def save(path: Path, values) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


@pytest.fixture
def name(tmp_path):
    """Two pictures of 2 x 4 with three classes."""
    name = f"test_{uuid.uuid4().hex}"
    for i in range(2):
        save(tmp_path / "pictures" / f"{i}.jpg", np.zeros((2, 4, 3)))
        save(tmp_path / "labels" / f"{i}.png", [[0, 0, 1, 1], [2, 2, 255, 255]])
    pictures, labels = str(tmp_path / "pictures"), str(tmp_path / "labels")
    DatasetCatalog.register(name, lambda: load_sem_seg(labels, pictures))
    MetadataCatalog.get(name).set(
        image_root=pictures,
        sem_seg_root=labels,
        stuff_classes=["sky", "grass", "road"],
        ignore_label=255,
        evaluator_type="sem_seg",
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_fitting_labels_pass(name):
    assert check_label_images(name) == 3
    check_datasets([name], [name], 3, "classes=")
    with pytest.raises(InputError, match=r"3 categories \(sky, grass, road\).*set classes=3"):
        check_datasets([name], [name], 150, "classes=")


def test_unprepared_labels_are_found(name, tmp_path):
    save(tmp_path / "labels" / "1.png", [[0, 3, 1, 1], [2, 2, 255, 255]])
    with pytest.raises(InputError, match=r"1\.png has the label 3, but .*classes 0 to 2 and 255"):
        check_label_images(name)
    save(tmp_path / "labels" / "1.png", np.zeros((2, 4, 3)))
    with pytest.raises(InputError, match="one channel"):
        check_label_images(name)


def test_missing_files_are_found(name, tmp_path):
    (tmp_path / "labels" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 pictures without a label image, .*/1\.jpg"):
        check_label_images(name)
    (tmp_path / "labels" / "0.png").unlink()
    (tmp_path / "labels").rmdir()
    with pytest.raises(InputError, match=r"labels of the data set .* does not exist"):
        check_datasets([], [name], 3, "classes=")


def test_detectron2s_evaluator_with_known_answers(name, tmp_path):
    assert read_labels(str(tmp_path / "labels" / "0.png"), dtype=int).dtype == np.dtype(int)
    evaluator = SemSegEvaluator(name, distributed=False, sem_seg_loading_fn=read_labels)
    evaluator.reset()
    predicted = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 0]])  # one of two road pixels is right
    scores = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1).float()
    for i in range(2):
        picture = str(tmp_path / "pictures" / f"{i}.jpg")
        evaluator.process([{"file_name": picture}], [{"sem_seg": scores}])
    result = evaluator.evaluate()["sem_seg"]
    assert result["IoU-sky"] == 100
    assert result["IoU-grass"] == pytest.approx(200 / 3)
    assert result["IoU-road"] == 50
    assert result["mIoU"] == pytest.approx((100 + 200 / 3 + 50) / 3)
    assert result["pACC"] == pytest.approx(500 / 6)


def test_a_data_set_of_ones_own_needs_no_roots_in_its_metadata(name):
    metadata = MetadataCatalog.pop(name)
    MetadataCatalog.get(name).set(
        stuff_classes=metadata.stuff_classes, ignore_label=255, evaluator_type="sem_seg"
    )
    assert check_label_images(name) == 3
