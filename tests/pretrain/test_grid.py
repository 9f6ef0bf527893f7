"""The grid of a sweep: values as typed, pairs of schedules, and names."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from pretrain.studies.sweep import Axis, grid_points, parse_axis, short_names

CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.zeros((32, 32, 3), np.uint8))
    return [f"dataset.root={tmp_path}", "train.device=cpu", "train.max_iter=7"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", ("1", "2")),
        ("a.b=1", ("1",)),
        ("a.b=[1,2],[3,4]", ("[1,2]", "[3,4]")),
        ("a.b=[0.1,1.0], 0.5", ("[0.1,1.0]", "0.5")),
        ("a.b=null,[0.5,0.5]", ("null", "[0.5,0.5]")),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets(text, values):
    assert parse_axis(text) == Axis("a.b", values)


@pytest.mark.parametrize("text", ["a.b", "=1,2", "a.b=", "a.b=1,,2", "a.b=1,1"])
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(InputError, match="--grid"):
        parse_axis(text)


numbers = st.floats(1e-3, 1e3).map(str)
lists = st.lists(numbers, min_size=1, max_size=3).map(lambda items: f"[{','.join(items)}]")


@given(st.lists(numbers | lists, min_size=1, max_size=5, unique=True))
def test_any_list_of_values_is_read_back(values):
    assert parse_axis(f"key={','.join(values)}").values == tuple(values)


def test_names_are_short_where_that_is_clear():
    assert short_names(["a.x", "b.y", "c.y"]) == {"a.x": "x", "b.y": "b.y", "c.y": "c.y"}


def test_every_combination_with_every_seed(overrides):
    axes = [
        Axis("schedules.intra_weight", ("0.01", "[0.02,0.2]")),
        Axis("model.head.num_centroids", ("16", "32")),
    ]
    points = grid_points(CONFIG, axes, overrides, [3, 4])
    assert len(points) == 8
    assert len({(*point.values.items(), point.seed) for point in points}) == 8
    first, last = points[0], points[-1]
    assert list(first.cfg.schedules.intra_weight) == [0.01, 0.01]
    assert list(last.cfg.schedules.intra_weight) == [0.02, 0.2]
    assert last.cfg.model.loss.num_centroids == 32
    assert (first.cfg.train.seed, last.cfg.train.seed) == (3, 4)
    assert all(point.total_iters == 7 for point in points)
    assert "schedules.intra_weight=[0.01,0.01]" in first.overrides


def test_a_pair_outside_of_schedules_takes_no_single_number(overrides):
    with pytest.raises(InputError, match="holds a list"):
        grid_points(CONFIG, [Axis("views.global_scale", ("0.5",))], overrides, [])


def test_without_a_grid_there_is_one_run(overrides):
    (point,) = grid_points(CONFIG, [], overrides, [])
    assert point.values == {}
    assert point.seed == 0


@pytest.mark.filterwarnings("error")
def test_a_previous_stage_is_checked_with_its_weights(overrides, tmp_path):
    encoder = FLSLViT(img_size=32, embed_dim=32, depth=2, num_heads=2)
    content = {"model": encoder.state_dict(), "encoder": encoder.architecture}
    torch.save({**content, "format": "flsl_d2 encoder"}, tmp_path / "previous.pth")
    axis = Axis("model.previous_stage.weights", (str(tmp_path / "previous.pth"),))
    (point,) = grid_points(CONFIG, [axis], overrides, [])
    assert point.cfg.model.previous_stage.weights.endswith("previous.pth")
    with pytest.raises(InputError, match=r"weights=/nowhere\.pth: "):
        grid_points(CONFIG, [Axis(axis.key, ("/nowhere.pth",))], overrides, [])
