"""Naming images and objects in boxes: folders of classes, votes and the probe."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled_rectangles import GRID, WIDTH, dataset, run
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.evaluation import measure_all, measure_features
from flsl_d2.evaluation.classification import BoxKnn, Classification, cell_tokens
from flsl_d2.evaluation.labelled_images import LabelledDataset, LabelledImage, load_labelled
from flsl_d2.evaluation.measures import MEASURES, better, suitable_measures
from flsl_d2.evaluation.samples import Options, Sample, Task
from flsl_d2.modeling import InputFormat

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


class ColourEncoder(nn.Module):
    """Tokens are the mean colours of patches: an encoder that is not a ViT."""

    patch_size, embed_dim, input_format = 8, 3, InputFormat()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3), requires_grad=False)

    def forward_tokens(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, self.patch_size).flatten(2).transpose(1, 2) @ self.weight


def write_folders(root: Path, count: int, seed: int, classes=tuple(COLOURS)) -> Path:
    """Noisy pictures of one colour for each class."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (root / name / "deeper").mkdir(parents=True)
        for i in range(count):
            noise = generator.integers(-20, 21, (24, 32, 3))
            image = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            folder = root / name / ("deeper" if i % 2 else "")
            cv2.imwrite(str(folder / f"{i}.png"), image[..., ::-1])
    return root


def test_folders_of_classes_are_a_data_set(tmp_path: Path) -> None:
    data = load_labelled(str(write_folders(tmp_path, 3, 0)))
    assert data.image_classes == ("blue", "green", "red")
    assert [image.record["image_class"] for image in data.images] == [0] * 3 + [1] * 3 + [2] * 3
    assert data.images[0].read().shape == (24, 32, 3)
    assert suitable_measures(data) == ["classification", "explained_variance"]
    few = load_labelled(str(tmp_path), max_images=4, seed=1)
    assert len(few.images) == 4
    assert few.image_classes == data.image_classes


def test_colours_are_told_apart_by_colours(tmp_path: Path) -> None:
    folders = [str(write_folders(tmp_path / name, 5, seed)) for seed, name in enumerate("ab")]
    scores = measure_features(
        ColourEncoder(), *folders, ["classification"], short_side=24, class_neighbours=(3, 10, 99)
    )
    # 99 neighbours are more than the 15 images of the bank.
    assert scores == {
        f"classification/{key}": 100 for key in ("k3_top1", "k10_top1", "linear_top1")
    }


def test_the_measures_that_suit_the_labels_are_the_default(tmp_path: Path) -> None:
    folders = [str(write_folders(tmp_path / name, 4, seed)) for seed, name in enumerate("ab")]
    results, failures = measure_all(ColourEncoder(), *folders, short_side=24)
    assert not failures
    assert {name.split("/")[0] for name in results} == {"classification", "explained_variance"}
    everything, reasons = measure_all(ColourEncoder(), *folders, list(MEASURES), short_side=24)
    assert everything == results
    assert set(reasons) == {*MEASURES} - {"classification", "explained_variance"}


def test_votes_equal_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    num_classes, width = 6, 5
    train, val = (
        LabelledDataset(
            "made",
            [LabelledImage({"image_class": i % num_classes}, "made") for i in range(count)],
            image_classes=tuple("abcdef"),
        )
        for count in (40, 20)
    )
    options = Options(class_neighbours=(1, 7), temperature=0.2)
    measure = Classification(Task(ColourEncoder(), train, val, options))  # type: ignore[arg-type]

    def samples(data: LabelledDataset) -> list[Sample]:
        return [
            Sample(i, torch.randn(4, width, generator=generator), (2, 2), None, image)
            for i, image in enumerate(data.images)
        ]

    bank, queries = samples(train), samples(val)
    for sample in bank:
        measure.observe_train(sample)
    measure.fit()
    for sample in queries:
        measure.observe_val(sample)
    hits = dict.fromkeys(("k1_top1", "k1_top5", "k7_top1", "k7_top5"), 0)
    means = [torch.stack([s.tokens.mean(dim=0) for s in part]) for part in (queries, bank)]
    similarity = F.cosine_similarity(means[0][:, None], means[1], dim=2)
    for query, cosines in zip(queries, similarity, strict=True):
        truth = query.image.record["image_class"]
        order = sorted(range(40), key=lambda i: -cosines[i])
        for k in (1, 7):
            votes = [0.0] * num_classes
            for i in order[:k]:
                votes[i % num_classes] += np.exp(float(cosines[i]) / 0.2)
            ranking = sorted(range(num_classes), key=lambda c: -votes[c])
            hits[f"k{k}_top1"] += ranking[0] == truth
            hits[f"k{k}_top5"] += truth in ranking[:5]
    found = measure.results()
    for name, count in hits.items():
        assert found[name] == 100 * count / 20


