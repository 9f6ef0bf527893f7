"""Draws of labelled images, and data sets known by their content."""

from __future__ import annotations

import argparse
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.annotations.datasets import register_coco_format
from flsl_d2.errors import InputError
from flsl_d2.studies.few_labels import count_of, describe_draw, drawn, few_labels, shares
from flsl_d2.studies.identity import data_identity

RECORDS = [
    {"file_name": f"/data/{i}.jpg", "image_id": i, "annotations": [{"category_id": i % 7}]}
    for i in range(120)
]


@given(st.integers(0, 9), st.integers(1, 120), st.integers(1, 120), st.permutations(range(120)))
def test_draws_are_nested_seeded_and_depend_on_neither_order_nor_folder(seed, a, b, order):
    few, many = (drawn(RECORDS, n, seed) for n in sorted((a, b)))
    assert len(many) == max(a, b)
    assert all(record in many for record in few)
    moved = [RECORDS[i] | {"file_name": f"/moved/{i}.jpg"} for i in order]
    assert {r["image_id"] for r in drawn(moved, a, seed)} == {
        r["image_id"] for r in drawn(RECORDS, a, seed)
    }


def test_seeds_draw_others_and_what_is_not_drawn_is_told():
    assert drawn(RECORDS, 12, 0) != drawn(RECORDS, 12, 1)
    assert "12 of 120 labelled images with 12 objects" in describe_draw(
        RECORDS, drawn(RECORDS, 12, 0)
    )
    assert "no example of 6 class" in describe_draw(RECORDS, RECORDS[:1])
    loader = f"{__name__}.all_records"
    assert few_labels(loader, 5, 3, name="x") == drawn(RECORDS, 5, 3)


def all_records(name: str) -> list[dict]:
    return RECORDS


def test_shares_and_numbers():
    assert shares("0.05,12,1.0") == [0.05, 12, 1.0]
    assert [count_of(s, 120) for s in (0.05, 12, 1.0, 0.001)] == [6, 12, 120, 1]
    for text in ("1", "0", "1.5", "-0.1", "many", "", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            shares(text)
    with pytest.raises(InputError, match="130"):
        count_of(130, 120)


def test_data_are_known_by_content_and_not_by_path(tmp_path):
    def made(name: str, boxes: int, size: int = 9) -> dict[str, str]:
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / "a.jpg").write_bytes(b"x" * size)
        (folder / "a.json").write_text(json.dumps({"boxes": boxes}))
        register_coco_format(f"test_{name}", str(folder / "a.json"), str(folder / "images"))
        return data_identity(f"test_{name}")

    first = made("first", 1)
    assert made("copy", 1) == first
    assert data_identity(f"{tmp_path}/copy/a.json:{tmp_path}/copy/images") == first
    assert made("first", 2) != first  # the same path, edited
    assert made("first", 1, size=8) != first
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    before = data_identity(str(tmp_path / "classes"))
    (tmp_path / "classes" / "cat" / "1.jpg").write_bytes(b"1")
    assert data_identity(str(tmp_path / "classes")) != before
