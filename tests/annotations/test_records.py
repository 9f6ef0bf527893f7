"""Our loader and COCO's, compared; encodings of annotation files; boxes in other conventions."""

from __future__ import annotations

import codecs
import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from pycocotools.coco import COCO

from flsl_d2.annotations import Use, check_coco_files
from flsl_d2.annotations.coco_file import read_coco
from flsl_d2.annotations.datasets import use_own_loader
from flsl_d2.annotations.objects import ellipse
from flsl_d2.annotations.records import load_coco, read_coco_api
from flsl_d2.errors import InputError
from flsl_d2.scenes import make_scenes

Coco = dict[str, Any]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(root, num_train=12, num_val=1, image_size=(64, 64))
    return root


@pytest.fixture
def coco(scenes: Path) -> Coco:
    """The scenes with an ellipse in each box as its polygon."""
    content = json.loads((scenes / "annotations/instances_train.json").read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        polygon = ellipse(x + w / 2, y + h / 2, w / 2, h / 2)[1]
        entry.update(segmentation=[polygon], area=np.pi / 4 * w * h)
    return content


def write(content: Coco, tmp_path: Path) -> str:
    (tmp_path / "a.json").write_text(json.dumps(content))
    return str(tmp_path / "a.json")


def as_detectron2(records: list[Coco]) -> list[Coco]:
    records = copy.deepcopy(records)
    for record in records:
        for annotation in record["annotations"]:
            del annotation["id"]
    return records


def with_masks_of_every_form(coco: Coco) -> Coco:
    polygons = coco["annotations"][0]["segmentation"]
    text = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, 64, 64))
    coco["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": text["counts"].decode()}
    coco["annotations"][1].update(
        segmentation={"size": [64, 64], "counts": [10, 30, 64 * 64 - 40]}, iscrowd=1
    )
    coco["annotations"][2]["segmentation"].append([1, 1, 5, 5])
    coco["annotations"][3]["keypoints"] = [3, 4, 2, 0, 0, 0]
    return coco


def test_records_are_detectron2s(coco: Coco, scenes: Path, tmp_path: Path) -> None:
    json_file, root = write(with_masks_of_every_form(coco), tmp_path), str(scenes / "train")
    for name in ("test_ours", "test_theirs"):
        MetadataCatalog.pop(name, None)
    ours = load_coco(json_file, root, "test_ours")
    theirs = load_coco_json(json_file, root, "test_theirs")
    assert as_detectron2(ours) == theirs
    first, second = MetadataCatalog.get("test_ours"), MetadataCatalog.get("test_theirs")
    assert first.thing_classes == second.thing_classes
    assert first.thing_dataset_id_to_contiguous_id == second.thing_dataset_id_to_contiguous_id


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_of_penn_fudan_are_detectron2s(split: str, datasets_root: Path) -> None:
    json_file = datasets_root / f"pennfudan/annotations/instances_{split}.json"
    if not json_file.is_file():
        pytest.skip(f"no {json_file}")
    root = str(datasets_root / "pennfudan/images")
    ours, theirs = load_coco(str(json_file), root), load_coco_json(str(json_file), root, None)
    for record in theirs:
        for annotation in record["annotations"]:
            annotation["category_id"] -= 1  # the file has one category, of id 1
    assert as_detectron2(ours) == theirs


def test_cocos_annotations_stay_as_they_are(coco: Coco, tmp_path: Path) -> None:
    json_file = write(coco, tmp_path)
    ours, theirs = read_coco_api(json_file), COCO(json_file)
    assert ours.dataset["annotations"] == theirs.dataset["annotations"]
    assert ours.imgs == theirs.imgs
    assert ours.cats == theirs.cats


def test_what_pycocotools_cannot_take_is_put_right(coco: Coco, tmp_path: Path) -> None:
    entry = coco["annotations"][0]
    polygons = list(entry["segmentation"])
    # pycocotools takes a first polygon of two points for a box.
    entry["segmentation"].insert(0, [1, 1, 2, 2])
    coco["annotations"][1]["segmentation"] = []
    for image in coco["images"]:
        image.update(height=64.0, width=64.0)
    json_file = Path(write(coco, tmp_path))
    json_file.write_bytes(codecs.BOM_UTF8 + json_file.read_bytes())
    api = read_coco_api(str(json_file))
    expected = pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, 64, 64))
    assert (api.annToMask(api.anns[entry["id"]]) == pycocotools.mask.decode(expected)).all()
    *_, width, height = coco["annotations"][1]["bbox"]
    area = api.annToMask(api.anns[coco["annotations"][1]["id"]]).sum()
    assert area == pytest.approx(width * height, abs=2 * (width + height))  # the rim's pixels


