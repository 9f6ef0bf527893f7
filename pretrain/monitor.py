"""Numbers of the steps: throughput, unreadable images, indicators of collapse, the console."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import Tensor

from pretrain.data import check_failed_share
from pretrain.methods import Monitored

logger = logging.getLogger("pretrain")

# Measured on 64-pixel runs: a healthy one has feature_std 0.7 and gives its largest centroid a
# third of the queries; without the volume term one centroid has all of them after 120 steps.
MAX_SHARE = 0.9
MIN_FEATURE_STD = 0.05


def collapse_signs(assigned: Tensor, feature_std: float) -> list[str]:
    """Describe the signs of collapse in the monitored values, a phrase each.

    Args:
        assigned: (K,) number of queries that the teacher assigned to each centroid; empty for a
            method without centroids.
        feature_std: spread of the teacher's features, about 1 where they fill the space.
    """
    signs = []
    if len(assigned):
        share, centroid = (assigned.double() / assigned.sum().clamp(min=1)).max(dim=0)
        if share > MAX_SHARE:
            signs.append(f"centroid {int(centroid)} has {float(share):.1%} of all queries")
    if not feature_std > MIN_FEATURE_STD:
        signs.append(f"the features hardly vary (feature_std {feature_std:.3g})")
    return signs


def _add_to(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        before = sums.get(name, torch.zeros_like(value))
        sums[name] = before.to(value.device) + value


class CollapseWatch(HookBase):
    """Warn when two windows of steps in a row show signs of collapse; training goes on.

    It is registered on every rank. The warning is repeated after every tenth further window.
    ``signs`` are those of the last window.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.bad_windows = 0
        self.signs: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def after_step(self) -> None:
        monitored: Monitored = self.trainer.monitored
        if "feature_std" not in monitored:
            return
        # A method without centroids is judged by its features alone.
        assigned = monitored.get("assigned", torch.zeros(0, dtype=torch.int64))
        _add_to(self.sums, {"assigned": assigned, "feature_std": monitored["feature_std"]})
        self.steps += 1
        if (self.trainer.iter + 1) % self.window == 0:
            if self.steps == self.window:  # fewer where the run was resumed within the window
                self._judge(**self.sums)
            self._reset()

    def _judge(self, assigned: Tensor, feature_std: Tensor) -> None:
        if len(assigned) and dist.is_initialized() and comm.get_world_size() > 1:
            dist.all_reduce(assigned)
        signs = self.signs = collapse_signs(assigned, float(feature_std) / self.window)
        self.bad_windows = self.bad_windows + 1 if signs else 0
        if self.bad_windows % 10 == 2:
            logger.warning(
                "Training has collapsed: for %d steps, until iteration %d, %s. It seldom recovers: "
                "stop it, and start anew with a larger model.loss.volume_weight, with "
                "schedules.cross_scale above schedules.self_scale, or a lower schedules.base_lr.",
                self.bad_windows * self.window,
                self.trainer.iter,
                " and ".join(signs),
            )


