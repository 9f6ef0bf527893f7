"""UAVDT's text files as COCO annotations: hand-made files with known answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from forked import run_tool
from PIL import Image

from flsl_d2.annotations import check_coco_files, register_builtin, register_coco_format
from flsl_d2.annotations.uavdt import convert_sequence, convert_uavdt
from flsl_d2.errors import InputError


@pytest.fixture
def root(tmp_path) -> Path:
    """Two sequences, two frames each, 100 x 60."""
    root = tmp_path / "uavdt"
    truth = root / "UAV-benchmark-MOTD_v1.0" / "GT"
    truth.mkdir(parents=True)
    for split, name in (("train", "M0101"), ("test", "M0203")):
        pictures = root / "UAV-benchmark-M" / name
        pictures.mkdir(parents=True)
        for frame in (1, 2):
            Image.new("RGB", (100, 60)).save(pictures / f"img{frame:06d}.jpg")
        (root / "M_attr" / split).mkdir(parents=True)
        (root / "M_attr" / split / f"{name}_attr.txt").write_text("1,0,0,1,0,0,0,1,0,0\n")
        (truth / f"{name}_gt_whole.txt").write_text("1,1,10,20,30,15,1,1,1\n1,2,50,5,20,10,1,1,3\n")
    return root


def truth_of(root: Path, name: str, kind: str = "whole") -> Path:
    return root / "UAV-benchmark-MOTD_v1.0" / "GT" / f"{name}_gt_{kind}.txt"


def test_both_splits_as_coco(root):
    truth_of(root, "M0101", "ignore").write_text("2,1,0,0,40,30,1,-1,-1\n")
    files = convert_uavdt(root)
    content = json.loads(files["train"].read_text())
    assert [(i["id"], i["file_name"]) for i in content["images"]] == [
        (1, "M0101/img000001.jpg"),
        (2, "M0101/img000002.jpg"),
    ]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (100, 60)
    assert content["categories"] == [
        {"id": 1, "name": "car"},
        {"id": 2, "name": "truck"},
        {"id": 3, "name": "bus"},
    ]
    vehicles = [a for a in content["annotations"] if not a["iscrowd"]]
    assert [(a["image_id"], a["category_id"], a["bbox"], a["area"]) for a in vehicles] == [
        (1, 1, [10, 20, 30, 15], 450),
        (1, 3, [50, 5, 20, 10], 200),
    ]
    ignored = [a for a in content["annotations"] if a["iscrowd"]]
    assert [(a["image_id"], a["category_id"], a["bbox"]) for a in ignored] == [
        (2, category, [0, 0, 40, 30]) for category in (1, 2, 3)
    ]
    assert len({a["id"] for a in content["annotations"]}) == 5
    assert json.loads(files["test"].read_text())["images"][0]["file_name"].startswith("M0203/")
    for file in files.values():
        check_coco_files(file, root / "UAV-benchmark-M")
    assert not list((root / "annotations").glob("*.unfinished"))


def test_detectron2_reads_it_under_the_registered_layout(root):
    convert_uavdt(root)
    register_builtin()
    registered = MetadataCatalog.get("uavdt_train")
    assert registered.json_file.endswith("uavdt/annotations/instances_train.json")
    assert registered.image_root.endswith("uavdt/UAV-benchmark-M")
    register_coco_format(
        "test_uavdt", root / "annotations" / "instances_train.json", root / "UAV-benchmark-M"
    )
    try:
        records = DatasetCatalog.get("test_uavdt")
        assert [len(r["annotations"]) for r in records] == [2, 0]
        assert [a["category_id"] for a in records[0]["annotations"]] == [0, 2]
        assert Path(records[0]["file_name"]).is_file()
    finally:
        DatasetCatalog.remove("test_uavdt")
        MetadataCatalog.remove("test_uavdt")


def test_boxes_are_cut_at_the_border_and_what_is_left_out_is_counted(root):
    truth_of(root, "M0101").write_text(
        "1,1,-10,50,30,20,1,1,1\n"  # leaves 20 x 10
        "1,2,100,0,10,10,1,1,1\n"  # beside the image
        "1,3,5,5,0,10,1,1,2\n"  # no width
        "1,4,5,5,10,10,1,1,7\n"  # no such category
        "9,5,5,5,10,10,1,1,1\n"  # no such picture
        "\n"
    )
    converted = convert_sequence(
        root / "UAV-benchmark-M" / "M0101", truth_of(root, "M0101").parent, 5, 7
    )
    (annotation,) = converted.annotations
    assert annotation["bbox"] == [0, 50, 20, 10]
    assert (annotation["id"], annotation["image_id"]) == (7, 5)
    assert converted.left_out == {
        "outside their image": 2,
        "of category 7": 1,
        "of frames without a picture": 1,
    }


@pytest.mark.parametrize("line", ["1,1,10,20,30,15,1,1", "1,1,a,20,30,15,1,1,1", "1 1 10 20"])
def test_a_broken_line_is_named(root, line):
    truth_of(root, "M0101").write_text(f"1,1,10,20,30,15,1,1,1\n{line}\n")
    with pytest.raises(InputError, match=r"line 2 of .*M0101_gt_whole\.txt.*9 numbers"):
        convert_uavdt(root)
    assert not (root / "annotations" / "instances_train.json").exists()


def test_what_is_missing_is_named_before_anything_is_written(root, tmp_path):
    with pytest.raises(InputError, match="unpack UAV-benchmark-M"):
        convert_uavdt(tmp_path / "nowhere")
    truth_of(root, "M0203").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of the 1 sequences of test \(M0203\)"):
        convert_uavdt(root)
    assert not (root / "annotations").exists()


def test_the_tool(root):
    done = run_tool("convert_uavdt", DETECTRON2_DATASETS=str(root.parent))
    assert done.returncode == 0, done.stderr
    assert "2 images, 2 vehicles, 0 ignored regions" in done.stderr
    assert (root / "annotations" / "instances_test.json").is_file()
    done = run_tool("convert_uavdt", "--root", root / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the folder")
