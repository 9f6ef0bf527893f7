"""The rules that choose a run's settings, over all sizes of data and devices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.detection.finetune_plan import (
    DataFacts,
    Device,
    anchor_warnings,
    collect_facts,
    config_text,
    make_plan,
)

GIB = 2**30
SMALL = {"embed_dim": 384, "depth": 12, "patch_size": 16}
LARGE = {"embed_dim": 1024, "depth": 24, "patch_size": 16}


def facts(num_images: int, side: float = 640, objects: list | None = None) -> DataFacts:
    sizes = np.full((num_images, 2), side)
    return DataFacts(
        num_images, 0, num_images, {"a": num_images}, sizes,
        np.array(objects or [[0.2, 0.2]]), 1.0, 1,
    )  # fmt: skip


@given(
    st.integers(1, 2_000_000),
    st.floats(16, 8000),
    st.sampled_from(["cuda", "cpu"]),
    st.floats(1, 200),
    st.sampled_from([SMALL, LARGE]),
    st.sampled_from([0, 1, 7, 100_000]),
    st.sampled_from([0, 64, 1216]),
)
def test_a_plan_can_always_run(num_images, side, name, memory, encoder, max_iter, short_side):
    device = Device(name, memory * GIB, 8)
    plan = make_plan(facts(num_images, side), device, encoder, max_iter, short_side)
    assert plan.max_iter >= 1
    assert max_iter in (0, plan.max_iter)
    assert 0 <= plan.warmup_steps <= plan.max_iter // 10
    assert plan.warmup_steps <= 1000
    assert 1 <= plan.batch_size <= 16
    assert plan.batch_size <= max(1, num_images // 4)
    assert plan.batch_size.bit_count() == 1
    # It has three digits, so that it is off by at most 0.005 in 1.
    rate = 3e-4 if name == "cpu" else 1e-4 * math.sqrt(plan.batch_size / 16)
    assert plan.learning_rate == pytest.approx(rate, rel=5e-3)
    assert 1 <= plan.eval_period <= plan.max_iter
    assert plan.max_iter / plan.eval_period <= 10
    assert plan.log_period <= plan.eval_period
    assert plan.short_side >= 32
    assert short_side in (0, plan.short_side)
    assert plan.train_sides[-1] == plan.short_side
    assert plan.max_side >= plan.short_side


@pytest.mark.parametrize(
    ("num_images", "name", "memory", "steps", "batch", "epochs"),
    [
        (10, "cpu", 24, 400, 2, 80),
        (120, "cpu", 24, 720, 2, 12),
        (10_000, "cpu", 24, 2000, 2, 0),
        (120, "cuda", 24, 1500, 8, 100),
        (10, "cuda", 24, 500, 2, 100),
        (1_000, "cuda", 12, 25_000, 4, 100),
        (10_000, "cuda", 80, 25_764, 16, 41),
        (118_000, "cuda", 80, 88_500, 16, 12),
        (1_000_000, "cuda", 80, 750_000, 16, 12),
    ],
)
def test_settings_for_sizes_of_data_and_memory(num_images, name, memory, steps, batch, epochs):
    plan = make_plan(facts(num_images), Device(name, memory * GIB, 8), SMALL)
    assert (plan.max_iter, plan.batch_size) == (steps, batch)
    assert round(plan.max_iter * plan.batch_size / num_images) == epochs
    assert plan.short_side == (800 if name == "cuda" else 320)


def test_an_encoder_that_does_not_fit_is_recomputed_and_the_user_is_told():
    assert not make_plan(facts(1000), Device("cuda", 24 * GIB, 8), LARGE).recompute
    plan = make_plan(facts(1000), Device("cuda", 6 * GIB, 8), LARGE)
    assert plan.recompute
    assert "does not fit" in plan.reasons["recompute"]
    asked = make_plan(facts(1000), Device("cuda", 6 * GIB, 8), LARGE, batch_size=64)
    assert asked.batch_size == 64
    assert "may not fit" in asked.reasons["batch_size"]


def test_several_gpus_share_a_batch():
    plan = make_plan(facts(1000), Device("cuda", 12 * GIB, 8), SMALL, num_processes=3)
    assert plan.batch_size == 6
    few = make_plan(facts(9), Device("cuda", 12 * GIB, 8), SMALL, num_processes=8)
    assert few.batch_size == 8


def test_small_pictures_are_enlarged_to_twice_their_side_at_most():
    assert make_plan(facts(100, 100), Device("cuda", 24 * GIB, 8), SMALL).short_side == 192
    assert make_plan(facts(100, 4000), Device("cuda", 24 * GIB, 8), SMALL).short_side == 800


def test_objects_that_anchors_do_not_fit_are_named_with_a_remedy():
    square = [[0.2, 0.2]] * 8
    assert anchor_warnings(facts(1, objects=square), 800) == []
    with_small = facts(1, objects=[*square, [0.012, 0.012], [0.012, 0.012]])
    (small,) = anchor_warnings(with_small, 800)
    assert "20% of the objects are too small" in small
    assert "median side is 10 pixels" in small
    side = int(small.split("--short-side ")[1].split()[0])
    assert anchor_warnings(with_small, side) == []
    (tinier,) = anchor_warnings(facts(1, objects=[[0.002, 0.002]]), 800)
    assert "--slice" in tinier
    (large,) = anchor_warnings(facts(1, objects=[[1.3, 1.3]]), 800)
    assert "smaller --short-side" in large
    (thin,) = anchor_warnings(facts(1, objects=[[0.8, 0.02]]), 800)
    assert "ratio of 40.0" in thin


def test_facts_of_records():
    records = [
        {"height": 100, "width": 200, "annotations": [
            {"iscrowd": 0, "category_id": 1, "bbox": [0, 0, 50, 20], "segmentation": [[1]]},
            {"iscrowd": 1, "category_id": 0, "bbox": [0, 0, 9, 9]},
            {"iscrowd": 0, "category_id": 1, "bbox": [0, 0, 10, 20]}]},
        {"height": 10, "width": 10, "annotations": []},
    ]  # fmt: skip
    found = collect_facts(records, ["a", "b"])
    assert (found.num_images, found.num_without, found.num_objects) == (1, 1, 2)
    assert found.class_counts == {"a": 0, "b": 2}
    assert found.object_sizes.tolist() == [[0.2, 0.5], [0.2, 0.1]]
    assert (found.mask_share, found.max_objects) == (0.5, 2)


def test_a_config_says_why():
    text = config_text("a.py", [("train.seed", 3, "because"), ("train.x", "y", "")])
    assert "# Because.\ntrain.seed = 3\ntrain.x = 'y'" in text
    compile(text, "config", "exec")
