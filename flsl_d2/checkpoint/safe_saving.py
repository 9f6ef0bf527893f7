"""Checkpoints that are whole or not there, and resuming from the newest whole one."""

from __future__ import annotations

import logging
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from flsl_d2.errors import InputError
from flsl_d2.files import UNFINISHED, replaced_file

__all__ = [
    "SafeCheckpointer",
    "checkpoint_damage",
    "checkpoint_files",
    "remove_unfinished",
]

logger = logging.getLogger(__name__)


def remove_unfinished(folder: str | Path) -> None:
    """Delete what a run that was killed in the middle of a checkpoint left behind."""
    for part in Path(folder).glob(f"*.pth{UNFINISHED}"):
        logger.info("Removing %s, whose writing was interrupted.", part)
        part.unlink(missing_ok=True)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """Checkpoints of a run, the one that ``last_checkpoint`` names first, then from the newest.

    Empty for a folder without any, and for the empty name.
    """
    if not folder:
        return []
    folder = Path(folder)
    found = sorted(folder.glob("model_*.pth"), key=lambda file: -file.stat().st_mtime_ns)
    with suppress(OSError, ValueError):
        tagged = folder / (folder / "last_checkpoint").read_text().strip()
        # A damaged tag may hold anything.
        if tagged.suffix == ".pth":
            found = [tagged, *(file for file in found if file != tagged)]
    return found


def checkpoint_damage(path: str | Path) -> str:
    """What is wrong with a file of ``torch.save``; empty for nothing.

    Compares the checksum of every tensor, which reading it does not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged files fail in every layer of the reader
        return " ".join(str(error).split()) or type(error).__name__
    return f"the checksum of {damaged} in it is wrong" if damaged else ""


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but a file is complete before it has its name.

    ``last_checkpoint`` is written the same way, after the file that it names. Resuming takes that
    file; where it is damaged or gone, the newest other checkpoint of the folder that is whole.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` and make it the last checkpoint.

        Raises:
            OSError: it cannot be written; the checkpoints before it are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            with replaced_file(path) as file:
                torch.save({"model": self.model.state_dict(), **states, **kwargs}, file)
        except RuntimeError as error:  # PyTorch's writer hides what the file said
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As Detectron2's, all or nothing."""
        with replaced_file(Path(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint, whole or not."""
        return bool(checkpoint_files(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint when resuming and there is one, else ``path``.

        Raises:
            InputError: there are checkpoints, and none can be read; or as of loading.
        """
        if resume and self.has_checkpoint():
            return self.load(self._newest_whole())
        return self.load(path, checkpointables=[])

    def _newest_whole(self) -> str:
        # One process decides for all: they must not resume from different steps.
        chosen, refused = self._choose() if comm.is_main_process() else ("", [])
        chosen, refused = comm.all_gather((chosen, refused))[0]
        if not chosen:
            raise InputError(
                f"no checkpoint in '{self.save_dir}' can be read ({'; '.join(refused)}); restore "
                "one from a copy, or start anew in another output folder."
            )
        return chosen

    def _choose(self) -> tuple[str, list[str]]:
        refused: list[str] = []
        for file in checkpoint_files(self.save_dir):
            damage = checkpoint_damage(file)
            if not damage:
                if refused:
                    logger.warning("Falling back to the checkpoint before: %s", file)
                return str(file), refused
            refused.append(f"{file.name}: {damage}")
            logger.warning("Checkpoint %s is damaged or gone (%s).", file, damage)
        return "", refused
