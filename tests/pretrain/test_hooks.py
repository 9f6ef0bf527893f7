"""Hooks beside the steps: collapse, sums that survive a checkpoint, exports, kept checkpoints."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from flsl_d2.engine.checkpoints import Checkpoints
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.evaluation.features import encode_images
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights.checkpointer import SafeCheckpointer, copy_to_cpu
from pretrain import hooks
from pretrain.hooks import ExportTeacher, TimeShare, beside_training
from pretrain.monitor import CollapseWatch, Monitor, collapse_signs


class Storage(dict):
    def put_scalars(self, smoothing_hint=True, **scalars):
        self.update(scalars)

    def histories(self):
        return {}


def trainer(max_iter: int = 1000):
    return SimpleNamespace(
        iter=0,
        max_iter=max_iter,
        num_failed=0,
        storage=Storage(),
        last_batch=SimpleNamespace(failed=[]),
        monitored={},
        method=None,
    )


def step(hook, iteration: int, assigned: list[int], feature_std: float = 0.7) -> None:
    counts = torch.tensor(assigned)
    hook.trainer.iter = iteration
    hook.trainer.monitored = {
        "assigned": counts,
        "mean_assignment": counts / counts.sum(),
        "feature_std": torch.tensor(feature_std),
    }
    hook.after_step()


@pytest.mark.parametrize(
    ("assigned", "feature_std", "signs"),
    [
        ([10, 10, 10, 10], 0.7, 0),
        ([85, 15, 0, 0], 0.7, 0),
        ([95, 5, 0, 0], 0.7, 1),
        ([10, 10, 10, 10], 0.01, 1),
        ([10, 10, 10, 10], float("nan"), 1),
        ([40, 0, 0, 0], 0.0, 2),
    ],
)
def test_signs_of_collapse(assigned, feature_std, signs):
    assert len(collapse_signs(torch.tensor(assigned), feature_std)) == signs


def warnings_of(counts, num_steps: int, first: int, caplog) -> list[int]:
    watch = CollapseWatch(window=50)
    watch.trainer = trainer()
    warned = []
    for iteration in range(first, first + num_steps):
        caplog.clear()
        step(watch, iteration, counts(iteration))
        if "collapsed" in caplog.text:
            warned.append(iteration)
    return warned


def test_collapse_is_announced_within_two_windows_and_again_after_ten(caplog):
    def one_takes_over(iteration):
        return [40, 0, 0, 0] if iteration >= 60 else [10, 10, 10, 10]

    assert warnings_of(one_takes_over, 800, 0, caplog) == [199, 699]


def test_no_alarm_where_all_is_well_or_for_part_of_a_window(caplog):
    def early(iteration):  # a start that is not collapse yet
        return [40, 0, 0, 0] if iteration < 80 else [10, 10, 10, 10]

    assert warnings_of(early, 400, 0, caplog) == []
    assert warnings_of(lambda _: [10, 9, 8, 7], 400, 0, caplog) == []
    # Resumed in the middle of a window, which is not judged.
    assert warnings_of(lambda _: [40, 0, 0, 0], 100, 25, caplog) == []


def monitor(folder: Path, **options) -> Monitor:
    hook = Monitor(4, 8, folder / "unreadable.txt", num_images=16, **options)
    hook.trainer = trainer()
    hook.before_train()
    return hook


def test_indicators_go_on_over_a_checkpoint(tmp_path):
    counts = [[3, 1, 0, 0], [0, 0, 4, 0], [2, 2, 0, 0], [1, 0, 0, 3]]
    whole = monitor(tmp_path)
    for iteration, each in enumerate(counts):
        step(whole, iteration, each)
    first, second = monitor(tmp_path), monitor(tmp_path)
    for iteration in range(2):
        step(first, iteration, counts[iteration])
    first.gather()
    second.load_state_dict(first.state_dict())
    for iteration in range(2, 4):
        step(second, iteration, counts[iteration])
    assert whole.trainer.storage == second.trainer.storage
    assert whole.trainer.storage["centroids_in_use"] == 4
    assert second.state_dict() == {"steps": 0}
    monitor(tmp_path).load_state_dict({"steps": 0})


def test_unreadable_images_are_named_once_also_after_resuming(tmp_path):
    for _ in range(2):
        hook = monitor(tmp_path)
        hook.trainer.last_batch.failed = ["a.jpg\tcut", "b.jpg\tcut", "a.jpg\tcut"]
        step(hook, 0, [1, 1])
    assert (tmp_path / "unreadable.txt").read_text() == "a.jpg\tcut\nb.jpg\tcut\n"


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    hook = monitor(tmp_path, max_failed_share=0.25)
    step(hook, 0, [1, 1])
    hook.trainer.num_failed = 4
    step(hook, 1, [1, 1])  # 4 of 20
    hook.trainer.num_failed = 12
    with pytest.raises(InputError, match="12 of 36"):
        step(hook, 2, [1, 1])


@pytest.fixture
def export(tmp_path, monkeypatch) -> ExportTeacher:
    monkeypatch.setattr(hooks, "_content", lambda encoder: {"model": encoder})
    hook = ExportTeacher(tmp_path / "teacher.pth", period=2)
    hook.trainer = trainer(max_iter=4)
    hook.trainer.method = SimpleNamespace(exported_encoder=lambda: {"w": hook.trainer.weight})
    hook.trainer.weight = torch.zeros(3)
    return hook


def exported(hook: ExportTeacher) -> float:
    return float(torch.load(hook.path)["model"]["w"][0])


def test_a_failed_run_exports_no_teacher(export):
    for export.trainer.iter in range(4):
        export.trainer.weight += 1
        export.after_step()
    export.trainer.weight += 1
    export.after_train()  # the last step raised: its number is still set
    assert exported(export) == 4
    export.trainer.iter = 4
    export.after_train()
    assert exported(export) == 5


def test_an_export_that_fails_is_said_and_at_the_end_an_error(export, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hooks, "write_content", full)
    for export.trainer.iter in range(4):
        export.after_step()
    assert "No space left" in caplog.text
    export.trainer.iter = 4
    with pytest.raises(TrainingError, match="No space left"):
        export.after_train()


def test_an_export_is_written_while_training_goes_on(export, monkeypatch):
    real, free = hooks.write_content, threading.Event()
    monkeypatch.setattr(hooks, "write_content", lambda *_: free.wait(60) and real(*_))
    export.trainer.iter = 1
    export.after_step()
    export.trainer.weight += 7  # the next step
    assert not export.path.exists()
    free.set()
    export.after_train()
    assert exported(export) == 0


def checkpoints(folder: Path, **options) -> Checkpoints:
    hook = Checkpoints(SafeCheckpointer(nn.Linear(1, 1), str(folder)), period=2, **options)
    hook.trainer = trainer(max_iter=20)
    hook.before_train()
    return hook


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("model_*"))


def test_which_checkpoints_are_kept(tmp_path):
    for start, end in ((0, 9), (9, 20)):  # resumed: the second hook knows nothing of the first
        hook = checkpoints(tmp_path, keep_last=2, keep_every=6)
        for hook.trainer.iter in range(start, end):
            hook.after_step()
    assert names(tmp_path) == [
        *("model_0000005.pth", "model_0000011.pth", "model_0000015.pth", "model_0000017.pth"),
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_leaving_when_asked(tmp_path):
    prepared = []
    hook = checkpoints(
        tmp_path,
        stop_agreed=lambda: hook.trainer.iter >= 6,
        prepare=lambda: prepared.append(hook.trainer.iter),
    )

    def train():
        for hook.trainer.iter in range(20):
            hook.after_step()

    with pytest.raises(SystemExit) as left:
        train()
    assert left.value.code == STOPPED
    assert names(tmp_path)[-1] == "model_0000006.pth"
    assert prepared == [1, 3, 5, 6]


def test_no_stop_in_the_last_step(tmp_path):
    hook = checkpoints(tmp_path, stop_agreed=lambda: True)
    hook.trainer.iter = 19
    hook.after_step()
    assert names(tmp_path) == ["model_final.pth"]


class Slow(SafeCheckpointer):
    """Writes when it may, and fails where there is a reason."""

    def __init__(self, folder: Path) -> None:
        super().__init__(nn.Linear(1, 1, bias=False), str(folder))
        self.free, self.reason = threading.Event(), ""

    def write(self, name, content):
        assert self.free.wait(60)
        if self.reason:
            raise OSError(errno.ENOSPC, self.reason)
        super().write(name, content)


@pytest.fixture
def background(tmp_path) -> Checkpoints:
    hook = Checkpoints(Slow(tmp_path), period=2, keep_last=1, background=True)
    hook.trainer = trainer(max_iter=6)
    nn.init.zeros_(hook.checkpointer.model.weight)
    return hook


def run_steps(hook: Checkpoints, *iterations: int) -> None:
    for hook.trainer.iter in iterations:
        with torch.no_grad():
            hook.checkpointer.model.weight += 1
        hook.after_step()


def test_training_goes_on_while_a_checkpoint_is_written(background, tmp_path):
    run_steps(background, 0, 1, 2)  # the checkpoint after the second step waits for the disk
    assert names(tmp_path) == []
    background.checkpointer.free.set()
    run_steps(background, 3, 4)
    background.after_train()
    assert names(tmp_path) == ["model_0000003.pth"]
    content = torch.load(tmp_path / "model_0000003.pth")
    assert content["iteration"] == 3
    assert float(content["model"]["weight"]) == 4  # as it was then
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(background, tmp_path):
    run_steps(background, 0, 1, 2)
    background.keep_last = None
    threading.Timer(0.2, background.checkpointer.free.set).start()
    with pytest.raises(SystemExit):
        background.save_and_leave()
    assert names(tmp_path) == ["model_0000001.pth", "model_0000002.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_a_checkpoint_that_fails_in_the_background_is_said(background, tmp_path, caplog):
    background.checkpointer.free.set()
    background.checkpointer.reason = "No space left on device"
    run_steps(background, 0, 1)
    background._writing._thread.join()
    run_steps(background, 2)
    assert "model_0000001.pth cannot be written" in caplog.text
    assert "No space left on device); there is none before it. Training goes on" in caplog.text
    with pytest.raises(TrainingError, match=r"model_final\.pth cannot be written .*make room"):
        run_steps(background, 3, 4, 5)
    assert names(tmp_path) == []


def test_a_copy_of_a_checkpoint_shares_nothing_with_the_run():
    content = {"a": [torch.ones(2), (torch.ones(1), 3)], "b": {"c": torch.ones(1)}, "d": "text"}
    copied = copy_to_cpu(content)
    content["a"][0] += 1
    content["a"][1][0].zero_()
    content["b"]["c"].zero_()
    assert str(copied) == str({"a": [torch.ones(2), (torch.ones(1), 3)],
                               "b": {"c": torch.ones(1)}, "d": "text"})  # fmt: skip


def test_encoders_are_used_in_the_precision_of_the_steps():
    encoder = FLSLViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    plain = encode_images(encoder, images)
    with torch.autocast("cpu", torch.bfloat16):
        expected = encode_images(encoder, images)
    with beside_training(SimpleNamespace(dtype=torch.bfloat16)):
        mixed = encode_images(encoder, images)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, plain)
    with beside_training(SimpleNamespace(dtype=None)):
        assert torch.equal(encode_images(encoder, images), plain)


def test_work_for_which_all_wait_takes_its_share_of_the_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: clock[0])
    share, done = TimeShare(0.1), []
    for second in range(100):
        clock[0] = max(clock[0], float(second))
        if share.allows():
            with share.taking():
                clock[0] += 3
            done.append(second)
    assert done == [0, 30, 60, 90]
