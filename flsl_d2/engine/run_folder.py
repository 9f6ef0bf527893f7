"""The output folder of a run: its logs, its metrics, and the settings it was started with.

The settings keep a folder from being continued as another run by accident.
"""

from __future__ import annotations

import errno
import fcntl
import inspect
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from flsl_d2.agreement import decided_by_main
from flsl_d2.engine.log_lines import start_log
from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder, write_text
from flsl_d2.weights.checkpointer import BEST_WEIGHTS, checkpoint_files

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
# The open files that hold the locks of this process; the system frees them when it ends.
_LOCKS: dict[tuple[Path, int], TextIO] = {}
_SHOWN = 12
_OFF = ("0", "0.0", "", "None", "False", "[]")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeutralKeys:
    """Config keys that do not change what a run learns, as patterns of ``fnmatch``.

    Runs that differ in ``no_effect`` alone have the same weights and logged values. Keys of
    ``on_resume`` change how numbers are rounded or how often they are logged, or they are compared
    in another way.
    """

    no_effect: tuple[str, ...]
    on_resume: tuple[str, ...]

    def may_differ(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in (*self.no_effect, *self.on_resume))


PRETRAINING_KEYS = NeutralKeys(
    no_effect=(
        "train.output_dir",
        "train.checkpoint_*",
        "train.pictures_*",
        "train.health_period",
        "train.measures.*",
        "train.trackers",
        *("dataloader.num_workers", "dataloader.prefetch_factor"),
    ),
    on_resume=(
        *("train.device", "train.compile*", "train.tf32", "train.log_period"),
        "train.sharding",  # in configs of earlier versions
        # The images are compared by their names below their common folder.
        *("dataset.root", "dataset.name", "dataset.max_failed_share"),
        *("dataset.cache_gb", "dataset.cache_dir", "dataset.patience"),
        "model.backbone.use_act_checkpoint",
    ),
)
DETECTION_KEYS = NeutralKeys(
    no_effect=(
        *("train.output_dir", "train.checkpointer.*", "train.trackers"),
        "dataloader.*.num_workers",
        *("OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD", "DATALOADER.NUM_WORKERS", "VIS_PERIOD"),
        "TRAIN.TRACKERS",
    ),
    on_resume=(
        *("train.device", "train.log_period", "train.eval_period", "train.best_metric"),
        "train.patience",
        "train.max_iter",  # the learning rates are those of lr_multiplier, a key of its own
        # The names of a data set given by its files identify their content.
        *("dataloader.train.dataset.json_file", "dataloader.train.dataset.image_root"),
        # A resumed run starts from its checkpoint; evaluation does not change the weights.
        *("train.init_checkpoint", "dataloader.test.*", "dataloader.evaluator.*"),
        *("MODEL.DEVICE", "MODEL.WEIGHTS", "DATASETS.TEST", "TEST.*"),
    ),
)


def prepare_output(folder: Path, key: str, loggers: list[str]) -> None:
    """Make the output folder, and send logs to it and to the console.

    Only the main process logs to the console; the others write ``log.txt.rank1`` and so on. ``key``
    is the config key of the folder, ``loggers`` are further ones than Detectron2's and fvcore's.

    Raises:
        InputError: the folder cannot be written.
    """
    rank = comm.get_rank()
    writable_folder(folder, key)
    start_log(str(folder), rank, ("fvcore", "detectron2", *loggers))


def _lock(folder: Path, key: str) -> None:
    """Keep other runs out of a folder until the run or this process ends, however it ends."""
    path = Path(folder, LOCK_FILE).absolute()
    if (path, os.getpid()) in _LOCKS:
        return
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s); start no second run in it.", folder, error)
            return
        file.seek(0)
        holder = file.read().strip() or "a process that gives no name"
        file.close()
        raise InputError(
            f"{key} is '{folder}', to which another run writes ({holder}); wait for its end, stop "
            f"it, or set another {key}."
        ) from None
    file.truncate(0)
    since = datetime.now(timezone.utc).isoformat(" ", "seconds")
    file.write(f"process {os.getpid()} on {platform.node()} since {since}\n")
    file.flush()
    _LOCKS[path, os.getpid()] = file


def unlock(folder: str | Path) -> None:
    """Let other runs write to a folder, where this process has locked it."""
    file = _LOCKS.pop((Path(folder, LOCK_FILE).absolute(), os.getpid()), None)
    if file is not None:
        file.truncate(0)
        file.close()


def trim_metrics(path: str | Path, num_steps: int) -> int:
    """Remove the rows of a metrics file beyond the first ``num_steps`` steps; return their number.

    Those rows were logged after the checkpoint that a run is resumed from, and will be logged
    again. A half-written row is removed as well. The file is shortened in one operation.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept, size = 0, 0
    for line in lines:
        try:
            # A row's iteration is that of the step just done, counted from 0.
            whole = line.endswith(b"\n") and json.loads(line)["iteration"] < num_steps
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        kept, size = kept + 1, size + len(line)
    if kept < len(lines):
        with path.open("r+b") as file:
            file.truncate(size)
    return len(lines) - kept


class PeriodicWriter(hooks.PeriodicWriter):
    """Detectron2's writer, except that a run that ends early adds no row of its own."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
            return
        for writer in self._writers:
            writer.close()


@dataclass(frozen=True)
class ResumeOptions:
    """How to treat a run that the output folder already holds.

    ``resume`` continues it, with ``allow_changes`` even with other settings; ``overwrite`` deletes
    its checkpoints and starts anew.
    """

    resume: bool = False
    allow_changes: bool = False
    overwrite: bool = False


