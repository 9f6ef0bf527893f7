"""From annotations to a detector with one command, on drawn scenes and in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flsl_d2.data.scenes import make_scenes
from flsl_d2.detection.finetune import main
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights.export import write_encoder

ENCODER = {"img_size": 80, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    make_scenes(root, num_train=6, num_val=2, image_size=(96, 80))
    torch.manual_seed(0)
    write_encoder(FLSLViT(**ENCODER), root / "encoder.pth")
    return root


def arguments(scenes: Path, output: Path, *others: str) -> list[str]:
    return [
        *("--annotations", str(scenes / "annotations" / "instances_train.json")),
        *("--images", str(scenes / "train"), "--weights", str(scenes / "encoder.pth")),
        *("--output", str(output), "--device", "cpu", "--short-side", "64", "--max-iter", "2"),
        *others,
    ]


def test_a_run_leaves_detector_report_and_config(scenes, tmp_path, run_main):
    output = tmp_path / "out"
    status, out, err = run_main(main, *arguments(scenes, output))
    assert status == 0, err
    print(out)