def test_classes_are_matched_by_name(tmp_path: Path, caplog) -> None:
    train = write_folders(tmp_path / "train", 4, 0, ("blue", "green", "red"))
    val = write_folders(tmp_path / "val", 2, 1, ("red",))
    (val / "green").mkdir()
    found = measure_features(
        ColourEncoder(), str(train), str(val), ["classification"], short_side=24
    )
    assert found["classification/linear_top1"] == 100
    assert "no image of ['blue', 'green']" in caplog.text


def test_faults_are_sentences(tmp_path: Path) -> None:
    good = write_folders(tmp_path / "good", 2, 0)
    other = write_folders(tmp_path / "other", 2, 0, ("blue", "green"))
    one = write_folders(tmp_path / "one", 2, 0, ("blue",))
    loose = write_folders(tmp_path / "loose", 2, 0)
    cv2.imwrite(str(loose / "alone.png"), np.zeros((8, 8, 3), np.uint8))
    for train, val, message in (
        (other, good, "has images of red, classes that"),
        (one, one, "has 1 class, and telling images apart takes 2"),
        (loose, good, r"in no folder of a class, for example alone\.png"),
        (tmp_path / "none", good, "not registered"),
    ):
        with pytest.raises(InputError, match=message):
            measure_features(
                ColourEncoder(), str(train), str(val), ["classification"], short_side=24
            )


def test_every_measure_tells_the_direction_of_its_scores() -> None:
    assert better("classification/k10_top1") == better("knn_segmentation/mIoU") == "higher"
    for score in ("cluster_quality/clusters", "explained_variance/position_r2", "other/x"):
        assert better(score) == ""


def test_cells_of_a_box_in_a_resized_image() -> None:
    """Centres x 115, 145, 175 and y 60, 100, 140 of 400 x 300 on a grid of 20 x 15 (20 pixels)."""
    found = cell_tokens((100, 40, 190, 160), (300, 400), (15, 20))
    assert found == [20 * row + column for row in (3, 5, 7) for column in (5, 7, 8)]


def test_cell_is_the_nearest_token() -> None:
    generator = np.random.default_rng(0)
    centres = np.stack(np.meshgrid((np.arange(9) + 0.5) / 0.09, (np.arange(7) + 0.5) / 0.07), -1)
    for x0, y0, w, h in generator.random((50, 4)) * 50:
        found = cell_tokens((x0, y0, x0 + w, y0 + h), (100, 100), (7, 9))
        for i, token in enumerate(found):
            point = x0 + (i % 3 + 0.5) / 3 * w, y0 + (i // 3 + 0.5) / 3 * h
            distances = np.linalg.norm(centres.reshape(-1, 2) - point, axis=1)
            assert distances[token] == pytest.approx(distances.min())


def test_a_box_at_or_beyond_the_border_stays_on_the_grid() -> None:
    assert set(cell_tokens((-50, -50, -10, -10), (100, 100), (4, 4))) == {0}
    assert set(cell_tokens((100, 100, 150, 150), (100, 100), (4, 4))) == {15}


def two_kinds():
    """Images whose largest box is of one class or of the other."""
    first = dataset(3, [((1, 1, 7, 5), 0), ((0, 0, 1, 1), 1)])
    second = dataset(3, [((1, 1, 7, 5), 1), ((0, 0, 1, 1), 0)])
    return first._replace(images=first.images + second.images)


def test_perfect_tokens_name_every_object() -> None:
    assert run(BoxKnn, data=two_kinds(), class_neighbours=(10, 20, 100)) == {
        "k10_top1": 100,
        "k20_top1": 100,
    }


def test_tokens_of_the_other_class_name_none() -> None:
    """Votes come from the bank: when the two sets disagree, every answer is wrong."""
    data = two_kinds()

    def swapped(image):
        category = image.largest_box.category
        swapped.calls += 1
        code = category if swapped.calls <= len(data.images) else 1 - category
        return torch.eye(WIDTH)[code].expand(GRID[0] * GRID[1], -1)

    swapped.calls = 0
    assert run(BoxKnn, swapped, data, class_neighbours=(10,)) == {"k10_top1": 0}


def test_largest_box_leaves_crowds_and_flat_boxes_out() -> None:
    image = dataset(1).images[0]
    image.record["annotations"][0]["iscrowd"] = 1
    image.record["annotations"].append({"bbox": [0, 0, 999, 0], "bbox_mode": 1, "category_id": 0})
    assert image.largest_box == ((40, 16, 64, 40), 1)


def test_faults_of_boxes_are_sentences() -> None:
    one = dataset()._replace(box_classes=("person",))
    with pytest.raises(InputError, match="telling objects apart"):
        run(BoxKnn, data=one)
    with pytest.raises(InputError, match="36 tokens, too few for k = 50"):
        run(BoxKnn, class_neighbours=(50, 100))
    with pytest.raises(InputError, match="no training image has a box"):
        run(BoxKnn, data=dataset(rectangles=[]))
