"""A Detectron2 project of its own, with Detectron2's trainer, that only adds `import flsl_d2`."""

from __future__ import annotations

import subprocess
import sys

from forked import run_forked

from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import write_encoder

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
register_coco_instances("few", {}, f"{root}/annotations/instances_train.json", f"{root}/images")

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


def run(few_images, tmp_path, **encoder) -> subprocess.CompletedProcess:
    weights, script = tmp_path / "teacher_backbone.pth", tmp_path / "train_net.py"
    write_encoder(FLSLViT(**encoder), weights)
    script.write_text(PROJECT)
    root = few_images("pennfudan") / "pennfudan"
    return run_forked([sys.executable, script, weights, root, tmp_path / "output"], cwd=tmp_path)


def test_a_stock_project_trains_from_the_encoder_and_says_how_much_it_loaded(few_images, tmp_path):
    done = run(few_images, tmp_path, **ENCODER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRAINED" in done.stdout
    count = len(FLSLViT(**ENCODER).state_dict())
    assert f"encoder weights: {count} of {count} matched" in done.stdout


def test_a_stock_project_stops_at_an_encoder_of_another_width(few_images, tmp_path):
    done = run(few_images, tmp_path, **{**ENCODER, "embed_dim": 96})
    assert done.returncode != 0
    assert "have no tensor that fits the encoder" in done.stderr
    assert "TRAINED" not in done.stdout
