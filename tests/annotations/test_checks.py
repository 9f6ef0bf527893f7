"""Checks of COCO files: every fault is named, right files pass."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data import DatasetCatalog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flsl_d2.annotations import Use, check_coco_files, check_registered_dataset
from flsl_d2.annotations.shapes import runs_of_text
from flsl_d2.errors import InputError
from flsl_d2.scenes import make_scenes

Coco = dict[str, Any]
EVERY_USE = Use.BOXES | Use.MASKS | Use.EVALUATION


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(root, num_train=40, num_val=1, image_size=(64, 64))
    return root


@pytest.fixture
def coco(scenes: Path) -> Coco:
    return json.loads((scenes / "annotations/instances_train.json").read_text())


def check(
    content: Any, scenes: Path, tmp_path: Path, use: Use = EVERY_USE, **arguments: Any
) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    check_coco_files(path, scenes / "train", use, **arguments)


def image(change: Callable[[dict], Any]) -> Callable[[Coco], Any]:
    return lambda coco: change(coco["images"][1])


def annotation(change: Callable[[dict], Any]) -> Callable[[Coco], Any]:
    return lambda coco: change(coco["annotations"][1])


def text_mask(height: int, width: int, **changes: Any) -> Coco:
    pixels = np.zeros((height, width), np.uint8, order="F")
    pixels[3:9, 5:20] = 1
    mask = pycocotools.mask.encode(pixels)
    size = [64, 64] if width == 65 else mask["size"]
    return {"size": size, "counts": mask["counts"].decode(), **changes}


RLE = {"size": [64, 64], "counts": [10, 30, 64 * 64 - 40]}
FAULTS: dict[str, tuple[Callable[[Coco], Any], str]] = {
    "no images key": (lambda c: c.pop("images"), "lacks the list images"),
    "no keys at all": (lambda c: c.clear(), "lacks the lists images, annotations, categories"),
    "images no list": (lambda c: c.update(images={"1": {}}), "lacks the list images"),
    "no image": (lambda c: c.update(images=[]), "empty list: images"),
    "no annotation": (lambda c: c.update(annotations=[]), "empty list: annotations"),
    "no category": (lambda c: c.update(categories=[]), "empty list: categories"),
    "image no object": (lambda c: c["images"].append(5), r"no JSON object: images\[40\]"),
    "image without id": (image(lambda i: i.pop("id")), r"images without id: images\[1\]"),
    "image without size": (
        image(lambda i: (i.pop("height"), i.pop("width"))), "images without height, width"),
    "image with null": (image(lambda i: i.update(file_name=None)), "images without file_name"),
    "image id list": (image(lambda i: i.update(id=[1])), "images whose id is no whole number"),
    "image id twice": (image(lambda i: i.update(id=1)), "images with an id that another has: 1"),
    "image of size 0": (image(lambda i: i.update(width=0)), "height or width is no positive"),
    "image size text": (image(lambda i: i.update(width="64")), "height or width is no positive"),
    "image size as text with decimals": (
        image(lambda i: i.update(height="64.0")), "height '64.0' and width 64"),
    "image size true": (image(lambda i: i.update(height=True)), "height or width is no positive"),
    "image size huge": (image(lambda i: i.update(height=10**400)), "height or width is no posi"),
    "file name number": (image(lambda i: i.update(file_name=3)), "file_name is no text"),
    "absolute": (image(lambda i: i.update(file_name="/etc/passwd")), "missing in .*: /etc/passwd"),
    "outside": (image(lambda i: i.update(file_name="a/../../x.jpg")), "missing in .*: a/../../x"),
    "nul in name": (image(lambda i: i.update(file_name="a\0/b.jpg")), "no file can have: 'a"),
    "half a character": (image(lambda i: i.update(file_name="\ud800/b")), "no file can have: '.u"),
    "long name": (image(lambda i: i.update(file_name="a" * 999 + "/b")), "images are missing in"),
    "image ids of two kinds": (image(lambda i: i.update(id="2")), "mixed int and str ids: 2"),
    "endless height": (image(lambda i: i.update(height=1e999)), "no positive whole number: 2"),
    "half a pixel": (image(lambda i: i.update(width=64.5)), "no positive whole number: 2"),
    "nan width": (image(lambda i: i.update(width=float("nan"))), "no positive whole number: 2"),
    "missing file": (image(lambda i: i.update(file_name="no.jpg")), r"are missing in .*: no"),
    "missing folder": (image(lambda i: i.update(file_name="d/0.jpg")), "images are missing in"),
    "category twice": (lambda c: c["categories"].append(c["categories"][0]), "id that another has"),
    "category unnamed": (lambda c: c["categories"][0].pop("name"), "categories without id or name"),
    "category ids of two kinds": (
        lambda c: c["categories"].append({"id": "x", "name": "y"}), "categories with mixed"),
    "annotation no object": (lambda c: c["annotations"].append("x"), "no JSON object"),
    "annotation id twice": (annotation(lambda a: a.update(id=1)), "annotations with an id that"),
    "annotation id 0 twice": (
        lambda c: [a.update(id=0) for a in c["annotations"][:2]], "annotations with an id that"),
    "annotation id float": (annotation(lambda a: a.update(id=1.5)), "annotations whose id"),
    "annotation id text": (annotation(lambda a: a.update(id="x")), "annotations whose id"),
    "unknown image": (annotation(lambda a: a.update(image_id=999)), "not in images: id 2"),
    "image id a list": (annotation(lambda a: a.update(image_id=[1])), "not in images: id 2"),
    "unknown category": (annotation(lambda a: a.update(category_id=77)), "with category 77"),
    "category id a dict": (annotation(lambda a: a.update(category_id={})), "not in categories"),
    "no box": (annotation(lambda a: a.pop("bbox")), "annotations without bbox"),
    "area text": (annotation(lambda a: a.update(area="9")), "area is no number from 0 up: 2"),
    "area nan": (annotation(lambda a: a.update(area=float("nan"))), "area is no number from 0"),
    "area negative": (annotation(lambda a: a.update(area=-1)), "area is no number from 0 up: 2"),
    "iscrowd text": (annotation(lambda a: a.update(iscrowd="0")), "iscrowd is neither 0 nor 1: 2"),
    "iscrowd list": (annotation(lambda a: a.update(iscrowd=[0])), "iscrowd is neither 0 nor 1: 2"),
    "three numbers": (annotation(lambda a: a.update(bbox=[1, 2, 3])), "not four numbers"),
    "box of text": (annotation(lambda a: a.update(bbox=list("abcd"))), "not four numbers"),
    "box of number texts": (
        annotation(lambda a: a.update(bbox=["1", "2", "3", "4.0"])), "not four numbers"),
    "box of truth": (annotation(lambda a: a.update(bbox=[1, 2, True, 4])), "not four numbers"),
    "box huge": (annotation(lambda a: a.update(bbox=[1, 2, 10**400, 4])), "not four numbers"),
    "box no list": (annotation(lambda a: a.update(bbox=7)), "not four numbers"),
    "ignore": (annotation(lambda a: a.update(ignore=1)), "`ignore`"),
    "polygon text": (
        annotation(lambda a: a.update(segmentation=[list("abcdef")])), "not a list of numbers"),
    "polygon nan": (
        annotation(lambda a: a.update(segmentation=[[float("nan")] * 6])), "not a list of numbers"),
    "flat polygon": (
        annotation(lambda a: a.update(segmentation=[1, 2, 3, 4, 5, 6])), "not a list of numbers"),
    "mask of other size": (
        annotation(lambda a: a.update(segmentation={**RLE, "size": [32, 64]})), "another size"),
    "mask too short": (
        annotation(lambda a: a.update(segmentation={**RLE, "counts": [5]})), "does not fill"),
    "mask negative": (
        annotation(lambda a: a.update(segmentation={**RLE, "counts": [-10, 4106]})), "not fill"),
    "mask of floats": (
        annotation(lambda a: a.update(segmentation={**RLE, "counts": [4096.0]})), "not fill"),
    "mask of one side": (
        annotation(lambda a: a.update(segmentation={**RLE, "size": [64]})), "invalid size"),
    "mask of float size": (
        annotation(lambda a: a.update(segmentation={**RLE, "size": [64.0, 64.0]})), "invalid size"),
    "mask of no size, unknown image": (
        annotation(lambda a: a.update(image_id=999, segmentation={**RLE, "size": []})), "invalid"),
    "mask text too long": (
        annotation(lambda a: a.update(segmentation=text_mask(64, 65))), "does not fill"),
    "mask text of other size": (
        annotation(lambda a: a.update(segmentation=text_mask(32, 32))), "another size"),
    "mask text cut": (
        annotation(lambda a: a.update(segmentation={**RLE, "counts": "PP"})), "no text that COCO"),
    "mask text foreign": (
        annotation(lambda a: a.update(segmentation={**RLE, "counts": "é~"})), "no text that COCO"),
    "mask without counts": (
        annotation(lambda a: a.update(segmentation={"size": [64, 64]})), "lacks size or counts"),
    "segmentation text": (
        annotation(lambda a: a.update(segmentation="x")), "neither list nor mask"),
}  # fmt: skip
DEGENERATE: dict[str, tuple[dict[str, Any], str]] = {
    "flat box": ({"bbox": [1, 1, 5, 0]}, "box has no area"),
    "negative box": ({"bbox": [9, 9, -5, 4]}, "box has no area"),
    "endless box": ({"bbox": [1, 1, float("inf"), 4]}, "box has no area"),
    "nan box": ({"bbox": [float("nan"), 1, 3, 4]}, "box has no area"),
    "box outside": ({"bbox": [64, 1, 5, 5]}, "outside its image"),
    "box above": ({"bbox": [3, -8, 5, 5]}, "outside its image"),
    "no polygon": ({"segmentation": []}, "without a mask"),
    "empty polygon": ({"segmentation": [[]]}, "without a mask"),
    "null": ({"segmentation": None}, "without a mask"),
    "two points": ({"segmentation": [[1, 1, 2, 2]]}, "without a mask"),
    "empty mask": ({"segmentation": {"size": [64, 64], "counts": [64 * 64]}}, "mask is empty"),
    "odd polygon": ({"segmentation": [[1, 1, 2, 2, 3, 3, 4]]}, "odd length"),
}


def test_valid_file_passes_silently(
    coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(coco, scenes, tmp_path)
    assert caplog.records == []


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported(fault: str, coco: Coco, scenes: Path, tmp_path: Path) -> None:
    change, expected = FAULTS[fault]
    change(coco)
    with pytest.raises(InputError, match=expected) as caught:
        check(coco, scenes, tmp_path)
    assert "annotations.json" in str(caught.value)


@pytest.mark.parametrize("fault", DEGENERATE)
def test_one_degenerate_annotation_warns_many_are_a_fault(
    fault: str, coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, expected = DEGENERATE[fault]
    coco["annotations"][1].update(change)
    with caplog.at_level(logging.WARNING):
        check(coco, scenes, tmp_path)
    assert expected in caplog.text
    for entry in coco["annotations"][:5]:
        entry.update(change)
    with pytest.raises(InputError, match=f"5 x .*{expected}"):
        check(coco, scenes, tmp_path)


combinable = sorted(
    f for f in FAULTS if f.startswith(("image without", "unknown", "missing", "no box", "three"))
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(faults=st.lists(st.sampled_from(combinable), min_size=2, max_size=4, unique=True))
def test_all_faults_are_reported_together(faults: list[str], scenes: Path, tmp_path: Path) -> None:
    text = (scenes / "annotations/instances_train.json").read_text()
    coco = json.loads(text)
    for number, fault in enumerate(faults):
        # Each fault hits entries of its own, or one would hide the other.
        part = {key: value[5 * number :] for key, value in coco.items() if isinstance(value, list)}
        part["categories"] = coco["categories"]
        FAULTS[fault][0](part)
    with pytest.raises(InputError) as caught:
        check(coco, scenes, tmp_path)
    for fault in faults:
        if fault == "unknown image" and "image without id" in faults:
            continue  # it may be a consequence
        expected = FAULTS[fault][1].split(": ")[0].split(".*")[0]
        assert expected in str(caught.value), f"{fault} is missing from {caught.value}"


def test_examples_are_counted_and_cut(coco: Coco, scenes: Path, tmp_path: Path) -> None:
    for number, entry in enumerate(coco["images"]):
        entry["file_name"] = f"gone_{number:02d}.jpg"
    with pytest.raises(InputError) as caught:
        check(coco, scenes, tmp_path, max_report=3)
    message = str(caught.value)
    assert "40 of 40 images are missing" in message
    assert str(scenes / "train") in message
    assert "gone_00.jpg, gone_01.jpg, gone_02.jpg and 37 more" in message
    assert "DETECTRON2_DATASETS" in message


REMARKS: dict[str, tuple[Callable[[Coco], Any], str]] = {
    "two classes of one name": (
        lambda c: c["categories"][1].update(name=c["categories"][0]["name"]),
        "1 x categories with a name that another has"),
    # COCO's evaluation counts a perfect detection of it as a false one.
    "id 0": (annotation(lambda a: a.update(id=0)), "1 x annotations with id 0"),
    "duplicate mask": (
        lambda c: c["annotations"].append({**c["annotations"][1], "id": 999}),
        "1 x annotations with class and box of another in their image, which count twice: 999"),
    "duplicate polygon": (
        lambda c: c["annotations"].extend(
            {**c["annotations"][1], "id": i, "bbox": [2, 2, 9, 9], "segmentation": [box]}
            for i, box in ((998, [2, 2, 11, 2, 11, 11]), (999, [2, 2, 11, 2, 11, 11]))),
        "1 x annotations with class and box of another in their image, which count twice: 999"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REMARKS)
def test_what_a_user_should_know_is_remarked_on(
    kind: str, coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, expected = REMARKS[kind]
    change(coco)
    check(coco, scenes, tmp_path)
    assert expected in caplog.text


def test_missing_paths(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        check_coco_files(tmp_path / "nowhere.json", scenes / "train")
    with pytest.raises(InputError, match="cannot be read"):
        check_coco_files(tmp_path, scenes / "train")
    with pytest.raises(InputError, match=r"image folder does not exist.*nowhere"):
        check_coco_files(scenes / "annotations/instances_train.json", tmp_path / "nowhere")


def test_image_lists_without_annotations(coco: Coco, scenes: Path, tmp_path: Path) -> None:
    del coco["annotations"]
    check(coco, scenes, tmp_path, Use.EVALUATION | Use.MASKS)
    with pytest.raises(InputError, match="lacks the list annotations"):
        check(coco, scenes, tmp_path)
    check({"images": coco["images"]}, scenes, tmp_path, Use.PICTURES)


# Faults that concern only some uses; all others concern every use of annotations.
ONLY_EVALUATED = {
    "annotation id twice", "annotation id 0 twice", "annotation id float", "annotation id text",
    "area text", "area nan", "area negative",
}  # fmt: skip
ONLY_MASKS = {
    fault for fault in FAULTS if fault.split()[0] in ("mask", "polygon", "flat", "segmentation")
} - {"mask of no size, unknown image"}
ONLY_PICTURES = {
    fault
    for fault in FAULTS
    if fault in ("no image", "image no object", "image with null", "no images key")
    or fault.startswith(("images no", "no keys", "file name", "absolute", "outside"))
    or fault.startswith(("nul in", "half a char", "long name", "missing"))
}


@pytest.mark.parametrize("use", [Use.PICTURES, Use.BOXES, Use.MASKS | Use.BOXES, Use.EVALUATION])
def test_a_fault_stops_only_the_uses_that_it_concerns(
    use: Use, scenes: Path, tmp_path: Path
) -> None:
    text = (scenes / "annotations/instances_train.json").read_text()
    for fault, (change, _) in FAULTS.items():
        coco = json.loads(text)
        change(coco)
        concerned = (
            fault in ONLY_PICTURES
            if not use
            else bool(use & Use.MASKS)
            if fault in ONLY_MASKS
            else bool(use & Use.EVALUATION)
            if fault in ONLY_EVALUATED
            # Without annotations nothing is evaluated, as with COCO's test sets.
            else not (use == Use.EVALUATION and fault == "no annotation")
        )
        try:
            check(coco, scenes, tmp_path, use)
            stopped = False
        except InputError:
            stopped = True
        assert stopped == concerned, fault


@pytest.mark.parametrize("segmentation", [None, [], [[]], [[1, 1, 5, 5]], "?", [1, 2, 3, 4]])
def test_boxes_alone_train_boxes(
    segmentation: Any, coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for entry in coco["annotations"]:
        entry["segmentation"] = segmentation
    check(coco, scenes, tmp_path, Use.BOXES | Use.EVALUATION)
    assert caplog.records == []
    with pytest.raises(InputError) as caught:
        check(coco, scenes, tmp_path, masks_off="mask_head=null")
    if segmentation != "?" and segmentation != [1, 2, 3, 4]:
        assert "without a mask, while the model learns masks" in str(caught.value)
        assert "mask_head=null" in str(caught.value)


def test_whole_numbers_may_be_written_with_decimals(
    coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    for entry in coco["images"]:
        entry.update(height=64.0, width=64.0, id=float(entry["id"]))
    check(coco, scenes, tmp_path)


CONSEQUENCES: dict[str, Callable[[Coco], Any]] = {
    "images without id": image(lambda i: i.pop("id")),
    "images whose id is no whole number": image(lambda i: i.update(id=[2])),
    "images that are no JSON object": lambda c: c["images"].__setitem__(1, 7),
    "categories without id or name": lambda c: c["categories"][0].pop("id"),
    "empty list: images": lambda c: c["images"].clear(),
    "empty list: categories": lambda c: c["categories"].clear(),
}


@pytest.mark.parametrize("fault", CONSEQUENCES)
def test_consequences_of_a_fault_are_no_further_faults(
    fault: str, coco: Coco, scenes: Path, tmp_path: Path
) -> None:
    CONSEQUENCES[fault](coco)
    with pytest.raises(InputError) as caught:
        check(coco, scenes, tmp_path)
    line = str(caught.value)
    assert fault in line
    assert "\n" not in line


def test_nothing_left_to_learn(
    coco: Coco, scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = coco["annotations"][0]["category_id"]
    for entry in coco["annotations"]:
        entry["iscrowd"] = int(entry["category_id"] == first)
    check(coco, scenes, tmp_path)
    (record,) = caplog.records
    name = next(c["name"] for c in coco["categories"] if c["id"] == first)
    assert "1 x categories of which nothing is learned" in record.getMessage()
    assert name in record.getMessage()
    for entry in coco["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(InputError, match=r"all \d+ annotations have iscrowd 1"):
        check(coco, scenes, tmp_path)
    check(coco, scenes, tmp_path, Use.EVALUATION)
    assert "nothing is evaluated" in caplog.text


def runs_by_counting(pixels: np.ndarray) -> list[int]:
    runs, value = [0], 0
    for pixel in pixels.flatten(order="F"):
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


@settings(deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.99, 1.0]),
)  # fmt: skip
def test_runs_of_text_are_those_of_the_mask(height: int, width: int, seed: int, share: float):
    drawn = np.random.default_rng(seed).random((height, width)) < share
    pixels = np.asfortranarray(drawn.astype(np.uint8))
    text = pycocotools.mask.encode(pixels)["counts"].decode()
    assert runs_of_text(text) == runs_by_counting(pixels)


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=130), max_size=30))
def test_any_text_gives_runs_or_is_refused(text: str) -> None:
    try:
        runs = runs_of_text(text)
    except ValueError:
        return
    assert len(runs) <= len(text)
    assert all(isinstance(run, int) for run in runs)


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(InputError) as caught:
        check_registered_dataset("coco_2017_trian")
    assert "coco_2017_train" in str(caught.value)
    assert "register_coco_format('coco_2017_trian'" in str(caught.value)
    with pytest.raises(InputError, match="is not registered"):
        check_registered_dataset("")


def test_other_formats_are_left_to_their_loaders() -> None:
    DatasetCatalog.register("test_own_loader", list)
    try:
        check_registered_dataset("test_own_loader")
    finally:
        DatasetCatalog.remove("test_own_loader")


def test_fifty_thousand_annotations_take_no_time(tmp_path: Path) -> None:
    box, polygon = [10.0, 20.0, 30.0, 40.0], [[float(i) for i in range(50)]]
    image_entries = [
        {"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(5000)
    ]
    entries = [
        {"id": i, "image_id": i % 5000, "category_id": 1, "bbox": box, "area": 1.0, "iscrowd": 0,
         "segmentation": polygon} for i in range(50000)
    ]  # fmt: skip
    content = {
        "images": image_entries, "annotations": entries, "categories": [{"id": 1, "name": "x"}]
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    for i in range(5000):
        (tmp_path / "images" / f"{i}.jpg").touch()
    # Time of this process alone; a search through the images for each annotation takes minutes.
    start = time.process_time()
    check_coco_files(tmp_path / "a.json", tmp_path / "images")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("json_file", "image_root"),
    [
        ("coco/annotations/instances_train2017.json", "coco/train2017"),
        ("coco/annotations/instances_val2017.json", "coco/val2017"),
        ("pennfudan/annotations/instances_train.json", "pennfudan/images"),
        ("pennfudan/annotations/instances_val.json", "pennfudan/images"),
    ],
)
def test_real_files_pass(
    json_file: str, image_root: str, datasets_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = datasets_root
    if not (root / json_file).is_file():
        pytest.skip(f"no {root / json_file}")
    check_coco_files(root / json_file, root / image_root)
    assert caplog.records == []
