"""A start from a trained encoder: its architecture, its features, and the warm-up of the head."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import build_encoder, write_encoder
from pretrain.__main__ import main
from pretrain.schedules import Schedules

RECIPE = "configs/pretrain/flsl_vit_mini_p8_small_data.py"
TINY = [
    *("train.max_iter=6", "train.log_period=1", "dataloader.total_batch_size=2"),
    *("views.global_size=32", "views.local_size=16", "model.head.num_centroids=8"),
    *("schedules.teacher_momentum=[0.5,0.5]", "schedules.warmup_fraction=0.0"),
]


def write_start(path: Path, **options) -> FLSLViT:
    """Write an encoder of another architecture than the recipe's, with a larger table."""
    torch.manual_seed(0)
    encoder = FLSLViT(
        **{
            **{"img_size": 56, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
            **{"num_prefix_tokens": 1, "layer_scale_init": 0.5, "position_antialias": True},
            **options,
        }
    )
    write_encoder(encoder, path)
    return encoder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{seed}.png"), pixels)
    return folder


@pytest.fixture
def run(tmp_path, images, run_main):
    def start(*options: str, recipe: str = RECIPE, output: str = "out") -> tuple[int, str]:
        arguments = [f"dataset.root={images}", f"train.output_dir={tmp_path / output}", *options]
        status, out, err = run_main(main, "--config-file", recipe, "--num-gpus", "1", *arguments)
        return status, out + err

    return start


def test_the_encoder_starts_as_in_the_file_and_is_trained_after_the_head(run, tmp_path):
    start = write_start(tmp_path / "start.pth")
    begin = f"train.init_checkpoint={tmp_path / 'start.pth'}"
    features = []
    for fraction, output in ((0.99, "frozen"), (0.5, "half")):
        frozen = f"schedules.frozen_encoder_fraction={fraction}"
        status, text = run(*TINY, begin, frozen, output=output)
        assert status == 0, text
        assert "features are known to suffer" not in text
        assert f"after {6 * fraction:.0f} steps of the head alone" in text
        encoder = build_encoder(str(tmp_path / output / "teacher_backbone.pth"))
        assert encoder.architecture == start.architecture
        features.append(encoder.forward_tokens(torch.ones(1, 3, 32, 32)))
    own = start.eval().forward_tokens(torch.ones(1, 3, 32, 32))
    # The average of equal weights is rounded.
    torch.testing.assert_close(features[0], own, rtol=1e-5, atol=1e-5)
    assert (features[1] - own).abs().max() > 1e-3
    # The file is read again, and the run goes on with what it had learnt.
    status, text = run("--resume", *TINY, begin, frozen, "train.max_iter=6", output="half")
    assert status == 0, text
    resumed = build_encoder(str(tmp_path / "half" / "teacher_backbone.pth"))
    torch.testing.assert_close(
        resumed.forward_tokens(torch.ones(1, 3, 32, 32)), features[1], rtol=0, atol=0
    )


def test_an_encoder_that_is_trained_at_once_is_warned_of(run, tmp_path):
    write_start(tmp_path / "start.pth")
    status, text = run(*TINY, f"train.init_checkpoint={tmp_path / 'start.pth'}", "train.max_iter=1")
    assert status == 0, text
    assert "set schedules.frozen_encoder_fraction=0.1" in text


def test_a_method_that_masks_tokens_leaves_the_class_token_out(run, tmp_path):
    write_start(tmp_path / "start.pth")
    tiny = ["train.max_iter=1", "train.device=cpu", "views.global_size=32", "train.log_period=1"]
    tiny += ["dataloader.total_batch_size=2", "dataset.name=", "model.decoder_heads=2"]
    tiny += ["model.decoder_dim=24", "model.decoder_depth=1", "schedules.base_lr=0.0"]
    begin = [f"train.init_checkpoint={tmp_path / 'start.pth'}", "schedules.final_lr=0.0"]
    status, text = run(*tiny, *begin, recipe="configs/pretrain/mae_vit_small_p16_in1k.py")
    assert status == 0, text
    encoder = build_encoder(str(tmp_path / "out" / "teacher_backbone.pth"))
    start = build_encoder(str(tmp_path / "start.pth"), num_prefix_tokens=0)
    assert encoder.architecture == start.architecture
    tokens = [each.forward_tokens(torch.ones(1, 3, 32, 32)) for each in (encoder, start)]
    torch.testing.assert_close(*tokens)


@pytest.mark.parametrize(
    ("architecture", "options", "sentence"),
    [
        ({"patch_size": 14}, [], "set it to 28, and views.local_size to a multiple"),
        ({"in_chans": 4}, [], "takes images of 4 channels"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run, tmp_path, architecture, options, sentence):
    write_start(tmp_path / "start.pth", **architecture)
    status, text = run(*TINY, f"train.init_checkpoint={tmp_path / 'start.pth'}", *options)
    assert status == 2
    assert sentence in text


def test_a_backbone_of_timm_names_its_weights_itself(run, tmp_path):
    recipe = "configs/pretrain/flsl_resnet50_in1k.py"
    status, text = run("train.init_checkpoint=a.pth", "train.device=cpu", recipe=recipe)
    assert status == 2
    assert "model.backbone is TimmBackbone, which names its weights itself" in text


@given(st.integers(1, 60), st.floats(0, 0.99), st.floats(0, 1))
def test_the_learning_rate_rises_again_when_the_encoder_begins_to_learn(total, frozen, warmup):
    schedules = Schedules(
        256, 1, total, base_lr=1.0, warmup_fraction=warmup, frozen_encoder_fraction=frozen
    )
    begin = schedules.frozen_encoder_iters
    values = [schedules(i) for i in range(total)]
    assert [v.encoder_frozen for v in values] == [i < begin for i in range(total)]
    assert all(0 < v.lr <= 1.0 for v in values)
    rising = min(schedules.warmup_iters, total - begin)
    for i in range(1, rising):
        assert values[begin + i].lr > values[begin + i - 1].lr
    for i in range(begin + max(rising, 1), total):
        assert values[i].lr <= values[i - 1].lr


def test_a_share_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"frozen_encoder_fraction is 1\.0"):
        Schedules(1, 1, 1, frozen_encoder_fraction=1.0)
