"""Every use of a picture sees the same pixels, and refuses the same files in the same words."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image
from test_reader import BAD, GOOD, encoded, orientation, smooth

from flsl_d2.annotations import FLSLDatasetMapper, check_coco_files
from flsl_d2.annotations.shapes import box_polygon
from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledImage
from flsl_d2.images.reader import picture_size, read_image, read_rgb

Record = dict[str, Any]


def mapper(channels: str = "RGB", is_train: bool = False, **options: Any) -> FLSLDatasetMapper:
    return FLSLDatasetMapper(
        is_train=is_train, augmentations=[], image_format=channels, **options
    )  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_pixels_are_the_same_everywhere(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    Path(path).write_bytes(GOOD[name][0])
    pixels = read_rgb(path)
    height, width = pixels.shape[:2]
    record = {"file_name": path, "height": height, "width": width}
    for channels, order in (("RGB", 1), ("BGR", -1)):
        expected = pixels[..., ::order]
        np.testing.assert_array_equal(read_image(path, channels), expected)
        mapped = mapper(channels)(record)["image"].numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(mapped, expected)
    np.testing.assert_array_equal(LabelledImage(record, "x", 1).read(), pixels)
    upright, stored = picture_size(path)
    assert upright == (height, width)
    with Image.open(io.BytesIO(GOOD[name][0])) as image:
        # Pillow gives the size of a TIFF file upright, and of all others as it is stored.
        assert image.format == "TIFF" or stored == (image.height, image.width)


@pytest.mark.parametrize("channels", ["L", "YUV-BT.601"])
def test_other_channels_are_those_of_detectron2(channels: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Image.fromarray(smooth()).save(path)
    np.testing.assert_array_equal(
        read_image(path, channels), detectron2_read_image(path, channels)
    )  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_reasons_are_the_same_everywhere(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / name)
    Path(path).write_bytes(BAD[name])
    with pytest.raises(OSError) as caught:  # noqa: PT011  the reason is compared below
        read_rgb(path)
    reason = str(caught.value)
    record = {"file_name": path, "height": 1, "width": 1}
    for use in (
        read_image,
        lambda _: mapper()(record),
        lambda _: LabelledImage(record, "x", 1).read(),
    ):
        with pytest.raises(InputError) as refused:
            use(path)
        assert reason in str(refused.value)
        assert name in str(refused.value)
    reasons = {reason}
    try:
        picture_size(path)  # only the header is looked at
    except OSError as error:
        reasons.add(str(error))
    assert len(reasons) == 1


def dataset(folder: Path, pictures: dict[str, bytes], size: tuple[int, int]) -> Path:
    images, annotations = [], []
    for index, (name, content) in enumerate(pictures.items()):
        (folder / name).write_bytes(content)
        images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
        annotations.append({"image_id": index, "category_id": 1, "bbox": [1, 1, 9, 9]})
    content = {
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_that_were_annotated_before_turning_are_recognised(
    kind: str, tmp_path: Path
) -> None:
    pixels = smooth()
    content = {f"{i}.jpg": encoded(pixels, kind, exif=orientation(i)) for i in (1, 3, 6, 8)}
    json_file = dataset(tmp_path, content, pixels.shape[:2])
    check_coco_files(json_file, tmp_path)
    with pytest.raises(InputError, match=r"2 x .* their EXIF entry turns.*: 6\.jpg, 8\.jpg$"):
        check_coco_files(json_file, tmp_path, open_pictures=True)
    turned = {name: content[name] for name in ("6.jpg", "8.jpg")}
    check_coco_files(
        dataset(tmp_path, turned, pixels.shape[1::-1]), tmp_path, open_pictures=True
    )  # fmt: skip


def test_unreadable_and_other_pictures_are_found_in_one_look(tmp_path: Path) -> None:
    good = encoded(smooth(), "PNG")
    pictures = {"empty.png": b"", "html.png": b"<html>", "good.png": good}
    json_file = dataset(tmp_path, pictures, (3, 4))
    with pytest.raises(InputError) as caught:
        check_coco_files(json_file, tmp_path, open_pictures=True)
    unreadable, other = str(caught.value).splitlines()[1:]
    assert "empty.png (empty file), html.png (not an image of a known format" in unreadable
    assert "but a web page" in unreadable
    height, width = smooth().shape[:2]
    assert f"good.png is {width} x {height}, not 4 x 3" in other


@pytest.fixture
def record(tmp_path: Path) -> Record:
    pixels = smooth()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = [2, 3, 11, 12]
    annotation = {"bbox": box, "bbox_mode": 0, "category_id": 0, "iscrowd": 0}
    return {
        "file_name": str(tmp_path / "a.png"), "height": pixels.shape[0], "width": pixels.shape[1],
        "image_id": 1,
        "annotations": [
            {**annotation, "id": 1, "segmentation": [box_polygon(*box)]},
            {**annotation, "id": 2, "segmentation": [[2, 3, 11, 3, 7, 12]]},
        ],
    }  # fmt: skip


def test_a_plain_record_is_mapped_as_by_detectron2(record: Record) -> None:
    options = {
        "is_train": True, "image_format": "BGR", "use_instance_mask": True,
        "augmentations": [T.ResizeShortestEdge(50), T.RandomCrop("absolute", (40, 40))],
        "recompute_boxes": True,
    }  # fmt: skip
    mapped = []
    for kind in (FLSLDatasetMapper, DatasetMapper):
        np.random.seed(3)
        mapped.append(kind(**options)(record))
    ours, theirs = mapped
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
    assert torch.equal(ours["instances"].gt_classes, theirs["instances"].gt_classes)
    polygons = [i["instances"].gt_masks.polygons for i in mapped]
    for first, second in zip(*polygons, strict=True):
        np.testing.assert_array_equal(first, second)


def test_masks_of_every_form_are_learned_together(record: Record) -> None:
    runs = {"size": [record["height"], record["width"]]}
    pixels = np.zeros(runs["size"], np.uint8, order="F")
    pixels[4:9, 5:12] = 1
    record["annotations"][0]["segmentation"] = pycocotools.mask.encode(pixels)
    del record["annotations"][1]["segmentation"]
    instances = mapper(is_train=True, use_instance_mask=True)(record)["instances"]
    first, second = instances.gt_masks.tensor.numpy()
    np.testing.assert_array_equal(first, pixels)
    assert second.sum() == pytest.approx(81, abs=20)  # the box, 9 x 9, with its rim


@pytest.mark.parametrize("annotations", [[], [{"bbox": [1, 1, 8, 8], "bbox_mode": 0,
                                                "category_id": 0, "iscrowd": 0}]])  # fmt: skip
def test_boxes_are_recomputed_where_there_are_no_masks(
    annotations: list[Record], record: Record
) -> None:
    record["annotations"] = annotations
    mapped = mapper(is_train=True, use_instance_mask=True, recompute_boxes=True)(record)
    assert len(mapped["instances"]) == len(annotations)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["annotations"][1].update(bbox=[1, 2]), " with the annotation 2 "),
        (lambda r: r["annotations"][0].update(segmentation=[["a"] * 6]), " with the annotation 1 "),
        (lambda r: r["annotations"][0].pop("category_id"), " with the annotation 1 "),
        (lambda r: r["annotations"][0].update(segmentation={"size": [2, 2], "counts": b"04"}),
         " with the annotation 1 "),
        (lambda r: r.update(width=3), "SizeMismatchError"),
        (lambda r: r.update(file_name=r["file_name"] + "x"), "No such file"),
    ],
)  # fmt: skip
def test_whatever_fails_is_one_sentence_with_the_file(
    change: Any, named: str, record: Record
) -> None:
    change(record)
    with pytest.raises(InputError) as caught:
        mapper(is_train=True, use_instance_mask=True)(record)
    message = str(caught.value)
    assert "a.png" in message
    assert named in message
    assert "\n" not in message


def test_a_worker_passes_the_sentence_on(record: Record) -> None:
    Path(record["file_name"]).write_bytes(b"")
    loader = build_detection_train_loader(
        [record], mapper=mapper(is_train=True), total_batch_size=1, num_workers=1,
        aspect_ratio_grouping=False,
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert str(caught.value).endswith("(empty file); repair it or leave it out.")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
