"""tools/train_net.py as a command on real images: through to AP, resumed, in two processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from forked import assert_refused, run_tool

from flsl_d2.detection.model_folder import read_description
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import write_encoder

REPOSITORY = Path(__file__).parents[1]
PY = "configs/coco/mask_rcnn_flsl_vit_s16_1x.py"
YAML = "configs/coco/mask_rcnn_flsl_vit_s16_1x.yaml"
ENCODER = {"embed_dim": 48, "depth": 2, "num_heads": 3}

TINY_PY = """
    model.backbone.net.embed_dim=48 model.backbone.net.depth=2 model.backbone.net.num_heads=3
    model.proposal_generator.post_nms_topk=[50,20] model.roi_heads.batch_size_per_image=16
    model.roi_heads.box_head.conv_dims=[32] model.roi_heads.mask_head.conv_dims=[32,32]
    model.roi_heads.num_classes=1
    dataloader.train.dataset.names=pennfudan_train dataloader.test.dataset.names=pennfudan_val
    dataloader.train.mapper.augmentations.0.short_edge_length=[128]
    dataloader.test.mapper.augmentations.0.short_edge_length=128
    dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 dataloader.test.num_workers=0
    train.device=cpu train.max_iter=2 train.log_period=1 train.seed=1
""".split()
TINY_YAML = """
    MODEL.DEVICE cpu MODEL.FLSL_VIT.EMBED_DIM 48 MODEL.FLSL_VIT.DEPTH 2 MODEL.FLSL_VIT.NUM_HEADS 3
    MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TEST 20
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_HEADS.NUM_CLASSES 80
    MODEL.ROI_BOX_HEAD.NUM_CONV 1 MODEL.ROI_BOX_HEAD.CONV_DIM 32
    MODEL.ROI_MASK_HEAD.NUM_CONV 1 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    INPUT.MIN_SIZE_TRAIN (128,) INPUT.MIN_SIZE_TEST 128 DATALOADER.NUM_WORKERS 0
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SEED 1
""".split()


@pytest.fixture(scope="module")
def datasets(few_images) -> Path:
    return few_images("pennfudan", "coco")


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "teacher_backbone.pth"
    write_encoder(FLSLViT(**ENCODER), path)
    return str(path)


def run(datasets: Path, *arguments: str) -> str:
    done = run_tool("train_net", *arguments, DETECTRON2_DATASETS=str(datasets))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" or "Error" not in done.stderr
    return done.stdout


def average_precisions(output: str) -> list[str]:
    return re.findall(r"(?:bbox|segm): (AP .*)$", output, re.MULTILINE)


def predictions(folder: Path) -> list[dict]:
    return json.loads((folder / "inference" / "coco_instances_results.json").read_text())


def test_lazy_config_to_ap_then_evaluated_by_two_then_resumed(
    datasets, encoder_file, tmp_path, forked_workers
):
    start = f"train.init_checkpoint={encoder_file}"
    output = f"train.output_dir={tmp_path}"
    trained = run(datasets, "--config-file", PY, *TINY_PY, start, output)
    tensors = len(FLSLViT(**ENCODER).state_dict())
    assert trained.count(f"encoder weights: {tensors} of {tensors} matched ({encoder_file})") == 1
    assert "Mixed precision is for GPUs" in trained
    assert "Sequential(" not in trained  # the printed model
    assert len(average_precisions(trained)) == 2
    lines = (tmp_path / "metrics.json").read_text().splitlines()
    assert {"total_loss", "lr", "bbox/AP", "segm/AP"} <= set().union(*map(json.loads, lines))
    assert list(tmp_path.glob("events.out.tfevents*"))
    (resize,) = read_description(tmp_path).dataloader.test.mapper.augmentations
    (saved,) = LazyConfig.load(str(tmp_path / "config.yaml")).dataloader.test.mapper.augmentations
    assert resize.short_edge_length == saved.short_edge_length == 128
    expected = predictions(tmp_path)
    assert expected

    other = tmp_path / "evaluated"
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    where = f"train.output_dir={other}"
    both = ["--eval-only", "--num-gpus", "2"]
    evaluated = run(datasets, *both, "--config-file", PY, *TINY_PY, weights, where)
    assert average_precisions(evaluated) == average_precisions(trained)
    assert sorted(predictions(other), key=by_image) == sorted(expected, key=by_image)

    longer = [*TINY_PY, start, output, "train.max_iter=4"]
    resumed = run(datasets, "--config-file", PY, "--resume", *longer)
    assert "Resuming after step 2." in resumed
    assert "Starting training from iteration 2" in resumed
    assert f"matched ({encoder_file})" not in resumed
    checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3


def test_yaml_config_on_coco_to_ap_then_evaluated(datasets, encoder_file, tmp_path, monkeypatch):
    settings = [*TINY_YAML, "OUTPUT_DIR", str(tmp_path), "TRAIN.TRACKERS", "['wandb','mlflow']"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained = run(datasets, "--config-file", YAML, *settings, "MODEL.WEIGHTS", encoder_file)
    # Both trackers have the values of the last step, as a LazyConfig run sends them.
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    (losses,) = (tmp_path / "mlruns").glob("*/*/metrics/total_loss")
    assert len(losses.read_text().splitlines()) == 1
    assert list((tmp_path / "mlruns").glob("*/*/params/MODEL.FLSL_VIT.DEPTH"))
    assert f"matched ({encoder_file})" in trained
    assert len(average_precisions(trained)) == 2
    expected = predictions(tmp_path)
    evaluated = run(datasets, "--config-file", YAML, "--eval-only", "--resume", *settings)
    assert average_precisions(evaluated) == average_precisions(trained)
    assert predictions(tmp_path) == expected


OWN_CONFIG = """
from detectron2.config import LazyConfig
from flsl_d2.annotations import register_coco_format

