"""ImageNet's box annotations in their official layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.annotations.imagenet_boxes import load_imagenet_boxes, register_imagenet_boxes
from flsl_d2.errors import InputError
from flsl_d2.evaluation import measure_features
from flsl_d2.evaluation.labelled_images import load_labelled
from flsl_d2.modeling import FLSLViT

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def put(root: Path, split: str, wnid: str, image: str, *boxes, flat: bool = False) -> None:
    picture = root / split / wnid / f"{image}.JPEG"
    folder = root / "annotations" / split
    xml = (folder if flat else folder / wnid) / f"{image}.xml"
    for path in (picture, xml):
        path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.full((60, 80, 3), 30 + 200 * (wnid == "n02"), np.uint8)
    cv2.imwrite(str(picture.with_suffix(".jpg")), colour)
    picture.with_suffix(".jpg").rename(picture)
    objects = "".join(OBJECT.format(wnid, *box) for box in boxes)
    size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
    xml.write_text(f"<annotation><filename>{image}</filename>{size}{objects}</annotation>")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for wnid in ("n01", "n02"):
        for i in range(3):
            put(tmp_path, "train", wnid, f"{wnid}_{i}", (5, 5, 50, 45), (0, 0, 10, 10))
        put(tmp_path, "val", wnid, f"ILSVRC2012_val_{wnid}", (10, 10, 70, 50), flat=True)
    return tmp_path


@pytest.fixture
def registered(root: Path):
    register_imagenet_boxes(root, "test_boxes", replace=True)
    yield
    for name in ("test_boxes_train", "test_boxes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_both_layouts_are_read(root: Path, registered: None) -> None:
    train, val = load_labelled("test_boxes_train"), load_labelled("test_boxes_val")
    assert train.box_classes == val.box_classes == ("n01", "n02")
    assert [image.largest_box.category for image in train.images] == [0] * 3 + [1] * 3
    assert train.images[0].largest_box.box == (5, 5, 50, 45)
    assert [image.largest_box.category for image in val.images] == [0, 1]
    assert val.images[1].read().shape == (60, 80, 3)


def test_box_knn_runs_on_them(registered: None) -> None:
    """Dark and bright images: a random encoder tells them apart."""
    encoder = FLSLViT(img_size=32, embed_dim=32, depth=1, num_heads=2)
    scores = measure_features(
        encoder, "test_boxes_train", "test_boxes_val", ["knn_box"], short_side=48
    )
    assert scores["knn_box/k10_top1"] == 100
    with pytest.raises(InputError, match="without masks"):
        measure_features(
            encoder, "test_boxes_train", "test_boxes_val", ["knn_segmentation"], short_side=48
        )


def test_images_without_xml_and_xml_without_image_are_left_out(root: Path) -> None:
    (root / "train" / "n01" / "n01_0.JPEG").unlink()
    (root / "annotations" / "train" / "n02" / "n02_2.xml").unlink()
    records, _ = load_imagenet_boxes(root / "train", root / "annotations" / "train")
    assert [Path(r["file_name"]).stem for r in records] == ["n01_1", "n01_2", "n02_0", "n02_1"]


def test_faults_are_sentences(root: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_imagenet_boxes(root / "train", root / "nowhere")
    xml = root / "annotations" / "train" / "n01" / "n01_0.xml"
    xml.write_text(xml.read_text().replace("n01<", "n99<"))
    with pytest.raises(InputError, match="class 'n99'"):
        load_imagenet_boxes(root / "train", root / "annotations" / "train")
    for text, message in (
        ("<annotation><object></object></annotation>", "no label"),
        ("<annotation></annotation>", "states no size"),
        ("<x/>", "no ImageNet box annotations"),
        ("no xml", "not whole XML"),
    ):
        xml.write_text(text)
        with pytest.raises(InputError, match=message):
            load_imagenet_boxes(root / "train", root / "annotations" / "train")


def test_a_users_own_name_is_left_alone(root: Path, registered: None) -> None:
    kept = DatasetCatalog["test_boxes_val"]
    register_imagenet_boxes(root / "elsewhere", "test_boxes")
    assert DatasetCatalog["test_boxes_val"] is kept
