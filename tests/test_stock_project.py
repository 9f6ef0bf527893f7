"""A Detectron2 project of its own, in a process of its own, that only adds `import flsl_d2`.

Its config is the model zoo's Mask R-CNN with the backbone's name changed; its trainer and
checkpointer are Detectron2's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from flsl_d2.modeling import FLSLViT

ENCODER = {"embed_dim": 48, "depth": 2, "num_heads": 3}

PROJECT = """
import json, sys
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer

import flsl_d2

weights, root, output = sys.argv[1:]
register_coco_instances("few", {}, f"{root}/few.json", f"{root}/images")

cfg = get_cfg()
flsl_d2.add_flsl_config(cfg)
cfg.merge_from_file(
    model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
)
cfg.MODEL.BACKBONE.NAME = "build_flsl_vit_sfp_backbone"
cfg.MODEL.WEIGHTS = weights

cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.FLSL_VIT.merge_from_list(["EMBED_DIM", 48, "DEPTH", 2, "NUM_HEADS", 3])
cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
cfg.INPUT.MIN_SIZE_TRAIN = (128,)
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("few",), ()
cfg.DATALOADER.NUM_WORKERS = 0
cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 1
cfg.OUTPUT_DIR = output

trainer = DefaultTrainer(cfg)
trainer.resume_or_load(resume=False)
net = trainer.model.backbone.net
file = torch.load(weights, weights_only=True)["model"]
assert net.state_dict().keys() == file.keys()
assert all(torch.equal(tensor, file[name]) for name, tensor in net.state_dict().items())
trainer.train()
assert not torch.equal(net.blocks[0].attn.qkv.weight, file["blocks.0.attn.qkv.weight"])
assert torch.equal(net.pos_embed, file["pos_embed"])
print("TRAINED")
"""


@pytest.fixture(scope="module")
def few(datasets_root, tmp_path_factory):
    source = datasets_root / "pennfudan"
    if not source.is_dir():
        pytest.skip("DETECTRON2_DATASETS has no pennfudan")
    root = tmp_path_factory.mktemp("few")
    (root / "images").symlink_to(source / "images")
    content = json.loads((source / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (root / "few.json").write_text(json.dumps(content))
    return root


def run(few, tmp_path, **encoder) -> subprocess.CompletedProcess:
    torch.manual_seed(0)
    teacher = FLSLViT(**encoder)
    weights = tmp_path / "teacher_backbone.pth"
    content = {"model": teacher.state_dict(), "encoder": teacher.architecture}
    torch.save({**content, "format": "flsl_d2 encoder", "matching_heuristics": True}, weights)
    script = tmp_path / "train_net.py"
    script.write_text(PROJECT)
    return subprocess.run(
        [sys.executable, str(script), str(weights), str(few), str(tmp_path / "output")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_stock_project_trains_from_the_encoder_and_says_how_much_it_loaded(few, tmp_path):
    done = run(few, tmp_path, **ENCODER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRAINED" in done.stdout
    count = len(FLSLViT(**ENCODER).state_dict())
    assert f"encoder weights: {count} of {count} matched" in done.stdout


def test_a_stock_project_stops_at_an_encoder_of_another_width(few, tmp_path):
    done = run(few, tmp_path, **{**ENCODER, "embed_dim": 96})
    assert done.returncode != 0
    assert "have no tensor that fits the encoder" in done.stderr
    assert "TRAINED" not in done.stdout
