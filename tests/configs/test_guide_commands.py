"""Every command of the guides runs, on a workshop of tiny files under the guides' names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from forked import ROOT, run_forked

from flsl_d2.detection.model_folder import write_description
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.images.shards import make_shards
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.weights import write_encoder

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENCODER = {"img_size": 224, "embed_dim": 48, "depth": 1, "num_heads": 3}
# Commands that are not run here, by a part of them, and why.
ELSEWHERE = {
    "$": "needs a shell's variables: a cluster, or the script around it",
    "tools/benchmark.py": "tests/test_benchmark.py runs all of them",
    "tools/compare.py": "tests/test_compare.py runs the comparison",
    "tools/sweep.py": "tests/test_sweep.py runs the sweep",
    "tools/convert_uavdt.py": "needs the data set; tests/annotations/test_uavdt.py makes one",
    "tools/install_detectron2.py": "changes the environment; tests/test_install.py tries it",
    "--weights FILE": "needs a benchmark; tests/evaluation/test_protocols.py has its measures",
    "configs/uavdt": "needs the data set; tests/configs/test_every_config.py trains the recipe",
    "configs/pretrain/dino": "tests/pretrain/test_methods.py trains every recipe",
    "previous_stage": "tests/pretrain/test_previous_stage.py trains in stages",
}
PRETRAIN = """
    train.device=cpu train.max_iter=1 train.pictures_period=0 dataloader.total_batch_size=2
    dataloader.num_workers=0 model.backbone.depth=1 model.backbone.embed_dim=48
    model.backbone.num_heads=3 views.global_size=32 views.local_size=16 views.global_window=1
    views.local_window=1 model.head.hidden_dim=16 model.head.bottleneck_dim=8 --num-gpus 1
""".split()
DETECTION = """
    model.proposal_generator.post_nms_topk=[20,10] model.roi_heads.batch_size_per_image=8
    model.roi_heads.box_head.conv_dims=[16] model.roi_heads.mask_head.conv_dims=[16]
    train.device=cpu train.max_iter=1 dataloader.train.mapper.augmentations.0.short_edge_length=[64]
    dataloader.test.mapper.augmentations.0.short_edge_length=64
    dataloader.train.total_batch_size=1 dataloader.train.num_workers=0 dataloader.test.num_workers=0
