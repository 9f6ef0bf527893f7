"""The protocols of others: equal to their reference implementations from the same tokens.

`tests/golden/make_protocols.py` wrote the references' figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import protocol_inputs as made
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.evaluation.benchmarks import load_spair
from flsl_d2.evaluation.clustering import Clustering, cluster_points
from flsl_d2.evaluation.correspondence import Correspondence, match_points
from flsl_d2.evaluation.discovery import Discovery, cells_to_box, find_objects, overlaps
from flsl_d2.evaluation.features import encoding_in
from flsl_d2.evaluation.in_context import InContext, add_rare
from flsl_d2.evaluation.labelled_images import (
    IGNORED,
    LabelledDataset,
    LabelledImage,
    load_labelled,
)
from flsl_d2.evaluation.measures import (
    better,
    measure_all,
    measure_features,
    read_options,
    suitable_measures,
)
from flsl_d2.evaluation.samples import Options, Task
from flsl_d2.evaluation.segmentation import Confusion, TokenBank, label_pixels, retrieve
from flsl_d2.modeling import FLSLViT, InputFormat

REFERENCE = json.loads((Path(__file__).parents[1] / "golden" / "protocols.json").read_text())
CLASSES = ("background", *"abcde")


def labels_of(patches: np.ndarray, shift: int = 3) -> np.ndarray:
    labels = made.pixels(patches, shift)
    return np.where(labels == 255, IGNORED, labels)


@pytest.mark.parametrize(("part", "per_image"), [("whole", 64), ("drawn", 20)])
def test_in_context_retrieval_equals_open_hummingbird(part: str, per_image: int) -> None:
    torch.manual_seed(0)
    uniform = torch.rand(10, made.CELLS**2).numpy()  # as the reference draws them
    bank, patches = TokenBank(), made.blocks(0, 10)
    for index, tokens in enumerate(made.tokens(patches, 10)):
        labels = np.maximum(labels_of(patches)[index], 0)  # void is class 0 there
        size = made.CLASSES, per_image
        add_rare(bank, torch.from_numpy(tokens), labels, *size, uniform[index])
    confusion, patches = Confusion(made.CLASSES), made.blocks(1, 6)
    for tokens, labels in zip(made.tokens(patches, 11), labels_of(patches), strict=True):
        scores = retrieve(torch.from_numpy(tokens), bank.memory(), 30, 0.02)
        grid = made.CELLS, made.CELLS
        confusion.add(labels, label_pixels(scores, grid, labels.shape))
    # Ties of float32 at the 30th neighbour.
    assert confusion.mean_iou(True) == pytest.approx(REFERENCE["hummingbird"][part], abs=0.05)


def square_data(count: int = 3, classes=CLASSES) -> LabelledDataset:
    return LabelledDataset("made", [LabelledImage({}, "made")] * count, (), classes)


def tiny_encoder(**changes) -> FLSLViT:
    return FLSLViT(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2, **changes)


def test_clusters_equal_leopart() -> None:
    options = Options(as_reference=True, num_clusters=30, cluster_seeds=2)
    measure = Clustering(Task(tiny_encoder(), square_data(), square_data(), options))
    patches = made.blocks(2, 40)
    inside = ((patches > 0) & (patches < 255)).reshape(40, -1)
    tokens = made.tokens(patches, 12)
    found = {}
    for shift, part in ((3, ""), (0, "foreground_")):
        labels = labels_of(patches, shift)
        rows = np.arange(100) * made.SIDE // 100
        truths = labels[:, rows][:, :, rows]
        scores = measure.score(tokens, truths, inside)
        found |= {k: v for k, v in scores.items() if k.startswith("fore") == bool(part)}
    for name in found:
        key = ("foreground" if "fore" in name else "all") + ("_many" if "many" in name else "_one")
        # Rounding of float32 in PCA may move a token between two clusters.
        if not name.endswith("_std"):
            assert found[name] == pytest.approx(REFERENCE["leopart"][key], abs=0.05), name


def test_boxes_equal_lost_and_tokencut() -> None:
    for index, (seed, rows, columns) in enumerate(made.SCENES):
        keys = torch.from_numpy(made.keys(seed, rows, columns))
        size = made.image_size(rows, columns)
        lost, tokencut, own = find_objects(keys, keys, (rows, columns))
        for name, cells in (("lost", lost), ("tokencut", tokencut)):
            box = cells_to_box(cells, made.PATCH, size)
            expected = [int(value) for value in REFERENCE["discovery"][name][index].split()]
            assert list(box) == expected, (name, index)
        assert own.any()


def test_key_points_equal_sd_dino(tmp_path: Path) -> None:
    made.write_spair(tmp_path)
    hits = []
    for index, record in enumerate(load_spair(tmp_path, "test")):
        pair = (torch.from_numpy(made.spair_tokens(2 * index + i)) for i in (0, 1))
        hits.append(match_points(*pair, record["pair"], 840))
    categories = [np.concatenate(hits[:5]).mean(), np.concatenate(hits[5:]).mean()]
    found = {
        "point": np.concatenate(hits).mean(),
        "image": np.mean([each.mean() for each in hits]),
        "category": np.mean(categories),
    }
    for name, value in found.items():
        assert 100 * value == pytest.approx(REFERENCE["sd_dino"][name], abs=0.05), name


def write_pictures(root: Path, count: int = 4) -> None:
    """VOC's layout, with two classes, void borders and boxes of the objects."""
    names, generator = [f"2007_{i:06}" for i in range(count)], np.random.default_rng(0)
    for folder in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (root / "VOC2012" / folder).mkdir(parents=True)
    (root / "VOC2012/ImageSets/Segmentation/val.txt").write_text("\n".join(names) + "\n")
    for index, name in enumerate(names):
        labels = np.full((60, 90), 0, np.uint8)
        labels[9:51, 9:51] = 255
        labels[10:50, 10:50] = 1 + index % 2
        colours = np.array([[20, 200, 40], [220, 30, 20], [20, 30, 220]])[labels % 255]
        noisy = (colours + generator.integers(-20, 20, colours.shape)).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(root / f"VOC2012/JPEGImages/{name}.jpg")
        Image.fromarray(labels).save(root / f"VOC2012/SegmentationClass/{name}.png")