register_coco_format("own_people", {json!r}, {images!r})
_base = LazyConfig.load({base!r})
model, optimizer, lr_multiplier, train = (
    _base[key] for key in ("model", "optimizer", "lr_multiplier", "train")
)
dataloader = _base.dataloader
"""


@pytest.fixture
def boxes_only(datasets, tmp_path) -> list[str]:
    """Start of a command on a data set without masks, which its config registers."""
    people = datasets / "pennfudan"
    content = json.loads((people / "annotations" / "instances_train.json").read_text())
    content["images"] = content["images"][:3]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "people.json").write_text(json.dumps(content))
    config = tmp_path / "own.py"
    paths = {"json": f"{tmp_path}/people.json", "images": f"{people}/images"}
    config.write_text(OWN_CONFIG.format(**paths, base=str(REPOSITORY / PY)))
    names = [f"dataloader.{part}.dataset.names=own_people" for part in ("train", "test")]
    return ["--config-file", str(config), *TINY_PY, *names, f"train.output_dir={tmp_path}"]


def test_own_data_without_masks_in_two_processes_and_in_one(
    datasets, boxes_only, tmp_path, forked_workers
):
    """Three images, unequal shares of two processes, give the same detections and AP."""
    boxes_only += ["model.roi_heads.mask_in_features=null"]
    boxes_only += ["dataloader.train.mapper.use_instance_mask=false"]
    boxes_only += ["model.roi_heads.box_predictor.test_score_thresh=0.0"]
    trained = run(datasets, *boxes_only, "--num-gpus", "2")
    assert "2 process(es)" in trained
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 1
    (ap,) = average_precisions(trained)
    found = predictions(tmp_path)
    assert len(found) > 20
    weights = f"train.init_checkpoint={tmp_path}/model_final.pth"
    output = f"train.output_dir={tmp_path}/one"
    evaluated = run(datasets, *boxes_only, "--eval-only", weights, output)
    assert average_precisions(evaluated) == [ap]
    # Ids of images differ; within one, detections are ordered by their scores.
    assert sorted(predictions(tmp_path / "one"), key=by_image) == sorted(found, key=by_image)


def by_image(found: dict) -> int:
    return found["image_id"]


def test_bad_input_is_one_sentence_and_status_2(datasets, encoder_file, boxes_only, tmp_path):
    def py(*changes: str) -> list[str]:
        return ["--config-file", PY, *TINY_PY, f"train.output_dir={tmp_path}", *changes]

    def yaml(*changes: str) -> list[str]:
        return ["--config-file", YAML, *TINY_YAML, "OUTPUT_DIR", str(tmp_path), *changes]

    broken = tmp_path / "broken.pth"
    broken.write_bytes(Path(encoder_file).read_bytes()[:5000])
    wide = "model.backbone.net.embed_dim=96"
    weights = f"train.init_checkpoint={encoder_file}"
    unwritable = tmp_path / "file"
    unwritable.write_text("")
    cases = [
        (["--config-file", "configs/coco/mask_rcnn_flsl_vit_s16_2x.py"], "did you mean"),
        (["--config-file", "configs/pretrain/flsl_vit_small_p16_in1k.py"], "tools/pretrain_net.py"),
        (py("train.max_iters=5"), "train.max_iters (did you mean train.max_iter"),
        (py("model.backbone.net.drop_path=0.1", "optimzer.lr=1"), "optimzer.lr"),
        (py("+model.backbone.net.widht=4"), "widht"),
        (py("dataloader.train.dataset.names=pennfudan_trian"), "pennfudan_train"),
        (py("dataloader.test.dataset.names=nowhere"), "nowhere"),
        (py("model.roi_heads.num_classes=80"), "model.roi_heads.num_classes=1"),
        (py("model.backbone.net.patch_size=15"), "15"),
        (py("model.backbone.net.num_heads=5"), "num_heads"),
        (py(weights, wide), "embed_dim=48"),
        (py(weights, "model.backbone.net.num_heads=4"), "num_heads=3"),
        (py(f"train.init_checkpoint={tmp_path}/none.pth"), "do not exist"),
        (py(f"train.init_checkpoint={broken}"), "damaged"),
        (py("--eval-only"), "--eval-only has no weights"),
        (py("--eval-only", weights), "no detector"),
        (py(f"train.output_dir={unwritable}"), "cannot be written"),
        (boxes_only, "mask_in_features=null"),
        (py("dataloader.train.total_batch_size=0"), "total_batch_size"),
        (yaml("MODEL.WEIGHTS", encoder_file, "MODEL.FLSL_VIT.DEPTH", "3"), "depth=2"),
        (yaml("SOLVER.MAX_ITERS", "3"), "SOLVER.MAX_ITER"),
        (yaml("SOLVER.OPTIMIZER", "LION"), "LION"),
        (yaml("DATASETS.TRAIN", "('coco_2071_train',)"), "coco_2017_train"),
        (yaml("MODEL.ROI_HEADS.NUM_CLASSES", "1"), "80 categories"),
    ]
    if not torch.cuda.is_available():
        cases.append((py("train.device=cuda"), "train.device=cpu"))
    for arguments, part in cases:
        done = run_tool("train_net", *arguments, DETECTRON2_DATASETS=str(datasets))
        assert_refused(done.returncode, done.stderr, part, arguments)
    missing = tmp_path / "missing" / "pennfudan"
    (missing / "images").mkdir(parents=True)
    (missing / "annotations").symlink_to(datasets / "pennfudan" / "annotations")
    done = run_tool("train_net", *py(), DETECTRON2_DATASETS=str(missing.parent))
    assert done.returncode == 2
    assert "images are missing" in done.stderr
    assert "Traceback" not in done.stderr
