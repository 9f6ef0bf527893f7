"""What a run was started with, so that its folder is not continued as another run by accident."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, LazyConfig
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.files import writable_folder, write_text
from flsl_d2.weights.checkpointer import checkpoint_files

__all__ = [
    "RUN_FILE",
    "PeriodicWriter",
    "ResumeOptions",
    "check_and_keep_run",
    "flat_config",
    "keep_config",
    "prepare_output",
    "trim_metrics",
]


def prepare_output(folder: Path, key: str, loggers: list[str]) -> None:
    """Make the folder, and send logs to it and to the console.

    Only the main process logs to the console; the others write ``log.txt.rank1`` and so on.

    Args:
        folder: of the run.
        key: of the config that named the folder, for the message.
        loggers: names of loggers of the run, besides those of Detectron2 and fvcore.

    Raises:
        InputError: the folder cannot be written.
    """
    rank = comm.get_rank()
    writable_folder(folder, key)
    for name in ("fvcore", "detectron2", *loggers):
        setup_logger(str(folder), distributed_rank=rank, name=name, abbrev_name=name)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_tells_more_than_a_sentence)


def _tells_more_than_a_sentence(record: logging.LogRecord) -> bool:
    """False for what the tool will say itself, at the end and without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, InputError | TrainingError)


def trim_metrics(path: str | Path, num_steps: int) -> int:
    """Cut a metrics file off after the rows of the first ``num_steps`` steps.

    Rows beyond were logged after the checkpoint that a run goes on from, and will be logged again.
    A half-written row goes, too. The file is shortened in one operation.

    Returns:
        How many lines were cut off.
    """
    path = Path(path)
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept, size = 0, 0
    for line in lines:
        try:
            # The iteration is that of the step which had just been done, counted from 0.
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
    """Detectron2's, but a run that ends early leaves no row that a whole run would not have."""

    def after_train(self) -> None:
        """Write what is left of a finished run; only close the files of another."""
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()
            return
        for writer in self._writers:
            writer.close()


RUN_FILE = "run.json"
_SHOWN = 12
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeOptions:
    """What to do with a run that the output folder already holds.

    Attributes:
        resume: continue it.
        allow_changes: continue it even with other settings.
        overwrite: delete its checkpoints and start anew.
    """

    resume: bool = False
    allow_changes: bool = False
    overwrite: bool = False


def flat_config(cfg: DictConfig | CfgNode) -> dict[str, str]:
    """Every key of a config by its full name, with its value as text, interpolations resolved.

    Functions and classes are named; a value whose text would hold its address in memory is named
    by its class.
    """
    if isinstance(cfg, DictConfig):
        cfg = OmegaConf.to_container(cfg, resolve=True)
    return dict(_flat(cfg, ""))


def check_and_keep_run(
    cfg: DictConfig | CfgNode,
    folder: str | Path,
    key: str,
    options: ResumeOptions,
    may_differ: Iterable[str] = (),
    also: Mapping[str, str] | None = None,
) -> None:
    """Compare a run with the one that its folder holds, then keep its config there.

    Writes ``config.yaml`` to read and ``run.json`` to compare with. A folder without a checkpoint
    holds no run. A number of processes that differs is said, not refused.

    Args:
        cfg: of this run.
        folder: of the output.
        key: of the config that names the folder, for messages.
        options: of the command line.
        may_differ: keys that do not change the result, as patterns of ``fnmatch``.
        also: settings beside those of the config that decide the result.

    Raises:
        InputError: the folder holds a run and ``resume`` was not given, or a run of other settings.
    """
    folder = Path(folder)
    settings = {**flat_config(cfg), **(also or {})}
    files = checkpoint_files(folder)
    if files and not options.resume and not options.overwrite:
        raise InputError(
            f"{key} is '{folder}', which holds the checkpoints of a run; continue it with "
            f"--resume, set another {key}, or start anew over it with --overwrite."
        )
    if files and options.resume:
        before = _read(folder / RUN_FILE)
        _compare(before.get("settings"), settings, folder, key, may_differ, options.allow_changes)
        _compare_processes(before.get("processes"))
    comm.synchronize()  # all have looked
    if not comm.is_main_process():
        return
    if files and not options.resume:
        logger.warning("Deleting the checkpoints of the run in %s, as --overwrite asks.", folder)
        for file in [*files, folder / "last_checkpoint"]:
            file.unlink(missing_ok=True)
    keep_config(cfg, folder)
    content = {"processes": comm.get_world_size(), "settings": settings}
    write_text(folder / RUN_FILE, json.dumps(content, indent=1))


def keep_config(cfg: DictConfig | CfgNode, folder: str | Path) -> None:
    """Write ``config.yaml``, for people; nothing reads it back."""
    path = Path(folder, "config.yaml")
    if isinstance(cfg, CfgNode):
        path.write_text(cfg.dump())
    else:
        LazyConfig.save(cfg, str(path))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        logger.warning("There is no %s, so the config cannot be compared with the run's.", file)
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s), so the config is not compared.", file, error)
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
        logger.warning("%s holds no settings, so the config is not compared.", file)
        return {}
    return content


def _compare(
    before: Mapping[str, str] | None,
    now: Mapping[str, str],
    folder: Path,
    key: str,
    may_differ: Iterable[str],
    allow_changes: bool,
) -> None:
    if not before:
        return
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    may_differ = list(may_differ)
    harmless = [name for name in differing if any(fnmatchcase(name, p) for p in may_differ)]
    serious = [name for name in differing if name not in harmless]
    changes = {
        name: f"{name}: {before.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in differing
    }
    if harmless:
        logger.info(
            "Differs from the run so far, as it may: %s", "; ".join(changes[n] for n in harmless)
        )
    if not serious:
        return
    shown = "; ".join(changes[name] for name in serious[:_SHOWN])
    if len(serious) > _SHOWN:
        shown += f"; and {len(serious) - _SHOWN} more"
    if not allow_changes:
        raise InputError(
            f"{key} is '{folder}', which holds a run of other settings ({shown}); set another "
            f"{key}, give the run's own settings, or go on with these by --allow-changes."
        )
    logger.warning("Going on with other settings, as --allow-changes asks: %s", shown)


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
    if isinstance(value, list | tuple):  # a resumed run may get either for the same value
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str | int | float | bool | None):
        return str(value)
    if isinstance(value, Mapping):
        return "{}"
    name = getattr(value, "__qualname__", None)
    kind = value if name else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"