@pytest.fixture
def benchmarks(tmp_path: Path, monkeypatch):
    """Folder of data sets whose benchmarks are registered below it."""

    def forget() -> None:
        starts = "voc_2012_sem", "ade20k_150", "cityscapes_19", "coco_thi", "coco_stuff1", "spair"
        for name in [
            name for name in DatasetCatalog.list() if name.startswith((*starts, "things"))
        ]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    forget()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    yield tmp_path
    forget()


def test_measures_of_whole_sets_on_pictures(benchmarks: Path) -> None:
    write_pictures(benchmarks)
    name, names = "voc_2012_sem_seg_val", ("in_context", "clustering", "discovery")
    options = {"side": 64, "fractions": (1, 2, 64), "num_clusters": 4, "cluster_seeds": 2}
    assert "in_context" not in suitable_measures(load_labelled(name))
    scores, failures = measure_all(tiny_encoder(), name, name, names, **options)
    assert set(failures) == {"discovery"}
    assert "has a box" in failures["discovery"]
    # Void pixels and the 18 classes that do not occur count nowhere.
    assert 40 < scores["in_context/mIoU"] <= 100
    assert {"in_context/mIoU", "in_context/mIoU_1_of_2"} == {k for k in scores if "_con" in k}
    assert 20 < scores["clustering/mIoU_many"] <= 100
    assert scores["clustering/foreground_mIoU_many"] >= 50
    assert better("clustering/mIoU") == "higher" != better("clustering/mIoU_many_std")
    again, _ = measure_all(tiny_encoder(), name, name, ["in_context"], **options, as_reference=True)
    assert again["in_context/mIoU"] < scores["in_context/mIoU"]  # a mean over 21 classes


def test_objects_are_discovered_and_padding_is_no_object(benchmarks: Path) -> None:
    write_pictures(benchmarks)
    boxes = [{"bbox": [10, 10, 40, 40], "bbox_mode": 1, "category_id": 0}]
    files = sorted((benchmarks / "VOC2012/JPEGImages").iterdir())
    records = [
        {"file_name": str(file), "height": 60, "width": 90, "annotations": boxes} for file in files
    ]
    DatasetCatalog.register("things", lambda: records)
    MetadataCatalog.get("things").set(thing_classes=["thing"])
    scores = measure_features(tiny_encoder(), "things", "things", ["discovery"])
    assert set(scores) == {f"discovery/corloc_{w}" for w in ("lost", "tokencut", "mean_shift")}
    assert all(0 <= value <= 100 for value in scores.values())
    with pytest.raises(InputError, match="keys are read from an FLSLViT"):
        Discovery(Task(None, square_data(), square_data()))
    assert cells_to_box(np.ones((8, 12), bool), 8, (60, 90)) == (0, 0, 90, 60)
    assert overlaps((0, 0, 2, 2), np.array([[0, 0, 1, 2], [5, 5, 6, 6]]))
    assert not overlaps((0, 0, 2, 2), np.array([[1, 1, 3, 3]]))


