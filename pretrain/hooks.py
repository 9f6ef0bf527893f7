"""What happens beside the steps: collapse indicators, console progress, the exported teacher.

Order and timing are those of Detectron2's ``HookBase``: ``after_step`` runs in the order of
registration, so :class:`Monitor` comes before the writers that print what it puts into the
storage.
"""

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

from flsl_d2.errors import TrainingError
from flsl_d2.files import replaced_file
from flsl_d2.weights.export import encoder_file
from pretrain.data import check_failed_share
from pretrain.methods.flsl import FLSL

__all__ = [
    "ConsoleProgress",
    "ExportTeacher",
    "Monitor",
    "save_teacher_backbone",
]


def save_teacher_backbone(model: FLSL, path: str | Path) -> None:
    """Write the teacher's encoder (:func:`encoder_file`); a reader never sees half of it.

    Raises:
        OSError: it cannot be written; a file that was there before still is.
    """
    with replaced_file(path) as file:
        torch.save(encoder_file(model.teacher.backbone), file)


logger = logging.getLogger("pretrain")


class Monitor(HookBase):
    """Throughput, unreadable images, and the collapse indicators of the last ``period`` steps.

    Puts into the storage: ``images_per_second``; ``centroids_in_use``, how many centroids were
    the nearest of at least one query; ``assignment_entropy``, in nats, of the mean assignment
    (log K when all centroids share alike, 0 when one takes all); ``unreadable_images`` so far.

    Args:
        period: steps between two reports.
        total_batch_size: images a step, of all ranks.
        log_file: where the name of each unreadable image is written once.
        num_images: of the data set.
        max_failed_share: see :func:`pretrain.data.check_failed_share`.

    Raises:
        InputError: too many images cannot be read.
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
        self.assigned: Tensor | None = None
        self.mean_assignment: Tensor | None = None
        self.steps = 0

    def before_train(self) -> None:
        """Know the files that a run which is resumed has named."""
        self.named: set[str] = set()
        if self.log_file.is_file():
            self.named.update(self.log_file.read_text(errors="surrogateescape").splitlines())

    def after_step(self) -> None:
        """Accumulate on the device; report at the end of each period."""
        self._add(self.trainer.monitored)
        self._note_failed(self.trainer.last_batch.failed)
        done = self.trainer.iter + 1
        if done % self.period == 0 or done >= self.trainer.max_iter:
            self._report()

    def gather(self) -> None:
        """Bring the sums of all ranks to the main process, whose checkpoint holds them."""
        if self.assigned is not None and dist.is_initialized() and comm.get_world_size() > 1:
            for total in (self.assigned, self.mean_assignment):
                dist.all_reduce(total)
                if not comm.is_main_process():
                    total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The sums of a period that is not over."""
        if self.assigned is None:
            return {"steps": 0}
        sums = {"assigned": self.assigned.cpu(), "mean_assignment": self.mean_assignment.cpu()}
        return {"steps": self.steps, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`; the main process goes on with what all had."""
        self.steps = state["steps"]
        if self.steps and comm.is_main_process():
            self.assigned, self.mean_assignment = state["assigned"], state["mean_assignment"]

    def _add(self, monitored: dict[str, Tensor]) -> None:
        assigned, mean = monitored["assigned"], monitored["mean_assignment"].double()
        if self.assigned is None:
            self.assigned, self.mean_assignment = torch.zeros_like(assigned), torch.zeros_like(mean)
        self.assigned = self.assigned.to(assigned.device) + assigned
        self.mean_assignment = self.mean_assignment.to(mean.device) + mean
        self.steps += 1

    def _note_failed(self, names: list[str]) -> None:
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
        shares = self.mean_assignment / self.mean_assignment.sum()
        storage = self.trainer.storage
        storage.put_scalars(
            smoothing_hint=False,
            centroids_in_use=int((self.assigned > 0).sum()),
            assignment_entropy=float(torch.special.entr(shares).sum()),
            unreadable_images=self.trainer.num_failed,
        )
        times = storage.histories().get("time")
        if times is not None and len(times.values()):
            seconds = times.avg(min(self.steps, len(times.values())))
            storage.put_scalar("images_per_second", self.total_batch_size / seconds)
        self._reset()


class ConsoleProgress(EventWriter):
    """One line a period: ETA, losses, schedules, throughput, collapse indicators.

    Args:
        max_iter: steps of the run.
        iters_per_epoch: steps an epoch.
        num_centroids: K.
        window: steps over which losses and times are smoothed (median).
    """

    def __init__(
        self, max_iter: int, iters_per_epoch: float, num_centroids: int, window: int = 20
    ) -> None:
        self.max_iter, self.iters_per_epoch = max_iter, iters_per_epoch
        self.num_centroids, self.window = num_centroids, window

    def write(self) -> None:
        """Print the latest values of the storage."""
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

        parts = [f"iter {done}/{self.max_iter}", f"epoch {done / self.iters_per_epoch:.2f}"]
        parts += [
            f"loss {smooth('loss')} (intra {smooth('loss_intra')}, inter {smooth('loss_inter')}, "
            f"volume {smooth('loss_volume')})",
            f"lr {latest('lr')}",
            f"tau_t {latest('teacher_temp')}",
            f"grad {smooth('grad_norm')}",
            f"centroids {latest('centroids_in_use', '.0f')}/{self.num_centroids}",
            f"entropy {latest('assignment_entropy', '.2f')}",
            f"feat_std {latest('feature_std', '.2f')}",
        ]
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


class ExportTeacher(HookBase):
    """Writes ``teacher_backbone.pth`` every ``period`` steps and at the end.

    Args:
        path: of the file.
        period: steps between two exports; 0 exports only at the end.

    Raises:
        TrainingError: it cannot be written at the end; before, that is an error in the log.
    """

    def __init__(self, path: Path, period: int = 0) -> None:
        self.path, self.period = path, period

    def after_step(self) -> None:
        """Export when due."""
        if self.period and (self.trainer.iter + 1) % self.period == 0:
            try:
                self._export()
            except TrainingError as error:
                logger.error("%s Training goes on.", error)

    def after_train(self) -> None:
        """Export the teacher of a run that is complete."""
        # A step that raised an exception leaves the number below, also in the last step.
        if self.trainer.iter >= self.trainer.max_iter:
            self._export()
            logger.info(
                "The encoder is in %s: train.init_checkpoint=... or MODEL.WEIGHTS loads it.",
                self.path,
            )

    def _export(self) -> None:
        try:
            save_teacher_backbone(self.trainer.flsl, self.path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer hides what the file said
            raise TrainingError(
                f"the encoder cannot be written to '{self.path}' ({error}); make room and run "
                "again with --resume."
            ) from error