def flat_config(cfg: DictConfig | CfgNode) -> dict[str, str]:
    """Flatten a config to its full keys and their values as text, interpolations resolved.

    Functions and classes are named; any other object is named by its class.
    """
    if isinstance(cfg, DictConfig):
        try:
            cfg = OmegaConf.to_container(cfg, resolve=True)
        except InterpolationResolutionError as error:
            reason = str(error.msg).splitlines()[0]
            raise InputError(
                f"the config's {error.full_key} refers to another key ({reason}); set "
                f"{error.full_key} itself."
            ) from error
    return dict(_flat(cfg, ""))


def check_and_keep_run(
    cfg: DictConfig | CfgNode,
    folder: str | Path,
    key: str,
    options: ResumeOptions,
    neutral: NeutralKeys,
    also: Mapping[str, str] | None = None,
) -> None:
    """Compare a run with the one in its output folder, then keep its config there.

    Writes ``config.yaml`` for people and ``run.json`` for the comparison. A folder without a
    checkpoint holds no run. Another number of processes is a warning.

    Args:
        key: the config key of the folder, for messages.
        neutral: keys that may differ.
        also: settings that decide the result and are not in the config.

    Raises:
        InputError: the folder holds a run and ``resume`` was not given, or a run of other settings,
            or another process writes to it; raised on all processes.
    """
    settings, folder = {**flat_config(cfg), **(also or {})}, Path(folder)

    def check_and_keep() -> None:
        _lock(folder, key)
        files = checkpoint_files(folder)
        if files and not options.resume and not options.overwrite:
            raise InputError(
                f"{key} is '{folder}', which holds the checkpoints of a run; continue it with "
                f"--resume, set another {key}, or start anew over it with --overwrite."
            )
        if files and options.resume:
            before = _read(folder / RUN_FILE)
            if before:
                changes = _changes(before["settings"], settings, neutral)
                _judge_changes(changes, folder, key, options.allow_changes)
                _compare_processes(before.get("processes"))
        elif files:
            logger.warning("Deleting the run's checkpoints in %s, as --overwrite asks.", folder)
            for file in [*files, folder / "last_checkpoint", folder / BEST_WEIGHTS]:
                file.unlink(missing_ok=True)
        keep_config(cfg, folder)
        content = {"processes": comm.get_world_size(), "settings": settings}
        write_text(folder / RUN_FILE, json.dumps(content, indent=1))

    # Other machines may see another folder, so one process looks and decides for all.
    decided_by_main(check_and_keep)


def keep_config(cfg: DictConfig | CfgNode, folder: str | Path) -> None:
    """Write ``config.yaml``, for people and :class:`flsl_d2.detection.predictor.Predictor`."""
    path = Path(folder, "config.yaml")
    if isinstance(cfg, CfgNode):
        path.write_text(cfg.dump())
    else:
        LazyConfig.save(cfg, str(path))


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        return content if content["settings"].keys() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s cannot be read (%s), so the config is not compared.", file, reason)
        return {}


def _changes(
    before: Mapping[str, str], now: Mapping[str, str], neutral: NeutralKeys
) -> dict[bool, list[str]]:
    """Describe the settings that differ, by whether they may."""
    changes: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted({*before, *now}):
        # A key that the run's version did not know changes nothing where it is off or a default.
        known = name in before or now[name] not in (*_OFF, _default(name, now))
        if known and before.get(name) != now.get(name):
            values = f"{before.get(name, 'absent')} -> {now.get(name, 'absent')}"
            changes[neutral.may_differ(name)].append(f"{name}: {values}")
    return changes


def _judge_changes(
    changes: dict[bool, list[str]], folder: Path, key: str, allow_changes: bool
) -> None:
    harmless, serious = changes[True], changes[False]
    if harmless:
        logger.info(
            "Settings that differ from the run so far without changing what it learns: %s",
            "; ".join(harmless),
        )
    if not serious:
        return
    shown = "; ".join(serious[:_SHOWN])
    if len(serious) > _SHOWN:
        shown += f"; and {len(serious) - _SHOWN} more"
    if not allow_changes:
        raise InputError(
            f"{key} is '{folder}', which holds a run of other settings ({shown}); set another "
            f"{key}, give the run's own settings, or go on with these by --allow-changes."
        )
    logger.warning("Going on with other settings, as --allow-changes asks: %s", shown)


def _default(name: str, settings: Mapping[str, str]) -> str | None:
    """Default of a key of a LazyConfig's call as text; None where there is none."""
    node, _, key = name.rpartition(".")
    target = settings.get(f"{node}._target_")
    if target is None:
        return None
    parameter = inspect.signature(locate(target)).parameters.get(key)
    return None if parameter is None else _text(parameter.default)


def _compare_processes(before: int | None) -> None:
    now = comm.get_world_size()
    if before is not None and before != now:
        logger.warning(
            "The run had %d process(es) and goes on with %d: the images of a step stay the same; "
            "random draws of each process and the rounding of sums over processes do not.",
            before,
            now,
        )


def _flat(node: Any, prefix: str) -> Iterable[tuple[str, str]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple) and any(isinstance(x, Mapping) for x in node):
        for place, value in enumerate(node):
            yield from _flat(value, f"{prefix}.{place}")
    else:
        yield prefix, _text(node)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):  # the same value may be read as either
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str | int | float | bool | None):
        return str(value)
    if isinstance(value, Mapping):
        return "{}"
    name = getattr(value, "__qualname__", None)
    kind = value if name else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
