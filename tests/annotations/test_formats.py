"""Annotations of other formats: recognised by content, and converted to the boxes they mean."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from flsl_d2.annotations.annotations import check_coco_files
from flsl_d2.annotations.findings import Use
from flsl_d2.annotations.formats import convert_to_coco, recognise_annotations
from flsl_d2.errors import InputError

pytest.importorskip("supervision")
pytest.importorskip("globox")
WIDTH, HEIGHT = 64, 48
BOX = [8.0, 12.0, 16.0, 24.0]  # x, y, width, height of the one object of each picture


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two pictures of one name in two folders."""
    root = tmp_path / "images"
    for folder in ("train", "val"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / folder / "a.png")
    return root


def voc(root: Path) -> Path:
    x, y, w, h = BOX
    for folder in ("train", "val"):
        (root / "labels" / folder).mkdir(parents=True)
        (root / "labels" / folder / "a.xml").write_text(
            f"<annotation><filename>a.png</filename><size><width>{WIDTH}</width>"
            f"<height>{HEIGHT}</height><depth>3</depth></size><object><name>nut</name><bndbox>"
            f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox>"
            "</object></annotation>"
        )
    return root / "labels"


def cvat(root: Path) -> Path:
    x, y, w, h = BOX
    entries = "".join(
        f'<image id="{i}" name="{folder}/a.png" width="{WIDTH}" height="{HEIGHT}">'
        f'<box label="nut" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>'
        '<points label="nut" points="1,1"/></image>'
        for i, folder in enumerate(("train", "val"))
    )
    (root / "annotations.xml").write_text(f"<annotations>{entries}</annotations>")
    return root / "annotations.xml"


def labelme(root: Path) -> Path:
    x, y, w, h = BOX
    for folder in ("train", "val"):
        (root / "labels" / folder).mkdir(parents=True)
        shape = {"label": "nut", "shape_type": "rectangle", "points": [[x, y], [x + w, y + h]]}
        content = {"shapes": [shape], "imagePath": "a.png", "imageData": None}
        (root / "labels" / folder / "a.json").write_text(json.dumps(content))
    return root / "labels"


def yolo(root: Path) -> Path:
    x, y, w, h = BOX
    numbers = (x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT
    for folder in ("train", "val"):
        (root / "labels" / folder).mkdir(parents=True)
        (root / "labels" / folder / "a.txt").write_text(f"1 {' '.join(map(str, numbers))}\n")
    (root / "data.yaml").write_text("names: {0: bolt, 1: nut}\n")
    return root / "labels"


@pytest.mark.parametrize(
    ("write", "kind"), [(voc, "Pascal VOC"), (cvat, "CVAT"), (labelme, "LabelMe"), (yolo, "YOLO")]
)
def test_boxes_of_every_format(write, kind, images, tmp_path):
    source = recognise_annotations(write(tmp_path))
    assert source.kind == kind
    sentence = convert_to_coco(source, images, tmp_path / "all.json")
    assert f"{kind} annotations: 2 objects of 1 classes in 2 pictures" in sentence
    assert ("2 shapes of the kind points" in sentence) == (kind == "CVAT")
    coco = json.loads((tmp_path / "all.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == ["train/a.png", "val/a.png"]
    assert coco["categories"] == [{"id": 1, "name": "nut"}]
    for annotation in coco["annotations"]:
        np.testing.assert_allclose(annotation["bbox"], BOX, atol=1e-4)  # YOLO's in float32
    use = Use.BOXES | Use.EVALUATION
    assert check_coco_files(tmp_path / "all.json", images, use, open_pictures=True) == ["nut"]


def test_polygons_become_masks(images, tmp_path):
    points = [[10, 10], [30, 10], [30, 30]]
    (tmp_path / "m").mkdir()
    shape = {"label": "nut", "shape_type": "polygon", "points": points}
    content = {"shapes": [shape], "imagePath": "../images/train/a.png"}
    (tmp_path / "m" / "a.json").write_text(json.dumps(content))
    relative = " ".join(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "classes.txt").write_text("nut\n")
    (tmp_path / "y" / "a.txt").write_text(f"0 {relative}\n")
    corners = ";".join(f"{x},{y}" for x, y in points)
    (tmp_path / "c.xml").write_text(
        f'<annotations><image id="0" name="train/a.png" width="{WIDTH}" height="{HEIGHT}">'
        f'<polygon label="nut" points="{corners}"/></image></annotations>'
    )
    for source in ("m", "y", "c.xml"):
        convert_to_coco(recognise_annotations(tmp_path / source), images, tmp_path / "all.json")
        (annotation,) = json.loads((tmp_path / "all.json").read_text())["annotations"]
        mask = mask_util.decode(annotation["segmentation"])
        assert mask.shape == (HEIGHT, WIDTH)
        # Its rim has 20 + 20 + 28 pixels, of which about half are inside.
        assert mask.sum() == annotation["area"] == pytest.approx(200, abs=34)
        np.testing.assert_allclose(annotation["bbox"], [10, 10, 20, 20], atol=1e-3)
        check_coco_files(tmp_path / "all.json", images, Use.BOXES | Use.MASKS)


def test_a_second_part_gets_the_classes_of_the_first(images, tmp_path):
    convert_to_coco(recognise_annotations(voc(tmp_path)), images, tmp_path / "a.json", ["bolt"])
    coco = json.loads((tmp_path / "a.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["bolt", "nut"]
    assert {annotation["category_id"] for annotation in coco["annotations"]} == {2}


def test_coco_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert recognise_annotations(tmp_path / "a.json").kind == "COCO"


def test_what_cannot_be_converted_is_one_sentence(images, tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        recognise_annotations(tmp_path / "none")
    with pytest.raises(InputError, match="no annotations of a known format"):
        recognise_annotations(images)
    labels = yolo(tmp_path)
    with pytest.raises(InputError, match="give the folder"):
        recognise_annotations(voc(tmp_path / "v") / "train" / "a.xml")
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(InputError, match="no class names"):
        convert_to_coco(recognise_annotations(labels), images, tmp_path / "all.json")
    (labels / "classes.txt").write_text("nut\n")
    with pytest.raises(InputError, match="has class 1, and there are 1 class names"):
        convert_to_coco(recognise_annotations(labels), images, tmp_path / "all.json")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "b.png")
    with pytest.raises(InputError, match="no box of a picture"):
        convert_to_coco(recognise_annotations(labels), tmp_path / "other", tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()
