"""All measures together, on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flsl_d2.errors import InputError
from flsl_d2.evaluation.measures import (
    MEASURES,
    measure_all,
    measure_features,
    measures_table,
    omitted_scores,
    prepare_measures,
)
from flsl_d2.modeling import FLSLViT

SMALL = {
    "max_images": 4,
    "short_side": 80,
    "bank_size": 200,
    "kernel_widths": (4.0, 16.0),
    "cluster_counts": (2, 4),
}
PENN = ("pennfudan_train", "pennfudan_val")
SEGMENTING = ("knn_segmentation", "linear_segmentation", "cluster_quality", "explained_variance")


@pytest.fixture
def encoder() -> FLSLViT:
    return FLSLViT(img_size=96, embed_dim=32, depth=2, num_heads=2)


def test_pennfudan(encoder: FLSLViT, datasets_root: Path) -> None:
    encoder.train()
    state = torch.get_rng_state()
    scores = measure_features(encoder, *PENN, SEGMENTING, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    for name, value in scores.items():
        if not name.endswith(("clusters", "kernel_width", "tuned_clusters")):
            assert -100 <= value <= 100, name
    assert scores["cluster_quality/ari_token_limit"] > 30
    assert scores["cluster_quality/ari_token_limit"] > scores["cluster_quality/ari_mean_shift"]
    assert 0 < scores["knn_segmentation/mIoU"] < 100
    assert {"position_r2", "colour_r2"} == {
        name.split("/")[1] for name in scores if name.startswith("explained_variance/")
    }
    other_seed = measure_features(encoder, *PENN, ["knn_segmentation"], seed=1, **SMALL)
    assert other_seed["knn_segmentation/mIoU"] != scores["knn_segmentation/mIoU"]


def test_again_and_with_other_threads_the_same(encoder: FLSLViT, datasets_root: Path) -> None:
    before, scores = torch.get_num_threads(), []
    quick = {"max_images": 2, "short_side": 48, "kernel_widths": (8.0,), "cluster_counts": (3,)}
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            scores.append(measure_features(encoder, *PENN, SEGMENTING, **{**SMALL, **quick}))
    finally:
        torch.set_num_threads(before)
    assert scores[0] == scores[1]
    # One more thread sums in another order, which may move a few of thousands of pixels.
    assert scores[0] == pytest.approx(scores[2], abs=0.01)


def test_coco_boxes(encoder: FLSLViT, datasets_root: Path) -> None:
    data = "coco_2017_train", "coco_2017_val"
    scores = measure_features(encoder, *data, ["knn_box"], **{**SMALL, "max_images": 8})
    assert set(scores) == {f"knn_box/k{k}_top{n}" for k in (10, 20) for n in (1, 5)}
    assert all(scores[f"knn_box/k{k}_top1"] <= scores[f"knn_box/k{k}_top5"] for k in (10, 20))


def test_a_measure_that_fails_does_not_stop_the_others(
    encoder: FLSLViT, datasets_root: Path
) -> None:
    results, failures = measure_all(
        encoder, *PENN, ["knn_box", "knn_segmentation"], **{**SMALL, "max_images": 2}
    )
    assert list(failures) == ["knn_box"]
    assert results["knn_segmentation/mIoU"] > 0
    table = measures_table(["knn_box", "knn_segmentation"], results, failures, {})
    assert "failed" in table.splitlines()[2]
    assert f"knn_box failed: {failures['knn_box']}" in table
    assert f"{results['knn_segmentation/mIoU']:.2f}" in table
    with pytest.raises(InputError, match="knn_box: the boxes"):
        measure_features(encoder, *PENN, **{**SMALL, "max_images": 2})


def test_a_failure_on_the_way_stops_its_measure_alone(
    encoder: FLSLViT, datasets_root: Path, monkeypatch
) -> None:
    def fail(self) -> None:
        raise InputError("not today")

    monkeypatch.setattr(MEASURES["linear_segmentation"], "fit", fail)
    measures = ["linear_segmentation", "knn_segmentation"]
    results, failures = measure_all(encoder, *PENN, measures, **{**SMALL, "max_images": 2})
    assert failures == {"linear_segmentation": "not today"}
    assert {name.split("/")[0] for name in results} == {"knn_segmentation"}


def test_data_and_encoders_that_do_not_fit_fail_every_measure(
    encoder: FLSLViT, datasets_root: Path
) -> None:
    results, failures = measure_all(encoder, "pennfudan_trian", PENN[1], SEGMENTING)
    assert not results
    assert set(failures) == set(SEGMENTING)
    assert all("not registered" in reason for reason in failures.values())
    results, failures = measure_all(encoder, *PENN, SEGMENTING, max_images=2, short_side=10)
    assert not results
    assert all("patch of the encoder 16" in reason for reason in failures.values())
    names = ["knn_box", "knn_segmentation", "linear_segmentation"]
    results, failures = measure_all(encoder, PENN[0], "coco_2017_val", names, **SMALL)
    assert all("two splits of one data set" in failures[name] for name in names)


def test_scores_without_a_meaning_say_why(encoder: FLSLViT) -> None:
    assert omitted_scores(encoder, ["cluster_quality", "knn_box"]) == {}
    assert omitted_scores(torch.nn.Identity(), ["knn_box"]) == {}
    omitted = omitted_scores(torch.nn.Identity(), ["cluster_quality"])
    assert "cluster_quality/ari_attention" in omitted
    lines = measures_table(["cluster_quality"], {}, {}, omitted).splitlines()
    assert lines[2].split() == ["cluster_quality", "ari_attention", "n/a"]
    assert lines[-1] == f"n/a: {omitted['cluster_quality/ari_attention']}"


def test_wrong_names_are_refused_at_once(encoder: FLSLViT) -> None:
    with pytest.raises(InputError, match="no measure 'knn'"):
        measure_all(encoder, *PENN, ["knn"])
    with pytest.raises(InputError, match="no measure was named"):
        measure_all(encoder, *PENN, [])
    with pytest.raises(InputError, match="no option 'shortside'"):
        measure_all(encoder, *PENN, shortside=3)
    with pytest.raises(InputError, match="not registered"):
        prepare_measures("nothing", "nothing")


def test_prepared_data_give_the_same_and_keep_nothing(
    encoder: FLSLViT, datasets_root: Path
) -> None:
    few = {**SMALL, "max_images": 2}
    sets = prepare_measures(*PENN, ["knn_segmentation"], **few)
    prepared = measure_all(encoder, *sets, ["knn_segmentation"], **few)
    assert prepared == measure_all(encoder, *PENN, ["knn_segmentation"], **few)
    for image in sets[0].images + sets[1].images:
        assert "semantic" not in vars(image)
        assert "segments" not in vars(image)