def test_an_encoder_of_16_bits_and_one_channel(tmp_path: Path) -> None:
    """Pictures are read in the encoder's format; an RGB reader would refuse or clip them."""
    encoder, images = tiny_encoder(in_chans=1), []
    encoder.input_format = InputFormat(1, 16, (9000.0,), (6000.0,), True)
    encoder.blocks[-1].attn.qkv.weight.data *= 20
    for index in range(4):
        labels = np.zeros((60, 90), np.uint8)
        labels[10:50, 10 + index : 50] = 1 + index % 2
        noise = np.random.default_rng(index).integers(0, 3000, labels.shape)
        name = str(tmp_path / f"{index}.png")
        Image.fromarray((8000 * labels.astype(int) + noise).astype(np.uint16)).save(name)
        Image.fromarray(labels).save(tmp_path / f"labels_{index}.png")
        box = {"bbox": [10 + index, 10, 40 - index, 40], "bbox_mode": 1, "category_id": 0}
        pair = {"category": "thing", "target_box": [0, 0, 90, 60]}
        for which in ("source", "target"):
            pair |= {which: name, f"{which}_points": [[20, 20], [70, 9]], f"{which}_size": (90, 60)}
        record = {"file_name": name, "sem_seg_file_name": str(tmp_path / f"labels_{index}.png")}
        images.append(LabelledImage({**record, "annotations": [box], "pair": pair}, "made", 3))
    data = LabelledDataset("made", images, ("thing",), ("background", "a", "b"))
    names = ("in_context", "clustering", "discovery", "correspondence", "knn_segmentation")
    options = {"side": 64, "fractions": (1,), "num_clusters": 4, "cluster_seeds": 1}
    found = [{}, {}]
    for dtype, scores in zip((None, torch.bfloat16), found, strict=True):
        with encoding_in(dtype):
            scores |= measure_features(encoder, data, data, names, short_side=64, **options)
    assert found[0]["correspondence/pck_point"] == 100
    assert found[0]["in_context/mIoU"] > 60
    assert set(found[0]) == set(found[1])


def test_a_picture_finds_its_own_points(benchmarks: Path) -> None:
    made.write_spair(benchmarks / "SPair-71k")
    data = load_labelled("spair_71k_test")
    for index, image in enumerate(data.images):
        pair, generator = image.record["pair"], np.random.default_rng(index)
        noise = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(pair["source_size"]).save(pair["source"])
        pair |= {f"target{k[6:]}": pair[k] for k in list(pair) if k.startswith("source")}
        pair["target_box"] = [0, 0, *pair["source_size"]]
    task = Task(tiny_encoder(), data, data, Options(side=128))
    assert Correspondence(task).results() == dict.fromkeys(
        ("pck_point", "pck_image", "pck_category"), 100
    )
    with pytest.raises(InputError, match="no pairs of images"):
        Correspondence(Task(tiny_encoder(), square_data(), square_data()))


def test_layouts_of_benchmarks(benchmarks: Path) -> None:
    def write(path: str, values: np.ndarray) -> None:
        (benchmarks / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(benchmarks / path)

    image, labels = np.zeros((4, 4, 3)), np.arange(16).reshape(4, 4)
    write("ADEChallengeData2016/images/validation/a.jpg", image)
    write("ADEChallengeData2016/annotations/validation/a.png", labels)
    write("cityscapes/leftImg8bit/val/bonn/b_leftImg8bit.png", image)
    write("cityscapes/gtFine/val/bonn/b_gtFine_labelIds.png", labels)
    write("coco/val2017/c.jpg", image)
    write("coco/annotations/stuff_val2017_pixelmaps/c.png", labels + 92)
    kinds = ["textile", "sky", "other"]
    stuff = [{"id": 92 + i, "name": k, "supercategory": k} for i, k in enumerate(kinds)]
    stuff_file = benchmarks / "coco/annotations/stuff_val2017.json"
    stuff_file.write_text(json.dumps({"categories": stuff}))
    expected = {
        "ade20k_150_val": [-1, 0, 1, 2],
        "cityscapes_19_val": [-1, -1, -1, -1, -1, -1, -1, 0, 1],
        "coco_stuff15_val": [11, 8, -1, -1],
    }
    for name, values in expected.items():
        data = load_labelled(name)
        assert data.images[0].semantic.ravel()[: len(values)].tolist() == values
        assert f"{len(data.pixel_classes)}_val" in name
    box = {"bbox": [0, 0, 2, 4], "area": 8, "iscrowd": 0}
    box["segmentation"] = [[0, 0, 2, 0, 2, 4, 0, 4]]
    content = {
        "images": [{"id": 1, "file_name": "c.jpg", "height": 4, "width": 4}],
        "categories": [{"id": 7, "name": "dog", "supercategory": "animal"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, **box}],
    }
    (benchmarks / "coco/annotations/instances_val2017.json").write_text(json.dumps(content))
    things = load_labelled("coco_things12_val")
    assert things.images[0].semantic[0].tolist() == [1, 1, -1, -1]
    assert things.pixel_classes[1] == "animal"
    with pytest.raises(InputError, match="put SPair-71k there"):
        load_labelled("spair_71k_val")


def test_what_cannot_be_measured_is_a_sentence() -> None:
    with pytest.raises(InputError, match="48 tokens cannot form 50 clusters"):
        cluster_points(np.zeros((48, 2), np.float32), 50, 0)
    with pytest.raises(InputError, match="side is 4 pixels"):
        InContext(Task(tiny_encoder(), square_data(), square_data(), Options(side=4)))
    options = {"side": 64, "fractions": (8,), "as_reference": True}
    assert read_options(["side=64", "fractions=8", "as_reference=true"]) == options
    for text in ("side", "side=wide", "side=[1,2]"):
        with pytest.raises(InputError, match="has no number"):
            read_options([text])
