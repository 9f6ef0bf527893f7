"""Draws of labelled images, and data sets known by their content."""

from __future__ import annotations

import argparse
import json

import pytest
from detectron2.config import instantiate
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.annotations import register_scenes
from flsl_d2.annotations.datasets import register_coco_format
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.studies.evaluations import (
    DetectionEvaluation,
    DetectionTask,
    EncoderFile,
    FeatureEvaluation,
)
from flsl_d2.studies.few_labels import count_of, describe_draw, drawn, few_labels, shares
from flsl_d2.studies.identity import data_identity
from flsl_d2.weights import write_encoder

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

    def job_key() -> str:
        evaluation = FeatureEvaluation("knn_segmentation", "test_first", "test_first")
        return evaluation.job(EncoderFile("a", "a.pth", {"sha256": "0"})).key

    first = made("first", 1)
    key = job_key()
    assert made("copy", 1) == first
    assert data_identity(f"{tmp_path}/copy/a.json:{tmp_path}/copy/images") == first
    assert job_key() == key
    assert made("first", 2) != first  # the same path, edited
    assert job_key() != key
    assert made("first", 1, size=8) != first
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    before = data_identity(str(tmp_path / "classes"))
    (tmp_path / "classes" / "cat" / "1.jpg").write_bytes(b"1")
    assert data_identity(str(tmp_path / "classes")) != before


def test_a_detector_sees_the_draw_alone(tmp_path):
    make_scenes(tmp_path / "flsl_scenes", 8, 2, (96, 96), seed=0)
    register_scenes(tmp_path / "flsl_scenes")
    weights = tmp_path / "encoder.pth"
    write_encoder(FLSLViT(img_size=32, embed_dim=16, depth=1, num_heads=1), weights)
    config = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
    task = DetectionTask(config)
    evaluation = DetectionEvaluation(task, share=3)
    evaluation.check()
    assert evaluation.name == "detection 3 images"
    text = evaluation.write_draw(tmp_path / "subsets", 5)
    assert "3 of 8 labelled images" in text
    (listed,) = (tmp_path / "subsets").iterdir()
    job = evaluation.job(EncoderFile("a", str(weights), {"sha256": "0"}, seed=5))
    overrides = [text for text in job.command(tmp_path / "out", 1) if "=" in text]
    records = instantiate(load_lazy_config(config, overrides).dataloader.train.dataset)
    assert sorted(r["file_name"] for r in records) == listed.read_text().splitlines()
    others = [DetectionEvaluation(task, share=share) for share in (None, 4, 0.5)]
    keys = {e.job(EncoderFile("a", str(weights), {"sha256": "0"}, seed=5)).key for e in others}
    assert len({*keys, job.key}) == 3  # half of eight are four
