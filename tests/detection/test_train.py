"""Training runs in this process on a few drawn scenes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from omegaconf import DictConfig

from flsl_d2.annotations import register_coco_format
from flsl_d2.detection import train
from flsl_d2.detection.solver import build_yaml_optimizer
from flsl_d2.detection.train import _ddp_options, run_lazy_detection, run_yaml_detection
from flsl_d2.detection.yaml_training import load_yaml_config
from flsl_d2.engine.config_files import load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.scenes import make_scenes
from flsl_d2.studies.evaluations import DetectionEvaluation, DetectionTask, EncoderFile
from flsl_d2.weights import write_encoder

RECIPE = "demo/mask_rcnn_flsl_vit_scenes.py"
YAML = "coco/mask_rcnn_flsl_vit_s16_1x.yaml"
ENCODER = {"img_size": 80, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Scenes under two names; in the training annotations of "empty" no image has an object."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    make_scenes(root, num_train=3, num_val=2, image_size=(96, 80))
    for split in ("train", "val"):
        annotations = root / "annotations" / f"instances_{split}.json"
        register_coco_format(f"runs_{split}", annotations, root / split, replace=True)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == first]
    (root / "mostly_empty.json").write_text(json.dumps(content))
    register_coco_format(
        "runs_mostly_empty", root / "mostly_empty.json", root / "train", replace=True
    )
    return root


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "teacher_backbone.pth"
    write_encoder(FLSLViT(**ENCODER), path)
    return str(path)


def config(output: Path, *overrides: str) -> DictConfig:
    return load_lazy_config(
        RECIPE,
        [
            *(f"model.backbone.net.{key}={value}" for key, value in ENCODER.items()),
            "model.roi_heads.batch_size_per_image=8",
            "model.proposal_generator.pre_nms_topk=[50,20]",
            "model.proposal_generator.post_nms_topk=[20,10]",
            "dataloader.train.dataset.names=runs_train",
            "dataloader.test.dataset.names=runs_val",
            "dataloader.train.total_batch_size=2",
            "train.max_iter=2",
            f"train.output_dir={output}",
            *overrides,
        ],
    )


def yaml_config(output: Path, *overrides: str) -> CfgNode:
    settings = {f"MODEL.FLSL_VIT.{key.upper()}": value for key, value in ENCODER.items()} | {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": 6,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "INPUT.MIN_SIZE_TRAIN": (80,),
        "INPUT.MIN_SIZE_TEST": 80,
        "DATASETS.TRAIN": ("runs_train",),
        "DATASETS.TEST": ("runs_val",),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 2,
        "SEED": 1,
        "OUTPUT_DIR": output,
    }
    return load_yaml_config(
        YAML, [*(str(x) for pair in settings.items() for x in pair), *overrides]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def metrics(folder: Path) -> set[str]:
    lines = (folder / "metrics.json").read_text().splitlines()
    return set().union(*map(json.loads, lines))


@pytest.mark.parametrize("kind", ["py", "yaml"])
def test_a_frozen_encoder_keeps_its_weights(kind, scenes, encoder_file, tmp_path):
    before = torch.load(encoder_file, weights_only=True)["model"]
    if kind == "py":
        on = ("model.backbone.net.frozen=true", "model.backbone.net.drop_path_rate=0.5")
        cfg = config(tmp_path / "a", f"train.init_checkpoint={encoder_file}", *on)
        run_lazy_detection(cfg, resume=False, eval_only=False)
    else:
        on = ("MODEL.FLSL_VIT.FROZEN", "True", "MODEL.FLSL_VIT.DROP_PATH_RATE", "0.5")
        cfg = yaml_config(tmp_path / "a", "MODEL.WEIGHTS", encoder_file, *on)
        run_yaml_detection(cfg, resume=False, eval_only=False)
    after = weights(tmp_path / "a")
    assert all(torch.equal(after[f"backbone.net.{name}"], before[name]) for name in before)
    state = torch.load(tmp_path / "a" / "model_final.pth", weights_only=True)["trainer"]
    trained = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert trained == len([n for n in after if not n.startswith(("backbone.net.", "pixel_"))])
    assert "bbox/AP" in metrics(tmp_path / "a")


def test_each_of_several_test_sets_is_evaluated(scenes, tmp_path):
    cfg = config(tmp_path, "dataloader.test.dataset.names=[runs_val,runs_train]")
    run_lazy_detection(cfg, resume=False, eval_only=False)
    assert {"runs_val/bbox/AP", "runs_train/segm/AP"} <= metrics(tmp_path)
    for name in ("runs_val", "runs_train"):
        assert (tmp_path / "inference" / name / "coco_instances_results.json").is_file()
    cfg = config(tmp_path, "dataloader.test.dataset.names=[runs_val]")
    cfg.train.init_checkpoint = str(tmp_path / "model_final.pth")
    assert set(run_lazy_detection(cfg, resume=False, eval_only=True)) == {"bbox", "segm"}


def test_a_test_set_that_cannot_be_evaluated_is_found_before_training(scenes, tmp_path):
    cfg = config(tmp_path, "+dataloader.evaluator.tasks=[keypoint_boxes]")
    cfg.dataloader.evaluator._target_ = "detectron2.evaluation.PascalVOCDetectionEvaluator"
    with pytest.raises(InputError, match="test set 'runs_val' cannot be evaluated"):
        run_lazy_detection(cfg, resume=False, eval_only=False)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_images_without_objects_train_as_background(scenes, tmp_path, recompute):
    cfg = config(
        tmp_path,
        "dataloader.train.dataset.names=runs_mostly_empty",
        "dataloader.train.dataset.filter_empty=false",
        f"dataloader.train.mapper.recompute_boxes={recompute}",
        "dataloader.train.total_batch_size=3",
        "train.max_iter=1",
    )
    run_lazy_detection(cfg, resume=False, eval_only=False)
    assert "bbox/AP" in metrics(tmp_path)


def test_a_picture_that_breaks_off_is_one_sentence(scenes, tmp_path):
    content = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    for image in content["images"]:
        data = (scenes / "train" / image["file_name"]).read_bytes()
        (tmp_path / image["file_name"]).write_bytes(data[: len(data) // 2])
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_coco_format("runs_broken", tmp_path / "a.json", tmp_path, replace=True)
    cfg = config(
        tmp_path / "out",
        "dataloader.train.dataset.names=runs_broken",
        "dataloader.train.num_workers=1",
    )
    with pytest.raises(InputError, match=content["images"][0]["file_name"][:4]) as error:
        run_lazy_detection(cfg, resume=False, eval_only=False)
    assert "\n" not in str(error.value)


def test_a_test_set_is_tried(scenes, tmp_path):
    run = train._lazy_detection(config(tmp_path), eval_only=False)
    loader, _ = run.build_test_set("runs_val")
    run.build_test_set = lambda _: (loader, object())
    with pytest.raises(InputError, match=r"test set 'a' cannot be evaluated \(AttributeError: "):
        train._try_test_set(run, "a")


@pytest.mark.parametrize("size", [0, -2])
def test_a_batch_holds_images(size, scenes, tmp_path):
    cfg = config(tmp_path, f"dataloader.train.total_batch_size={size}")
    with pytest.raises(InputError, match=f"total_batch_size is {size}"):
        run_lazy_detection(cfg, resume=False, eval_only=False)


def test_a_model_is_described_in_one_line(caplog):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(999, 1000), "b": torch.nn.Linear(1, 1)})
    model["a"].requires_grad_(False)
    with caplog.at_level("INFO"):
        train._describe(model)
    assert "1.0M parameters, 0.0M trained (a 1.0M, b 0.0M)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_gradients_are_sent_in_float16_only_with_the_scaler(dtype, tmp_path):
    options = _ddp_options(config(tmp_path), dtype)
    assert options == {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": dtype == torch.float16,
    }


@pytest.mark.parametrize("clipped", [False, True])
def test_adamw_is_fused_where_nothing_clips_before_it(clipped):
    cfg = load_yaml_config(YAML, ["SOLVER.OPTIMIZER", "ADAMW"])
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clipped
    optimizer = build_yaml_optimizer(cfg, torch.nn.Linear(2, 2))
    assert optimizer.defaults["fused"] == (not clipped)


@pytest.mark.parametrize(("wanted", "expected"), [(False, []), (True, [torch.bfloat16])])
def test_evaluation_in_mixed_precision_is_a_switch(wanted, expected, tmp_path, monkeypatch):
    used = []

    def autocast(device, dtype):
        used.append(dtype)
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(train, "inference_on_dataset", lambda *_: {"bbox": {"AP": 1.0}})
    amp = ("train.amp.enabled=true", "train.amp.dtype=bfloat16")
    cfg = config(tmp_path, f"train.amp.evaluation={wanted}", *amp)
    run = train._lazy_detection(cfg, eval_only=True)
    run.build_test_set = lambda _: (None, None)
    assert train._evaluate(run, None) == {"bbox": {"AP": 1.0}}
    assert used == expected


def test_a_comparison_measures_frozen_encoders_on_several_test_sets(encoder_file, tmp_path):
    encoder = EncoderFile("a", encoder_file, {"sha256": "a"})
    fine_tuned, frozen = (
        DetectionEvaluation(DetectionTask(RECIPE, overrides)).job(encoder)
        for overrides in ((), ("model.backbone.net.frozen=true",))
    )
    assert fine_tuned.key != frozen.key
    assert "model.backbone.net.frozen=true" in frozen.command(tmp_path, 1)
    row = {"iteration": 9, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0, "b/bbox/AP-person": 3.0}
    (tmp_path / "metrics.json").write_text(json.dumps(row) + "\n")
    expected = {"detection/a/box AP": 1.0, "detection/b/box AP": 2.0}
    assert frozen.outcome(tmp_path).values == expected
