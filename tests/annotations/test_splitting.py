"""Splits: whole groups, every class learned, the share met, and the same again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.annotations.splitting import split_by_image
from flsl_d2.errors import InputError


def data(labels: list[list[int]], names: list[str] | None = None) -> dict:
    """Images with boxes of these classes."""
    names = names or [f"{i}.jpg" for i in range(len(labels))]
    pairs = [(image, label) for image, listed in enumerate(labels) for label in listed]
    return {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": label}
            for i, (image, label) in enumerate(pairs)
        ],
        "categories": [{"id": label, "name": str(label)} for label in range(4)],
    }


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=2, max_size=30),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_parts_are_disjoint_whole_groups_and_every_class_is_learned(labels, share, seed, frames):
    names = [f"video{i // frames}_{i}.jpg" for i in range(len(labels))]
    coco = data(labels, names)
    try:
        train, val = split_by_image(coco, share, seed, r"(video\d+)_")
    except InputError:  # too few groups; see below
        return
    assert sorted(i["id"] for i in [*train["images"], *val["images"]]) == list(range(len(labels)))
    videos = [{i["id"] // frames for i in part["images"]} for part in (train, val)]
    assert not videos[0] & videos[1]
    learned = {a["category_id"] for a in train["annotations"]}
    assert learned == {label for listed in labels for label in listed}
    assert val["annotations"]
    for part in (train, val):
        ids = {i["id"] for i in part["images"]}
        assert all(a["image_id"] in ids for a in part["annotations"])
    # One group beyond the share is taken only where it is the first.
    assert len(val["images"]) <= max(round(share * len(labels)), frames)
    assert (train, val) == split_by_image(coco, share, seed, r"(video\d+)_")


def test_the_share_is_met_and_the_seed_decides():
    coco = data([[i % 4] for i in range(120)])
    parts = [split_by_image(coco, 0.2, seed)[1] for seed in (0, 1)]
    assert [len(part["images"]) for part in parts] == [24, 24]
    assert parts[0] != parts[1]


def test_what_cannot_be_split_is_said():
    for labels, share, pattern, message in (
        ([[0]], 0.2, "", "too few"),
        ([[0], [1], [2]], 0.2, "", "too few"),  # every image has the only box of its class
        ([[0], []], 0.5, "", "too few"),
        ([[0], [0]], 1.0, "", "between 0 and 1"),
        ([[0], [0]], 0.5, "(", "no regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            split_by_image(data(labels), share, 0, pattern)
