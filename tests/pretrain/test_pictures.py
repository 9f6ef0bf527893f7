"""Pictures while training: drawn when due, shown in TensorBoard, and without effect on the run."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage, TensorboardXWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pretrain.hooks
from flsl_d2.modeling import FLSLViT
from pretrain.hooks import EncoderPictures


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(5):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (120, 90)))
    return sorted(str(file) for file in folder.iterdir())


def trainer(max_iter: int = 5) -> SimpleNamespace:
    backbone = FLSLViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    method = SimpleNamespace(exported_encoder=lambda: backbone)
    return SimpleNamespace(method=method, iter=0, max_iter=max_iter, storage=EventStorage(0))


def run(hook: EncoderPictures, one: SimpleNamespace) -> None:
    hook.trainer = one
    for step in range(one.max_iter):
        one.iter = one.storage.iter = step
        hook.after_step()


def test_drawn_every_period_and_at_the_end(files: list[str], tmp_path: Path) -> None:
    one = trainer(max_iter=3)
    run(EncoderPictures(files, tmp_path / "pictures", 2, short_side=32, num_images=1), one)
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == [
        "iter_0000001.png",
        "iter_0000002.png",
    ]
    assert [(name, step) for name, _, step in one.storage._vis_data] == [
        ("teacher/tokens", 1),
        ("teacher/tokens", 2),
    ]
    short = EncoderPictures(files, tmp_path / "short", 4, short_side=32, num_images=1)
    run(short, trainer(max_iter=3))
    assert not (tmp_path / "short").exists()
    page = cv2.imread(str(tmp_path / "pictures" / "iter_0000002.png"))
    shown = one.storage._vis_data[1][1]
    np.testing.assert_array_equal(shown, page[..., ::-1].transpose(2, 0, 1))


def test_pages_take_a_small_share_of_the_time(files: list[str], tmp_path: Path) -> None:
    hook = EncoderPictures(files, tmp_path, 1, short_side=32, num_images=1, max_share=1e-4)
    run(hook, trainer(max_iter=4))
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [
        "iter_0000000.png",
        "iter_0000003.png",  # the last is always drawn
    ]


def test_tensorboard_shows_the_page(files: list[str], tmp_path: Path) -> None:
    one = trainer(max_iter=1)
    with one.storage:
        run(EncoderPictures(files, tmp_path / "pictures", 1, short_side=32, num_images=1), one)
        writer = TensorboardXWriter(str(tmp_path / "events"))
        writer.write()
        writer.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    (image,) = events.Images("teacher/tokens")
    decoded = cv2.imdecode(np.frombuffer(image.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    page = cv2.imread(str(tmp_path / "pictures" / "iter_0000000.png"))
    np.testing.assert_array_equal(decoded, page)


def test_randomness_and_weights_stay_as_they_are(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(*_args, **_kwargs) -> None:
        torch.rand(3), np.random.rand(3), random.random()
        raise OSError("no space left")

    one = trainer(max_iter=1)
    before = {name: t.clone() for name, t in one.method.exported_encoder().state_dict().items()}
    for disturb in (False, True):
        if disturb:
            monkeypatch.setattr(pretrain.hooks, "encoder_figure", drawing)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        run(EncoderPictures(files, tmp_path, 1, short_side=32, num_images=1), one)
        assert torch.equal(torch.get_rng_state(), states[0])
        np.testing.assert_array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
    for name, tensor in one.method.exported_encoder().state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None


def test_a_failure_is_logged_once_and_does_not_end_the_run(
    files: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    logging.getLogger("pretrain").propagate = True
    with caplog.at_level(logging.WARNING, logger="pretrain"):
        run(EncoderPictures(files, tmp_path / "file" / "x", 1, 32, 1), trainer(3))
    # Loggers that other tests have set up may hand one record on twice.
    once = dict.fromkeys(caplog.records)
    assert [record.getMessage() for record in once] == [
        "Pictures cannot be drawn; the run goes on."
    ]


def test_unreadable_images_are_left_out(files: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    run(EncoderPictures([str(bad), files[0]], tmp_path / "p", 1, 32), trainer(1))
    assert (tmp_path / "p" / "iter_0000000.png").is_file()


def test_period_zero_draws_nothing(files: list[str], tmp_path: Path) -> None:
    run(EncoderPictures(files, tmp_path / "p", 0, 32), trainer(2))
    assert not (tmp_path / "p").exists()
