"""tools/pretrain_net.py as a command: learning, resuming, several processes, bad input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import soak
import torch
from forked import assert_refused, run_elastic, run_tool

from flsl_d2.engine import command_line
from pretrain.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/pretrain/flsl_vit_small_p16_in1k.py"
TINY = """
    train.device=cpu train.log_period=2 dataloader.num_workers=0 dataloader.total_batch_size=4
    views.global_size=64 views.local_size=32 model.backbone.embed_dim=48 model.backbone.depth=2
    model.backbone.num_heads=3 model.head.num_centroids=32 model.head.hidden_dim=64
    model.head.bottleneck_dim=16
""".split()


def command(*overrides: str, options: tuple[str, ...] = ()):
    return run_tool("pretrain_net", "--config-file", CONFIG, *options, *overrides)


def run(output: Path, images: Path, *overrides: str, **options) -> str:
    result = command(
        *TINY, f"dataset.root={images}", f"train.output_dir={output}", *overrides, **options
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    soak.make_images(folder := tmp_path_factory.mktemp("images"))
    return folder


def weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "teacher_backbone.pth", weights_only=True)["model"]


def test_a_run_leaves_what_the_documentation_names(images, tmp_path):
    text = run(tmp_path, images, "train.max_iter=6")
    for expected in ("eta 0:00", "data wait", *"loss inter tau_t grad centroids img/s".split()):
        assert expected in text, text
    rows = metrics(tmp_path)
    assert [row["iteration"] for row in rows] == [1, 3, 5]
    wanted = """
        loss loss_intra loss_inter loss_volume lr teacher_temp grad_norm images_per_second data_time
        centroids_in_use assignment_entropy feature_std
    """
    assert {*wanted.split()} <= rows[-1].keys()
    assert list(tmp_path.glob("events.out.tfevents*"))
    assert weights(tmp_path)["pos_embed"].shape == (1, 16, 48)


def test_resumed_run_ends_as_the_whole_one(images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ("train.checkpoint_period=3", "model.backbone.drop_path_rate=0.5")
    run(whole, images, "train.max_iter=6", *common)
    shutil.copytree(whole, parts)
    (parts / "last_checkpoint").write_text("model_0000002.pth")  # as if it ended after 3 steps
    for name in ("metrics.json", "teacher_backbone.pth", "model_final.pth", "model_0000005.pth"):
        (parts / name).unlink(missing_ok=True)
    text = run(parts, images, "train.max_iter=6", *common, options=("--resume",))
    assert "Resumed after step 3" in text
    assert metrics(parts)[-1]["loss"] == metrics(whole)[-1]["loss"]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(parts)[name]), name


def test_a_second_stage_starts_from_the_first_ones_teacher(images, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, images, "train.max_iter=2")
    staged = (
        f"model.previous_stage.weights={first / 'teacher_backbone.pth'}",
        "schedules.mixture_bias=0.5",
    )
    run(second, images, "train.max_iter=4", "train.checkpoint_period=2", *staged)
    own = [row["own_attention"] for row in metrics(second)]
    assert own[0] < own[1] < 0.5
    # Its first step starts from the same weights and views; only what it aims at differs.
    assert metrics(second)[0]["loss_inter"] != metrics(first)[0]["loss_inter"]
    refused = command(
        *TINY, f"dataset.root={images}", "model.backbone.patch_size=8", *staged,
        f"train.output_dir={tmp_path / 'other'}",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "patches of 16 pixels and this one of 8" in refused.stderr


def pretrain_as_rank(*arguments: str) -> None:
    command_line.leave = sys.exit  # the agent waits for the function to return
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0


def test_two_processes_do_what_one_does(images, tmp_path, monkeypatch, forked_workers):
    common = ("train.max_iter=3", "model.backbone.drop_path_rate=0", "train.log_period=1")
    run(tmp_path / "one", images, *common)
    run(tmp_path / "launch", images, *common, options=("--num-gpus", "2"))
    settings = [*TINY, f"dataset.root={images}", f"train.output_dir={tmp_path / 'torchrun'}"]
    monkeypatch.chdir(ROOT)
    run_elastic(pretrain_as_rank, "--config-file", CONFIG, *settings, *common)
    for two in (tmp_path / "launch", tmp_path / "torchrun"):
        for a, b in zip(metrics(tmp_path / "one"), metrics(two), strict=True):
            for name in ("loss", "loss_volume", "grad_norm", "centroids_in_use"):
                # Each process sums its own images first, in float32, through three steps of AdamW.
                assert a[name] == pytest.approx(b[name], rel=1e-3), (two.name, name)
        for name, tensor in weights(tmp_path / "one").items():
            # The weights follow from those sums.
            torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-3, atol=1e-4)


def test_learns_on_real_images(datasets_root, tmp_path):
    """The loss falls below its start, and centroids stay in use."""
    settings = """
        train.max_iter=60 train.log_period=10 dataloader.total_batch_size=16 schedules.base_lr=8e-3
        schedules.frozen_last_layer_epochs=0 schedules.teacher_momentum=[0.98,1.0]
        model.backbone.drop_path_rate=0
    """
    run(tmp_path, datasets_root / "imagenet_mini" / "train", *settings.split())
    rows = metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["centroids_in_use"] >= 8
    assert rows[-1]["feature_std"] > 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.root=/nowhere", "'/nowhere'"),
        ("dataset.root={empty}", "holds no image"),
        ("dataset.name=coco_2017_trian", "coco_2017_trian"),
        ("dataset.name=coco_2017_train", "coco"),
        ("model.backbone.embed_dmi=48", "model.backbone.embed_dmi"),
        ("views.global_size=225", "global_size is 225"),
        ("train.precision=fp8", "'fp8'"),
        ("train.output_dir=/proc/no", "/proc/no"),
        ("train.device=cuda", "cuda"),
        ("model.previous_stage.weights=/nowhere.pth", "/nowhere.pth"),
        ("schedules.mixture_bias=2", "mixture_bias is 2"),
    ],
)
def test_bad_input_is_one_sentence(override, message, images, tmp_path, monkeypatch):
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "no_datasets"))
    base = [*TINY, f"dataset.root={images}", f"train.output_dir={tmp_path / 'out'}"]
    result = command(*base, override.format(empty=tmp_path / "empty"))
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert_refused(result.returncode, f"{line}\n", message)
    assert "Traceback" not in result.stderr


def test_help_explains():
    result = run_tool("pretrain_net", "--help")
    assert result.returncode == 0
    for word in ("dataset.root", "teacher_backbone.pth", "--resume", "train.device=cpu"):
        assert word in result.stdout
