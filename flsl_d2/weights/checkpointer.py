"""Detectron2's checkpointer with safe reading and without guessing."""

from __future__ import annotations

import logging
import platform
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor

from flsl_d2.agreement import checked_by_all, decided_by_main
from flsl_d2.errors import InputError
from flsl_d2.files import UNFINISHED, replaced_file
from flsl_d2.modeling.encoder_state import LoadReport, check_values, fit_encoder_state, listed
from flsl_d2.weights.encoder_weights import find_encoder_weights, unknown_layout
from flsl_d2.weights.loading import encoders_of, load_encoder
from flsl_d2.weights.reading import local_weights_path, read_weights, split_weights_path
from flsl_d2.weights.weight_sets import plain_name, tensor_dicts

logger = logging.getLogger(__name__)

BEST_WEIGHTS = "model_best.pth"


def remove_unfinished(folder: str | Path) -> None:
    """Delete what :func:`~flsl_d2.files.replaced_file` left of a run that was killed meanwhile."""
    for part in Path(folder).glob(f"*.{'[0-9a-f]' * 8}{UNFINISHED}"):
        logger.info("Removing %s, whose writing was interrupted.", part)
        part.unlink(missing_ok=True)


def checkpoint_files(folder: str | Path) -> list[Path]:
    """List the checkpoints of a run: the one that ``last_checkpoint`` names, then the newest first.

    :data:`BEST_WEIGHTS` is none: a run cannot go on from it. The empty name has none.
    """
    if not folder:
        return []
    folder = Path(folder)
    found = [file for file in folder.glob("model_*.pth") if file.name != BEST_WEIGHTS]
    found.sort(key=lambda file: -file.stat().st_mtime_ns)
    with suppress(OSError, ValueError):
        tagged = folder / (folder / "last_checkpoint").read_text().strip()
        # A damaged tag may hold anything.
        if tagged.suffix == ".pth":
            found = [tagged, *(file for file in found if file != tagged)]
    return found


