"""AP does not depend on how many processes evaluate."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from flsl_d2.annotations import register_scenes
from flsl_d2.detection.train import launch_detection
from flsl_d2.engine.command_line import parse_tool_arguments, tool_argument_parser
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.scenes import make_scenes

CONFIG = "configs/demo/mask_rcnn_flsl_vit_scenes.py"
# Every detection counts, so that an untrained detector finds something.
SETTINGS = [
    "model.backbone.net.embed_dim=32",
    "model.backbone.net.depth=1",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
]


@pytest.fixture
def scenes(tmp_path, monkeypatch, forked_workers) -> Path:
    """Three images: two processes get unequal shares."""
    make_scenes(tmp_path / "flsl_scenes", num_train=1, num_val=3, image_size=(96, 96))
    register_scenes(tmp_path / "flsl_scenes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # for the worker processes
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "flsl_scenes" / "annotations" / "instances_val.json"


def evaluate(output: Path, weights: Path, processes: int) -> list[dict]:
    own = [f"train.init_checkpoint={weights}", f"train.output_dir={output}"]
    options = ["--config-file", CONFIG, "--eval-only", "--num-gpus", str(processes)]
    parser = tool_argument_parser("", eval_only=True)
    args = parse_tool_arguments(parser, [*options, *SETTINGS, *own])
    # Forked, so that the run's loggers do not stay with the other tests.
    process = multiprocessing.get_context("fork").Process(target=launch_detection, args=(args,))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return json.loads((output / "inference" / "coco_instances_results.json").read_text())


def some_as_truth(annotations: Path, detections: list[dict]) -> Path:
    """Annotations that an untrained detector can find: every ninth of its own detections."""
    content = json.loads(annotations.read_text())
    content["annotations"] = [
        {key: found[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        | {"id": number, "iscrowd": 0, "area": found["bbox"][2] * found["bbox"][3]}
        for number, found in enumerate(detections[::9], start=1)
    ]
    path = annotations.with_name("some.json")
    path.write_text(json.dumps(content))
    return path


def average_precisions(annotations: Path, detections: list[dict], kind: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_one_and_two_processes_give_the_same_ap(scenes, tmp_path):
    torch.manual_seed(0)
    model = instantiate(load_lazy_config(CONFIG, SETTINGS).model)
    weights = tmp_path / "detector.pth"
    torch.save({"model": model.state_dict()}, weights)
    one, two = (evaluate(tmp_path / str(n), weights, n) for n in (1, 2))
    assert len(one) == len(two) > 100
    truth = some_as_truth(scenes, one)
    for kind in ("bbox", "segm"):
        aps = [average_precisions(truth, detections, kind) for detections in (one, two)]
        # The same detections in another order; AP is a mean of float64.
        np.testing.assert_allclose(aps[0], aps[1], rtol=0, atol=1e-6)
        assert 0.01 < aps[0][0] < 0.99
