"""Hooks beside the steps: collapse, sums that survive a checkpoint, exports, kept checkpoints."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flsl_d2.engine.checkpoints import Checkpoints
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError
from flsl_d2.weights.checkpointer import SafeCheckpointer
from pretrain import hooks
from pretrain.hooks import ExportTeacher
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


def test_a_failed_run_exports_no_teacher(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(hooks, "save_teacher_backbone", lambda *_: written.append(1))
    export = ExportTeacher(tmp_path / "teacher.pth", period=2)
    export.trainer = trainer(max_iter=4)
    for iteration in range(4):
        export.trainer.iter = iteration
        export.after_step()
    assert len(written) == 2
    export.after_train()  # the last step raised: its number is still set
    assert len(written) == 2
    export.trainer.iter = 4
    export.after_train()
    assert len(written) == 3


def test_an_export_that_fails_is_said_and_at_the_end_an_error(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hooks, "save_teacher_backbone", full)
    export = ExportTeacher(tmp_path / "teacher.pth", period=1)
    export.trainer = trainer(max_iter=1)
    export.after_step()
    assert "No space left" in caplog.text
    export.trainer.iter = 1
    with pytest.raises(TrainingError, match="No space left"):
        export.after_train()


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
