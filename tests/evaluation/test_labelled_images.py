"""What annotations say about pixels, and what is wrong with data sets."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from labelled_rectangles import CLASSES, PATCH, SIZE, annotation, record
from pycocotools import mask as coco_mask

from flsl_d2.annotations import register_coco_format
from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledImage, load_labelled


@pytest.fixture
def name():
    name = f"test_{uuid.uuid4().hex}"
    yield name
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)


def image_of(annotations: list[dict]) -> LabelledImage:
    return LabelledImage({**record(), "annotations": annotations}, "made", len(CLASSES) + 1)


def test_smaller_instances_are_in_front_and_crowds_behind() -> None:
    small, large = annotation((2, 2, 3, 3), 0), annotation((1, 1, 5, 5), 1)
    crowd = annotation((0, 0, 8, 6), 0, iscrowd=1)
    for order in ([small, large, crowd], [crowd, large, small]):
        image = image_of(order)
        centres = image.semantic[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        assert centres[2, 2] == 1
        assert centres[1, 1] == centres[4, 4] == 2
        assert centres[0, 0] == centres[5, 7] == -1
        segments = image.segments[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        assert segments[2, 2] == 1 + order.index(small)
        assert segments[1, 1] == 1 + order.index(large)


@pytest.mark.parametrize("compressed", [True, False])
def test_run_length_masks(compressed: bool) -> None:
    mask = np.zeros(SIZE, dtype=np.uint8, order="F")
    mask[5:20, 7:30] = 1
    code = coco_mask.encode(mask)
    if not compressed:
        runs = np.diff(np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=2, append=2)))
        code = {"size": list(SIZE), "counts": runs.tolist()}
    image = image_of([{**annotation((0, 0, 1, 1), 1), "segmentation": code}])
    assert ((image.semantic == 2) == mask.astype(bool)).all()


def semantic_data(folder: Path, name: str, values: np.ndarray) -> None:
    cv2.imwrite(str(folder / "image.png"), np.zeros((*values.shape, 3), np.uint8))
    cv2.imwrite(str(folder / "labels.png"), values)
    entry = {
        "file_name": str(folder / "image.png"),
        "sem_seg_file_name": str(folder / "labels.png"),
        "height": values.shape[0],
        "width": values.shape[1],
    }
    DatasetCatalog.register(name, lambda: [dict(entry)])
    MetadataCatalog.get(name).set(stuff_classes=["sky", "sea"], ignore_label=255)


def test_semantic_labels(tmp_path: Path, name: str) -> None:
    values = np.zeros((20, 30), dtype=np.uint8)
    values[10:], values[:, :5] = 1, 255
    semantic_data(tmp_path, name, values)
    data = load_labelled(name)
    assert data.pixel_classes == ("sky", "sea")
    assert data.box_classes == ()
    image = data.images[0]
    assert (image.semantic[:, :5] == -1).all()
    assert set(np.unique(image.semantic)) == {-1, 0, 1}
    assert set(np.unique(image.segments)) == {-1, 1, 2}


def test_semantic_labels_of_unknown_classes_are_refused(tmp_path: Path, name: str) -> None:
    semantic_data(tmp_path, name, np.full((20, 30), 7, dtype=np.uint8))
    with pytest.raises(InputError, match=r"value 7, but .* has 2 classes"):
        load_labelled(name).images[0].semantic  # noqa: B018


def coco_file(folder: Path, change=lambda content: None) -> Path:
    cv2.imwrite(str(folder / "a.png"), np.zeros((*SIZE, 3), np.uint8))
    square = {"id": 1, "image_id": 1, "category_id": 3, "area": 256, "iscrowd": 0}
    square |= {"bbox": [8, 8, 16, 16], "segmentation": [[8, 8, 24, 8, 24, 24, 8, 24]]}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [square],
    }
    change(content)
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].clear(), "annotations"),
        (lambda c: c["annotations"][0].update(category_id=9), "category 9"),
        (lambda c: c["images"][0].update(file_name="b.png"), "missing"),
    ],
)
def test_faulty_coco_files_are_refused(tmp_path: Path, name: str, change, message: str) -> None:
    register_coco_format(name, coco_file(tmp_path, change), tmp_path)
    with pytest.raises(InputError, match=message):
        load_labelled(name)


def test_a_data_set_is_named_by_its_files(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    named = load_labelled(f"{path}:{tmp_path}")
    assert [Path(image.record["file_name"]) for image in named.images] == [tmp_path / "a.png"]
    assert named.box_classes == ("thing",)


def test_unknown_names_and_sizes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not registered"):
        load_labelled(name)
    register_coco_format(name, coco_file(tmp_path), tmp_path)
    with pytest.raises(InputError, match="max_images is 0"):
        load_labelled(name, max_images=0)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(InputError, match=r"a\.png'.* cannot be used"):
        load_labelled(name).images[0].read()


def test_categories_that_the_metadata_does_not_name_are_refused(name: str) -> None:
    DatasetCatalog.register(name, lambda: [record()])
    MetadataCatalog.get(name).set(thing_classes=["only one"])
    with pytest.raises(InputError, match="category 1, but `thing_classes`"):
        load_labelled(name)


def test_sample_of_images_follows_the_seed(datasets_root: Path) -> None:
    names = [
        [i.record["file_name"] for i in load_labelled("pennfudan_train", 10, seed).images]
        for seed in (0, 0, 1)
    ]
    assert names[0] == names[1] == sorted(set(names[0])) != names[2]
    assert len(names[0]) == 10