""".split()
DETECTION += [f"model.backbone.net.{key}={value}" for key, value in ENCODER.items()]
OWN_DATA = [
    f"dataloader.{part}.dataset.{key}"
    for part, file in (("train", "train"), ("test", "val"))
    for key in (f"json_file=parts/{file}.json", "image_root=parts/images")
]
# What makes a command of each tool small.
REDUCED = {
    "eval_davis": "--short-side 64 --device cpu".split(),
    "eval_features": "--measures knn_segmentation --short-side 64 --device cpu".split(),
    "export_model": [],
    "finetune": "--max-iter 1 --short-side 64 --task boxes --device cpu".split(),
    "make_shards": [],
    "predict": ["--device", "cpu"],
    "pretrain_net": PRETRAIN,
    "train_net": [*DETECTION, "--num-gpus", "1"],
    "visualize": "--short-side 64 --max-images 1 --device cpu".split(),
}
# Tools whose first command alone is part of the default run, because each takes seconds.
ONCE = ("pretrain_net", "train_net", "predict", "export_model")
SLOW = ("eval_davis", "finetune", "train_net")


def _commands() -> dict[str, list[str]]:
    """Words of the commands of all guides after ``python``, by guide and command."""
    found: dict[str, list[str]] = {}
    for guide in GUIDES:
        fenced = re.findall(r"^```\w*\n(.*?)^```", guide.read_text(), re.M | re.S)
        for line in "\n".join(fenced).replace("\\\n", " ").splitlines():
            text = " ".join(line.partition(" #")[0].split())
            if re.search(r"(^|python )(tools/\w+\.py|-m flsl_d2)", text):
                found.setdefault(text, []).append(guide.name)
    return found


COMMANDS = list(_commands())
RUN = [text for text in COMMANDS if not any(part in text for part in ELSEWHERE)]


def _tool(text: str) -> str:
    return re.search(r"tools/(\w+)\.py", text)[1]


def _parameters() -> Iterator:
    seen: set[str] = set()
    for number, text in enumerate(RUN):
        tool = _tool(text)
        slow = tool in SLOW or (tool in ONCE and tool in seen)
        yield pytest.param(text, marks=[pytest.mark.slow] if slow else [], id=f"{tool}_{number}")
        seen.add(tool)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """Files under the names that the guides use."""
    root = tmp_path_factory.mktemp("guides")
    (root / "configs").symlink_to(ROOT / "configs")
    make_scenes(root / "scenes", num_train=8, num_val=2, image_size=(96, 80))
    parts = root / "parts"
    parts.mkdir()
    shutil.copytree(root / "scenes" / "train", parts / "images")
    for file in (root / "scenes" / "val").iterdir():
        shutil.copy(file, parts / "images" / f"val_{file.name}")
    for name, prefix in (("train", ""), ("val", "val_")):
        content = json.loads((root / f"scenes/annotations/instances_{name}.json").read_text())
        for image in content["images"]:
            image["file_name"] = prefix + image["file_name"]
        (parts / f"{name}.json").write_text(json.dumps(content))
    shutil.copy(parts / "train.json", parts / "all.json")
    for copy in ("photos", "FOLDER", "imagenet/train", "datasets/imagenet/train"):
        (root / copy).mkdir(parents=True)
        for file in sorted((root / "scenes" / "train").iterdir())[:2]:
            shutil.copy(file, root / copy)
    make_shards(str(root / "imagenet" / "train"), root / "shards")
    (root / "webdataset").mkdir()
    with tarfile.open(root / "webdataset" / "0.tar", "w") as shard:
        for file in (root / "photos").iterdir():
            shard.add(file, file.name)
    (root / "datasets" / "coco" / "annotations").mkdir(parents=True)
    categories = [{k: c[k] for k in ("id", "name")} for c in COCO_CATEGORIES if c["isthing"]]
    for name in ("train", "val"):
        shutil.copytree(parts / "images", root / "datasets" / "coco" / f"{name}2017")
        content = json.loads((parts / f"{name}.json").read_text())
        (root / f"datasets/coco/annotations/instances_{name}2017.json").write_text(
            json.dumps({**content, "categories": categories})
        )
    _write_davis(root / "datasets" / "DAVIS")
    _write_weights(root)
    frames = cv2.VideoWriter(str(root / "street.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 2, (96, 80))
    frames.write(np.zeros((80, 96, 3), np.uint8))
    frames.release()
    return root


def _write_davis(root: Path) -> None:
    frames, masks = (root / kind / "480p" / "square" for kind in ("JPEGImages", "Annotations"))
    for folder in (frames, masks, root / "ImageSets" / "2017"):
        folder.mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("square\n")
    for number in range(2):
        image, mask = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
        image[20:40, 20 + 8 * number : 50 + 8 * number] = 200
        mask[20:40, 20 + 8 * number : 50 + 8 * number] = 1
        cv2.imwrite(str(frames / f"{number:05d}.jpg"), image)
        cv2.imwrite(str(masks / f"{number:05d}.png"), mask)


def _write_weights(root: Path) -> None:
    torch.manual_seed(0)
    folders = [root / "output" / name for name in ("pretrain", "flsl_vit_small_p16_in1k")]
    for folder in folders:
        folder.mkdir(parents=True)
    for folder in (*folders, root):
        write_encoder(FLSLViT(**ENCODER), folder / "teacher_backbone.pth")
    shutil.copy(folders[0] / "teacher_backbone.pth", folders[0] / "model_final.pth")
    dino = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    torch.save(dino.state_dict(), root / "dino_deitsmall16_pretrain.pth")
    detector = root / "output" / "mask_rcnn_flsl_vit_s16_1x"
    detector.mkdir()
    cfg = load_lazy_config("coco/mask_rcnn_flsl_vit_s16_1x.py", DETECTION)
    torch.save({"model": instantiate(cfg.model).state_dict()}, detector / "model_final.pth")
    LazyConfig.save(cfg, str(detector / "config.yaml"))
    write_description(cfg, detector)


@pytest.mark.parametrize("text", [*_parameters()])
def test_a_command_of_the_guides_runs(text, workshop, tmp_path):
    tool = _tool(text)
    arguments = shlex.split(text.partition(f"tools/{tool}.py")[2])
    more = list(REDUCED[tool])
    if tool in ("pretrain_net", "train_net"):
        more.append(f"train.output_dir={tmp_path / 'out'}")
    if tool == "train_net":
        more += [each for each in OWN_DATA if each.partition("=")[0] not in text]
    done = run_forked(
        [sys.executable, ROOT / "tools" / f"{tool}.py", *arguments, *more],
        cwd=workshop,
        env={"DETECTRON2_DATASETS": str(workshop / "datasets"), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_reason_is_needed():
    assert len(RUN) >= 15
    for part in ELSEWHERE:
        assert any(part in text for text in COMMANDS), part