class Monitor(HookBase):
    """Report throughput, unreadable images, and indicators of collapse every ``period`` steps.

    Puts into the storage: ``images_per_second``; ``unreadable_images`` so far; and, for a method
    with centroids, ``centroids_in_use``, the number of centroids that were the nearest of at least
    one query, and ``assignment_entropy``, the entropy of the mean assignment in nats (log K when
    all centroids have equal shares, 0 when one has everything). It comes before the writers.
    ``log_file`` names each unreadable image once.

    Raises:
        InputError: more than ``max_failed_share`` of the images cannot be read.
    """

    def __init__(
        self,
        period: int,
        total_batch_size: int,
        log_file: Path,
        num_images: int,
        max_failed_share: float = 1.0,
    ) -> None:
        self.period, self.total_batch_size, self.log_file = period, total_batch_size, log_file
        self.num_images, self.max_failed_share = num_images, max_failed_share
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def before_train(self) -> None:
        """Read the names of unreadable images, of a run that is resumed or of other processes."""
        self.named: set[str] = set()
        if self.log_file.is_file():
            self.named.update(self.log_file.read_text(errors="surrogateescape").splitlines())

    def after_step(self) -> None:
        self._add(self.trainer.monitored)
        self._note_failed(self.trainer.last_batch.failed)
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self._report()

    def gather(self) -> None:
        """Bring the sums of all ranks to the main process, whose checkpoint holds them."""
        if dist.is_initialized() and comm.get_world_size() > 1:
            for total in self.sums.values():
                dist.all_reduce(total)
                if not comm.is_main_process():
                    total.zero_()

    def state_dict(self) -> dict[str, Any]:
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {"steps": self.steps if sums else 0, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the main process continues the sums of all."""
        self.steps = state["steps"]
        if self.steps and comm.is_main_process():
            self.sums = {name: total for name, total in state.items() if name != "steps"}

    def _add(self, monitored: Monitored) -> None:
        self.steps += 1
        if "assigned" in monitored:
            mean = monitored["mean_assignment"].double()
            _add_to(self.sums, {"assigned": monitored["assigned"], "mean_assignment": mean})

    def _note_failed(self, names: list[str]) -> None:
        if not self.named.issuperset(names):
            self.before_train()
        new = [name for name in dict.fromkeys(names) if name not in self.named]
        if new:
            self.named.update(new)
            with self.log_file.open("a", errors="surrogateescape") as file:
                file.writelines(f"{name}\n" for name in new)
        num_failed = self.trainer.num_failed
        if new:
            logger.warning("%d images cannot be read; named in %s", num_failed, self.log_file)
        used = (self.trainer.iter + 1) * self.total_batch_size
        check_failed_share(num_failed, used, self.num_images, self.max_failed_share, self.log_file)

    def _report(self) -> None:
        self.gather()
        scalars: dict[str, float] = {"unreadable_images": self.trainer.num_failed}
        if self.sums:
            shares = self.sums["mean_assignment"] / self.sums["mean_assignment"].sum()
            scalars["centroids_in_use"] = int((self.sums["assigned"] > 0).sum())
            scalars["assignment_entropy"] = float(torch.special.entr(shares).sum())
        storage = self.trainer.storage
        storage.put_scalars(smoothing_hint=False, **scalars)
        times = storage.histories().get("time")
        if times is not None and len(times.values()):
            seconds = times.avg(min(self.steps, len(times.values())))
            storage.put_scalar("images_per_second", self.total_batch_size / seconds)
        self._reset()


class ConsoleProgress(EventWriter):
    """Print a line: time left, losses, schedules, throughput, indicators of collapse.

    Losses and times are medians over ``window`` steps; ``num_centroids`` is K, 0 for a method
    without.
    """

    def __init__(
        self, max_iter: int, iters_per_epoch: float, num_centroids: int, window: int = 20
    ) -> None:
        self.max_iter, self.iters_per_epoch = max_iter, iters_per_epoch
        self.num_centroids, self.window = num_centroids, window

    def write(self) -> None:
        storage = get_event_storage()
        histories = storage.histories()
        done = storage.iter + 1
        if "loss" not in histories or storage.iter >= self.max_iter:
            return

        def latest(name: str, form: str = ".3g") -> str:
            history = histories.get(name)
            return format(history.latest(), form) if history else "n/a"

        def smooth(name: str) -> str:
            return format(histories[name].median(self.window), ".4g")

        terms = [
            f"{name.removeprefix('loss_')} {smooth(name)}"
            for name in histories
            if name.startswith("loss_") and name != "loss_scale"
        ]
        parts = [
            f"iter {done}/{self.max_iter}",
            f"epoch {done / self.iters_per_epoch:.2f}",
            f"loss {smooth('loss')}" + (f" ({', '.join(terms)})" if terms else ""),
            f"lr {latest('lr')}",
            f"grad {smooth('grad_norm')}",
        ]
        if self.num_centroids:
            parts += [
                f"tau_t {latest('teacher_temp')}",
                f"centroids {latest('centroids_in_use', '.0f')}/{self.num_centroids}",
                f"entropy {latest('assignment_entropy', '.2f')}",
            ]
        parts.append(f"feat_std {latest('feature_std', '.2f')}")
        if "time" in histories:
            seconds = histories["time"].median(1000)
            eta = datetime.timedelta(seconds=int(seconds * (self.max_iter - done)))
            storage.put_scalar("eta_seconds", eta.total_seconds(), smoothing_hint=False)
            parts.insert(0, f"eta {eta}")
            wait = histories["data_time"].avg(self.window) / histories["time"].avg(self.window)
            parts += [f"{latest('images_per_second')} img/s", f"data wait {min(wait, 1):.0%}"]
        if torch.cuda.is_available():
            parts.append(f"mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        logger.info("  ".join(parts))