def test_a_missing_area_and_iscrowd_are_computed(coco: Coco, tmp_path: Path) -> None:
    expected = [(entry.pop("area"), entry.pop("iscrowd")) for entry in coco["annotations"]]
    *_, width, height = coco["annotations"][0]["bbox"]
    del coco["annotations"][0]["segmentation"]
    expected[0] = width * height, 0
    found = read_coco_api(write(coco, tmp_path)).dataset["annotations"]
    for entry, (area, iscrowd) in zip(found, expected, strict=True):
        # The polygon's pixels are more than its area.
        assert entry["area"] == pytest.approx(area, rel=0.15)
        assert entry["iscrowd"] == iscrowd


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 1, 5, 5]]])
def test_boxes_without_masks_are_kept(
    segmentation: Any, coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    for entry in coco["annotations"]:
        entry["segmentation"] = segmentation
    records = load_coco(write(coco, tmp_path), str(scenes / "train"))
    assert sum(len(r["annotations"]) for r in records) == len(coco["annotations"])
    assert not any("segmentation" in a for r in records for a in r["annotations"])


def test_a_faulty_file_is_explained_without_a_check_before(
    coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    coco["annotations"][1]["bbox"] = [1, 2]
    with pytest.raises(InputError, match="bbox is not four numbers"):
        load_coco(write(coco, tmp_path), str(scenes / "train"))


def test_names_that_detectron2_registered_get_our_loader(
    coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    for entry in coco["annotations"]:
        entry["segmentation"] = [[]]
    register_coco_instances("test_own", {}, write(coco, tmp_path), str(scenes / "train"))
    try:
        use_own_loader("test_own")
        records = DatasetCatalog.get("test_own")
        assert sum(len(r["annotations"]) for r in records) == len(coco["annotations"])
    finally:
        DatasetCatalog.remove("test_own")
        MetadataCatalog.remove("test_own")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_any_unicode_is_read(encoding: str, coco: Coco, scenes: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(coco).encode(encoding))
    assert read_coco(path)["annotations"] == coco["annotations"]
    check_coco_files(path, scenes / "train", Use.BOXES | Use.EVALUATION)
    assert len(load_coco(str(path), str(scenes / "train"))) == 12


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text[:-1].encode(), r"not JSON \(.*the file ends in the middle"),
        (lambda text: text[:-200].encode(), r"not JSON \(.*the file ends in the middle"),
        (lambda text: text[: text.index("_") + 1].encode(), "the file ends in the middle"),
        (lambda text: (text[:-2] + ',"x":"é"}').encode("latin-1"), "not JSON .*in UTF-8"),
        (lambda text: b"", "not JSON, it is empty"),
        (lambda text: b"  \n", "not JSON, it is empty"),
        (lambda text: text.replace(":", "=", 1).encode(), r"not JSON \(.*COCO's instances"),
        (lambda text: b"[]", "holds a list"),
        (lambda text: b"null", "holds a NoneType"),
        (lambda text: b"[" * 200_000, "is not JSON"),
        (lambda text: b"\xff\xfe\x00\x80", "is not JSON"),
        (lambda text: gzip.compress(b"{}", mtime=0), "is not JSON but compressed by gzip"),
        (lambda text: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (lambda text: b"<!doctype html>", "is not JSON but a web page"),
    ],
)
def test_files_that_are_no_json_are_named_so(
    damage: Callable[[str], bytes],
    expected: str,
    coco: Coco,
    tmp_path: Path,
) -> None:
    (tmp_path / "a.json").write_bytes(damage(json.dumps(coco)))
    with pytest.raises(InputError, match=expected):
        read_coco(tmp_path / "a.json")


def corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


CONVENTIONS: dict[str, tuple[Callable[[list[float]], list[float]], bool]] = {
    # How a box is written; whether this shows without masks, too.
    "two corners": (corners, True),
    "from 0 to 1": (lambda b: [v / 64 for v in b], True),
    "the middle": (lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]], False),
    "y before x": (lambda b: [b[1], b[0], b[3], b[2]], False),
    "per cent": (lambda b: [v / 0.64 for v in b], False),
    r"0\.5\d* times as wide and 0\.5\d* times as high": (lambda b: [v / 2 for v in b], False),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_boxes_in_another_convention_are_recognised(
    convention: str, coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    change, without_masks = CONVENTIONS[convention]
    for entry in coco["annotations"]:
        entry["bbox"] = change(entry["bbox"])
    with pytest.raises(InputError, match=f"boxes are not .* seem to be .*{convention}") as caught:
        check_coco_files(write(coco, tmp_path), scenes / "train")
    assert len(str(caught.value).splitlines()) == 1
    for entry in coco["annotations"]:
        del entry["segmentation"]
    if without_masks:
        with pytest.raises(InputError, match=convention):
            check_coco_files(write(coco, tmp_path), scenes / "train")


def test_masks_as_shares_and_boxes_of_something_else(
    coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for entry in coco["annotations"]:
        entry["segmentation"] = [[v / 64 for v in p] for p in entry["segmentation"]]
    with pytest.raises(InputError, match="while the masks are shares of the image"):
        check_coco_files(write(coco, tmp_path), scenes / "train")
    rng = np.random.default_rng(0)
    for entry in coco["annotations"]:
        entry["segmentation"] = [rng.uniform(0, 20, 6).tolist()]
        entry["bbox"] = [40, 40, 9, 9]
    check_coco_files(write(coco, tmp_path), scenes / "train")
    assert "those of other objects or pictures" in caplog.text