def checkpoint_damage(path: str | Path) -> str:
    """Say what is wrong with a file of ``torch.save`` by all its checksums; empty for nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged files fail in every layer of the reader
        return " ".join(str(error).split()) or type(error).__name__
    return f"the checksum of {damaged} in it is wrong" if damaged else ""


def copy_to_cpu(value: Any) -> Any:
    """Copy nested dicts, lists and tuples; their tensors are copied to the CPU's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(each) for each in value)
    return value


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that a file is complete before it has its name.

    ``last_checkpoint`` is written the same way, after the file that it names. Resuming takes that
    file; where it is damaged or gone, the newest other checkpoint of the folder that is whole.

    Attributes:
        tag_saved: whether a file that is saved becomes the last checkpoint.
    """

    tag_saved = True

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, and make it the last checkpoint if ``tag_saved``.

        Raises:
            OSError: the file cannot be written; the checkpoints before it are untouched.
        """
        if self.save_dir and self.save_to_disk:
            self.write(name, self.content(**kwargs))

    def content(self, **kwargs: Any) -> dict[str, Any]:
        """Return what a checkpoint of this moment holds; the tensors are those of the run."""
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        return {"model": self.model.state_dict(), **states, **kwargs}

    def snapshot(self, **kwargs: Any) -> dict[str, Any]:
        """Return a copy of :meth:`content` in the CPU's memory, which training does not change."""
        return copy_to_cpu(self.content(**kwargs))

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write what :meth:`content` returned; see :meth:`save`."""
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        try:
            with replaced_file(path) as file:
                torch.save(content, file)
        except RuntimeError as error:  # PyTorch's writer hides what the file said
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None
        if self.tag_saved:
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint, all or nothing."""
        with replaced_file(Path(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        """Tell whether the main process sees a checkpoint in the folder, whole or not."""
        return decided_by_main(lambda: bool(checkpoint_files(self.save_dir)))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint when resuming and there is one, else ``path``.

        Raises:
            InputError: there are checkpoints, and none can be read; or loading fails.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        # One process decides for all: they must not resume from different steps.
        chosen, refused = decided_by_main(self._choose)
        if not chosen:
            raise InputError(
                f"no checkpoint in '{self.save_dir}' can be read ({'; '.join(refused)}); restore "
                "one from a copy, or start anew in another output folder."
            )
        checked_by_all(lambda: _check_readable(chosen))
        return self.load(chosen)

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


def _check_readable(path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise InputError(
            f"rank {comm.get_rank()} on {platform.node()} cannot read '{path}' ({error.strerror}), "
            "from which rank 0 resumes; give an output folder that all machines share."
        ) from None


class FLSLCheckpointer(SafeCheckpointer):
    """Loads encoders, detectors and whole runs; saves as :class:`SafeCheckpointer` does.

    A file that holds an encoder (:data:`flsl_d2.weights.sources.SOURCES`) goes into every
    ``FLSLViT`` of the model by exact name. Any other file is a checkpoint of the model itself.
    A path may end in ``?which=NAME`` to take one of several sets of encoder weights in a file.

    Attributes:
        require_whole: refuse encoders, and checkpoints that do not cover the whole model, as
            evaluation and prediction must.
    """

    require_whole = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or URL as the class describes; return the rest of its content.

        Raises:
            InputError: the file cannot be read, or its weights do not cover the encoder (with
                ``require_whole``, the model).
        """
        self._path, self._which = split_weights_path(path or "")
        # Folders stand for a file in them, and Detectron2 asks for files alone.
        local = local_weights_path(path) if path else ""
        try:
            return super().load(local if Path(self._path).is_dir() else self._path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an exception

    def content(self, **kwargs: Any) -> dict[str, Any]:
        """Add the encoder's architecture as ``encoder``, and the pixels that it takes as ``input``.

        Shapes alone do not tell it all: the number of attention heads changes none.
        """
        encoders = [encoder for _, encoder in encoders_of(self.model)]
        if encoders and all(each.architecture == encoders[0].architecture for each in encoders):
            kwargs.setdefault("encoder", encoders[0].architecture)
            kwargs.setdefault("input", encoders[0].input_format.as_dict())
        return super().content(**kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_weights(filename)
        if "blobs" in content or "conv1_w" in content:  # Caffe2's, whose weights have other names
            found = content.get("blobs", content).items()
            blobs = {n: t for n, t in found if isinstance(t, Tensor) and n[-9:] != "_momentum"}
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        encoders = encoders_of(self.model)
        prefix = encoders[0][0] if encoders else ""
        state = self._state_of_model(content, prefix) if prefix or not encoders else None
        if state is not None:
            return {**content, "model": state}
        if encoders:
            given = {} if encoders[0][1].architecture["final_norm"] else {"final_norm": False}
            weights = find_encoder_weights(content, self._which, self._path, filename, given)
            if weights is not None:
                return {"model": {}, "_encoder": weights}
        if content.get("matching_heuristics"):
            return content
        raise InputError(unknown_layout(content, self._path))

    def _state_of_model(self, content: dict[str, Any], prefix: str) -> dict[str, Tensor] | None:
        """Find the model's own tensors by its names, in any container and behind any common prefix.

        Frameworks write a model as ``state_dict``, with ``model.`` before each name. ``prefix``
        is the beginning of the names of the model's encoder; empty for a model without.
        """
        own = set(self.model.state_dict())
        anchor = f"{prefix}patch_embed.proj.weight" if prefix else next(iter(own), "")
        found = []
        for containers, tensors in tensor_dicts(content):
            plain = {plain_name(name): tensor for name, tensor in tensors.items()}
            for before in [n[: -len(anchor)] for n in plain if f".{n}".endswith(f".{anchor}")]:
                state = {n[len(before) :]: t for n, t in plain.items() if n.startswith(before)}
                found.append((containers, state))
        if self._which and found:
            found = [
                (containers, state) for containers, state in found if self._which in containers
            ]
            if not found:
                raise InputError(
                    f"weights {self._path!r} hold no set of this model's weights {self._which!r}; "
                    f"leave which={self._which} out to take the one that they have."
                )
        whole = [state for containers, state in found if containers in ((), ("model",))]
        return next(iter([*whole, *(state for _, state in found)]), None)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint.pop("_encoder", None)
        if weights is not None and self.require_whole:
            raise InputError(
                f"weights {self._path!r} hold an encoder and no detector, so there is nothing to "
                "evaluate or predict with; train a detector from them first."
            )
        if weights is not None:
            checkpoint.pop("model")
            for _, encoder in encoders_of(self.model):
                load_encoder(encoder, weights)
            return None  # Detectron2 would warn of the rest of the model, which starts as it is.
        new = []
        for prefix, encoder in encoders_of(self.model):
            report = LoadReport(self._path, "detector")
            fit_encoder_state(encoder, checkpoint["model"], prefix, report)
            for note in report.resampled:
                logger.info("encoder weights: %s.", note)
            new += [prefix + name for name in report.new]
        own = self.model.state_dict()
        for name, tensor in checkpoint["model"].items():
            if name in own and isinstance(tensor, Tensor) and tensor.is_floating_point():
                check_values(tensor, name, LoadReport(self._path))
        result = super()._load_model(checkpoint)
        if self.require_whole and result is not None:
            shapes = (name for name, *_ in result.incorrect_shapes)
            if missing := [*result.missing_keys, *shapes, *new]:
                raise InputError(
                    f"weights {self._path!r} cover {len(own) - len(missing)} of the model's "
                    f"{len(own)} tensors; missing or of another shape are {listed(missing)}. "
                    "Evaluate with the config that the checkpoint was trained with."
                )
        return result
