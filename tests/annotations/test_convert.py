"""Annotations of other formats: recognised by content, and converted to the boxes they mean."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from flsl_d2.annotations.checks import check_coco_files
from flsl_d2.annotations.convert import convert_to_coco, recognise_annotations
from flsl_d2.annotations.findings import Use
from flsl_d2.errors import InputError

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
    coco, account = convert_to_coco(source, images)
    assert f"{kind} annotations: 2 objects of 1 classes in 2 pictures." in account
    assert ("2 x shapes of the kind points" in " ".join(account)) == (kind == "CVAT")
    (tmp_path / "all.json").write_text(json.dumps(coco))
    assert [image["file_name"] for image in coco["images"]] == ["train/a.png", "val/a.png"]
    assert coco["categories"] == [{"id": 1, "name": "nut"}]
    for annotation in coco["annotations"]:
        np.testing.assert_allclose(annotation["bbox"], BOX, atol=1e-9)
    use = Use.BOXES | Use.EVALUATION
    assert check_coco_files(tmp_path / "all.json", images, use, open_pictures=True) == ["nut"]


def test_polygons_become_masks(tmp_path):
    images = flat(tmp_path, "train/a.png")
    points = [[10, 10], [30, 10], [30, 30]]
    (tmp_path / "m").mkdir()
    shape = {"label": "nut", "shape_type": "polygon", "points": points}
    content = {"shapes": [shape], "imagePath": "../flat/train/a.png"}
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
        coco, _ = convert_to_coco(recognise_annotations(tmp_path / source), images)
        (tmp_path / "all.json").write_text(json.dumps(coco))
        (annotation,) = coco["annotations"]
        np.testing.assert_allclose(annotation["segmentation"], [np.ravel(points)])
        code = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], HEIGHT, WIDTH))
        assert annotation["area"] == mask_util.area(code)
        np.testing.assert_allclose(annotation["bbox"], [10, 10, 20, 20])
        check_coco_files(tmp_path / "all.json", images, Use.BOXES | Use.MASKS)


def test_a_second_part_gets_the_classes_of_the_first(images, tmp_path):
    coco, _ = convert_to_coco(recognise_annotations(voc(tmp_path)), images, ["bolt"])
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
        convert_to_coco(recognise_annotations(labels), images)
    (labels / "classes.txt").write_text("nut\n")
    with pytest.raises(InputError, match="line 1 has class 1"):
        convert_to_coco(recognise_annotations(labels), images)
    (labels / "classes.txt").write_text("bolt\nnut\n")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other" / "b.png")
    with pytest.raises(InputError, match="no box of a picture"):
        convert_to_coco(recognise_annotations(labels), tmp_path / "other")


def converted(path: Path, images: Path) -> tuple[dict, str]:
    coco, account = convert_to_coco(recognise_annotations(path), images)
    return coco, " ".join(account)


def flat(root: Path, *names: str) -> Path:
    (root / "flat").mkdir()
    for name in names:
        (root / "flat" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "flat" / name)
    return root / "flat"


def test_circles_ellipses_and_masks_of_labelme_and_cvat(tmp_path):
    images = flat(tmp_path, "a.png")
    part = np.zeros((4, 6), np.uint8)
    part[1:3, 2:5] = 255
    stream = io.BytesIO()
    Image.fromarray(part).save(stream, "PNG")
    shapes = [
        {"label": "c", "shape_type": "circle", "points": [[20, 20], [20, 30]]},
        {"label": "m", "shape_type": "mask", "points": [[8, 4], [14, 8]],
         "mask": base64.b64encode(stream.getvalue()).decode()},
        *({"label": "g", "shape_type": "polygon", "group_id": 1,
           "points": [[x, 1], [x + 4, 1], [x + 4, 5]]} for x in (30, 40)),
    ]  # fmt: skip
    content = {"shapes": shapes, "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.json").write_text(json.dumps(content))
    coco, account = converted(tmp_path / "m", images)
    circle, mask, group = coco["annotations"]
    np.testing.assert_allclose(circle["bbox"], [10, 10, 20, 20])
    assert circle["area"] == pytest.approx(np.pi * 100, rel=0.02)
    assert mask["bbox"] == [10, 5, 3, 2]
    assert mask["area"] == mask_util.decode(mask["segmentation"])[5:7, 10:13].sum() == 6
    assert group["bbox"] == [30, 1, 14, 4]
    assert len(group["segmentation"]) == 2
    assert "one label and group_id" in account
    (tmp_path / "c.xml").write_text(
        f'<annotations><image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">'
        '<ellipse label="e" cx="30" cy="20" rx="12" ry="5" rotation="90"/>'
        '<mask label="m" left="10" top="5" width="3" height="2" rle="1,5"/>'
        '<tag label="t"/></image></annotations>'
    )
    coco, account = converted(tmp_path / "c.xml", images)
    ellipse, mask = coco["annotations"]
    np.testing.assert_allclose(ellipse["bbox"], [25, 8, 10, 24])
    assert mask["area"] == 5
    assert "shapes of the kind tag" in account


def test_tracks_of_cvat_for_video(tmp_path):
    images = flat(tmp_path, "frame_000000.png", "frame_000001.png", "frame_000002.png")
    boxes = "".join(
        f'<box frame="{i}" outside="{int(i == 2)}" xtl="{i}" ytl="1" xbr="{i + 9}" ybr="8"/>'
        for i in range(3)
    )
    (tmp_path / "v.xml").write_text(
        f'<annotations><track id="0" label="car">{boxes}</track></annotations>'
    )
    coco, account = converted(tmp_path / "v.xml", images)
    assert [a["bbox"][0] for a in coco["annotations"]] == [0, 1]
    assert "frame_000002.png" in account  # without annotations


def test_who_gets_which_picture(tmp_path):
    images = flat(tmp_path, "a.jpg", "a.png", "x/b.png", "y/b.png", "c.png")
    (tmp_path / "l" / "y").mkdir(parents=True)
    (tmp_path / "l" / "classes.txt").write_text("nut\n")
    for name in ("a", "y/b", "c", "d"):
        (tmp_path / "l" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n" * 100)
    with pytest.raises(InputError, match="fit several pictures") as caught:
        converted(tmp_path / "l", images)
    assert str(images / "a.jpg") in str(caught.value)
    (tmp_path / "l" / "a.txt").unlink()
    coco, account = converted(tmp_path / "l", images)
    assert [image["file_name"] for image in coco["images"]] == ["c.png", "y/b.png"]
    assert "198 x duplicate objects" in account
    assert "d.txt with 100 objects" in account  # no picture
    assert f"3 x pictures without annotations, not used: {images}/a.jpg" in account


def test_names_of_classes_by_number_and_key_points(tmp_path):
    images = flat(tmp_path, "a.png")
    labels = tmp_path / "l"
    labels.mkdir()
    (labels / "data.yaml").write_text("names: {0: bolt, 7: nut}\n", "utf-8-sig")
    (labels / "a.txt").write_text("7 0.5 0.5 0.2 0.2\n", "utf-8-sig")
    coco, _ = converted(labels / "data.yaml", images)
    assert [each["name"] for each in coco["categories"]] == ["nut"]
    (labels / "a.txt").write_text("7 0.5 0.5 0.2 0.2 0.4 0.4 2 0.6 0.6 1\n")
    with pytest.raises(InputError, match="kpt_shape"):
        converted(labels, images)


def test_a_size_of_another_picture_is_found(tmp_path):
    images = flat(tmp_path, "a.png")
    (tmp_path / "c.xml").write_text(
        f'<annotations><image id="0" name="a.png" width="{HEIGHT}" height="{WIDTH}">'
        '<box label="n" xtl="1" ytl="1" xbr="9" ybr="60"/></image></annotations>'
    )
    coco, _ = converted(tmp_path / "c.xml", images)
    (tmp_path / "all.json").write_text(json.dumps(coco))
    with pytest.raises(InputError, match="another size"):
        check_coco_files(tmp_path / "all.json", images, open_pictures=True)


def test_class_names_that_yaml_takes_for_truth_values_and_a_file_two_folders_up(tmp_path):
    images = flat(tmp_path, "train/a.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: [yes, no, null, 1]\nnc: 4\nkpt_shape:\n")
    lines = [f"{i} 0.5 0.5 0.{i + 1} 0.2\n" for i in range(4)]
    (tmp_path / "labels" / "train" / "a.txt").write_text("".join(lines))
    coco, account = converted(tmp_path / "labels" / "train", images)
    assert {each["name"] for each in coco["categories"]} == {"yes", "no", "null", "1"}
    assert "has nc" not in account


def test_parts_of_a_voc_object_that_are_not_used_are_counted(images, tmp_path):
    labels = voc(tmp_path)
    for file in labels.rglob("*.xml"):
        box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>"
        extra = f"{box}<keypoints>1</keypoints></object>"
        file.write_text(file.read_text().replace("</object>", extra))
    coco, account = converted(labels, images)
    assert [a["bbox"] for a in coco["annotations"]] == [BOX, BOX]
    assert "2 x objects with several boxes" in account
    assert "2 x objects with keypoints, which is not used" in account


def test_names_that_are_quoted_as_in_a_url(tmp_path):
    images = flat(tmp_path, "my pic.png")
    (tmp_path / "a.xml").write_text(
        f'<annotations><image name="my%20pic.png" width="{WIDTH}" height="{HEIGHT}">'
        '<box label="nut" xtl="1" ytl="1" xbr="9" ybr="9"/></image></annotations>'
    )
    assert len(converted(tmp_path / "a.xml", images)[0]["annotations"]) == 1


def test_a_mask_is_opened_as_a_picture_of_a_known_format_alone(tmp_path):
    # Pillow hands PostScript to another program.
    images = flat(tmp_path, "a.png")
    program = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n").decode()
    shape = {"label": "m", "shape_type": "mask", "points": [[1, 1], [4, 4]], "mask": program}
    content = {"shapes": [shape], "imagePath": "a.png", "imageHeight": 48, "imageWidth": 64}
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not an image of a known format"):
        converted(tmp_path / "m", images)
