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
from flsl_d2.images.reader import read_rgb


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
    save(tmp_path / "labels" / "1.png", np.eye(8).reshape(2, 4, 8)[..., :3])
    with pytest.raises(InputError, match="has colours"):
        check_label_images(name)
    save(tmp_path / "labels" / "1.png", np.zeros((4, 2)))
    with pytest.raises(InputError, match="4 x 2 pixels and its picture 2 x 4"):
        check_label_images(name)


LABELS = np.array([[0, 1, 2, 3], [4, 5, 255, 7]], np.uint8)


def palette_image(labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    return image


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


KINDS = {
    "grey": Image.fromarray(LABELS),
    "palette": palette_image(LABELS),
    "equal colours": Image.fromarray(np.repeat(LABELS[..., None], 3, axis=2)),
    "opaque": Image.fromarray(np.dstack([LABELS, np.full_like(LABELS, 255)]), "LA"),
    "16 bits": Image.fromarray(LABELS.astype(np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_one_reader_reads_every_kind(kind, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    KINDS[kind].save(path)
    assert read_labels(str(path), dtype="int64").tolist() == LABELS.tolist()
    path.rename(tmp_path / "named.jpg")  # the content decides
    assert read_labels(str(tmp_path / "named.jpg"), size=(2, 4)).tolist() == LABELS.tolist()


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_labels_are_turned_as_their_picture(value, suffix, tmp_path):
    for kind in ("grey", "palette"):
        path = str(tmp_path / f"{kind}.{suffix}")
        KINDS[kind].save(path, exif=orientation(value))
        Image.fromarray(np.repeat(LABELS[..., None], 3, 2)).save(
            tmp_path / "picture.png", exif=orientation(value)
        )
        picture = read_rgb(str(tmp_path / "picture.png"))
        np.testing.assert_array_equal(read_labels(path), picture[..., 0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Image.fromarray(np.zeros((2, 4, 4), np.uint8)), "transparent"),
        (Image.fromarray(LABELS.astype(np.float32)), "floats"),
        (b"no image", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_what_holds_no_numbers_is_refused(content, reason, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
    with pytest.raises(InputError, match=reason):
        read_labels(str(path))
    KINDS["grey"].save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="JPEG"):
        read_labels(str(tmp_path / "a.jpg"))


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
