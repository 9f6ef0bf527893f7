"""k-NN segmentation and the linear probe on tokens that know everything, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled_rectangles import GRID, WIDTH, dataset, run, samples

from flsl_d2.errors import InputError
from flsl_d2.evaluation.samples import Options, Task
from flsl_d2.evaluation.segmentation import (
    WEIGHT_DECAY,
    Confusion,
    KnnSegmentation,
    LinearSegmentation,
    ObjectRecall,
    fit_linear,
    label_pixels,
    nearest,
    patch_distributions,
)

BOTH = pytest.mark.parametrize("kind", [KnnSegmentation, LinearSegmentation])


@BOTH
def test_tokens_of_their_class_segment_perfectly_up_to_corners(kind) -> None:
    """Bilinear borders round corners off; a band over the whole height has none."""
    bands = dataset(rectangles=[((2, 0, 4, 6), 0), ((6, 0, 8, 6), 1)])
    assert run(kind, data=bands, num_neighbours=5)["mIoU"] == 100
    scores = run(kind, num_neighbours=5)
    assert scores["mIoU"] > 95
    assert {"pixel_accuracy", "IoU-background", "recall_small", "recall_tall"} < set(scores)


@BOTH
def test_tokens_that_are_all_the_same_say_background(kind) -> None:
    scores = run(kind, lambda image: torch.ones(GRID[0] * GRID[1], WIDTH), bank_size=10**6)
    truth = dataset(1).images[0].semantic
    share = (truth == 0).mean()
    if kind is LinearSegmentation:
        assert scores["pixel_accuracy"] == pytest.approx(100 * share)
        assert scores["mIoU"] == pytest.approx(100 * share / 3)
    else:  # the neighbours of a tie are any patches, but the same ones for all
        assert scores["mIoU"] <= 100 * share / 3 + 1e-6


@BOTH
def test_same_seed_same_scores_and_names_do_not_matter(kind) -> None:
    torch.manual_seed(3)
    noise = torch.randn(GRID[0] * GRID[1], WIDTH)
    order = torch.randperm(WIDTH)
    options = {"num_neighbours": 3, "bank_size": 40}
    first = run(kind, lambda image: noise, **options)
    assert first == run(kind, lambda image: noise, **options)
    assert first["mIoU"] == pytest.approx(
        run(kind, lambda image: noise[:, order], **options)["mIoU"]
    )


def test_nearest_equals_a_slow_loop_however_it_is_cut(monkeypatch) -> None:
    queries, bank = F.normalize(torch.randn(40, 6)), F.normalize(torch.randn(70, 6))
    indices, weights = nearest(queries, bank, 9, 0.07)
    for i, query in enumerate(queries):
        cosines = [float(query @ entry) for entry in bank]
        assert indices[i].tolist() == sorted(range(70), key=lambda j: -cosines[j])[:9]
    assert torch.allclose(weights, ((queries[:, None] * bank[indices]).sum(-1) / 0.07).exp())
    for name in ("_MAX_PAIRS", "_LARGE_BANK"):
        with monkeypatch.context() as changed:
            changed.setattr(f"flsl_d2.evaluation.segmentation.{name}", 50)
            found = nearest(queries, bank, 9, 0.07)
        assert torch.equal(found[0], indices)
        # The exponential of cosines over T = 0.07 magnifies rounding of float32.
        torch.testing.assert_close(found[1], weights, rtol=1e-3, atol=0)


def test_patch_distributions_equal_a_slow_count() -> None:
    labels = np.random.default_rng(0).integers(-1, 4, (23, 31))
    labels[:6, :8] = -1
    shares, labelled = patch_distributions(labels, (4, 5), 4)
    counts = np.zeros((4, 5, 4))
    for y in range(23):
        for x in range(31):
            if labels[y, x] >= 0:
                row, column = int((y + 0.5) * 4 / 23), int((x + 0.5) * 5 / 31)
                counts[row, column, labels[y, x]] += 1
    counts = counts.reshape(-1, 4)
    assert (labelled == (counts.sum(axis=1) > 0)).all()
    assert not labelled[0]
    assert labelled[1:].all()
    expected = counts[1:] / counts[1:].sum(axis=1, keepdims=True)
    assert np.allclose(shares[1:], expected)


def test_label_pixels_equals_all_classes_at_once() -> None:
    scores = torch.randn(12, 7)
    full = F.interpolate(
        scores.T.reshape(1, 7, 3, 4), size=(29, 41), mode="bilinear", align_corners=False
    )[0]
    assert (label_pixels(scores, (3, 4), (29, 41)) == full.argmax(dim=0).numpy()).all()


def test_confusion_by_hand() -> None:
    confusion = Confusion(3)
    confusion.add(np.array([[0, 0, 1, 1, -1]]), np.array([[0, 1, 1, 2, 0]]))
    scores = confusion.results(("a", "b", "c"))
    assert scores["IoU-a"] == pytest.approx(50)
    assert scores["IoU-b"] == pytest.approx(100 / 3)
    assert "IoU-c" not in scores  # it is nowhere true; predicting it cost b already
    assert scores["mIoU"] == pytest.approx((50 + 100 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(50)
    with pytest.raises(InputError, match="no pixel"):
        Confusion(3).results(("a", "b", "c"))


def test_recall_of_objects_equals_a_slow_count() -> None:
    """Rectangles whose sizes and shapes are known, against predictions drawn at random."""
    generator = np.random.default_rng(0)
    size = (220, 260)
    boxes = {  # x0, y0, x1, y1: the groups
        (0, 0, 31, 33): ("small", "square"),  # 1,023 pixels
        (40, 0, 72, 32): ("medium", "square"),  # 1,024 pixels
        (80, 0, 200, 60): ("medium", "wide"),  # exactly twice as wide as high
        (0, 50, 30, 110): ("medium", "tall"),  # exactly twice as high as wide
        (40, 70, 136, 166): ("large", "square"),  # 96 x 96
        (140, 70, 259, 130): ("medium", "square"),  # a little less than twice as wide as high
    }
    recall, expected = ObjectRecall(), {}
    for _ in range(2):  # two images
        predicted = generator.integers(0, 3, size)
        objects = []
        for i, ((x0, y0, x1, y1), groups) in enumerate(boxes.items()):
            mask, category = np.zeros(size, bool), 1 + i % 2
            mask[y0:y1, x0:x1] = True
            objects.append((mask, category))
            hits = sum(predicted[y, x] == category for y in range(y0, y1) for x in range(x0, x1))
            for group in groups:
                expected.setdefault(group, []).append(hits / ((y1 - y0) * (x1 - x0)))
        recall.add(objects, predicted)
    found = recall.results()
    assert list(found) == [f"recall_{group}" for group in ObjectRecall.GROUPS]
    for group, shares in expected.items():
        assert found[f"recall_{group}"] == pytest.approx(100 * np.mean(shares))


def test_bank_is_bounded_even_and_independent_of_order() -> None:
    data, banks = dataset(7), []
    for size, order in ((40, 1), (40, -1), (3, 1)):
        measure = KnnSegmentation(Task(None, data, data, Options(bank_size=size), 5))
        for sample in samples(data)[::order]:
            measure.observe_train(sample)
        banks.append(measure.bank.all()[0])
        assert len(banks[-1]) == size
    assert torch.equal(banks[0].sum(dim=0), banks[1].sum(dim=0))


def test_linear_probe_is_at_the_minimum_of_its_objective() -> None:
    torch.manual_seed(1)
    tokens = 5 * torch.randn(300, 6) + 3
    shares = F.softmax(tokens @ torch.randn(6, 4), dim=1)
    weight, bias = fit_linear(tokens, shares, 200)
    std = tokens.double().std(dim=0, unbiased=False)
    standardised = (tokens.double() - tokens.double().mean(dim=0)) / std
    inner = weight * std[:, None]
    predicted = F.softmax(tokens.double() @ weight + bias, dim=1)
    gradient = standardised.T @ (predicted - shares) / 300 + WEIGHT_DECAY * inner
    assert gradient.abs().max() < 1e-4
    assert (predicted.mean(dim=0) - shares.mean(dim=0)).abs().max() < 1e-4


def test_other_classes_in_the_validation_set_are_refused() -> None:
    other = dataset()._replace(pixel_classes=("background", "cat"))
    for kind in (KnnSegmentation, LinearSegmentation):
        with pytest.raises(InputError, match="pixel classes"):
            kind(Task(None, dataset(), other))
