"""Detectron2's checkpointer with safe reading and without guessing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flsl_d2.checkpoint.encoder_weights import encoders_of, fit_encoder_in_detector, load_encoder
from flsl_d2.checkpoint.reading import local_weights_path, read_weights, split_weights_path
from flsl_d2.checkpoint.safe_saving import SafeCheckpointer
from flsl_d2.checkpoint.sources import KNOWN_LAYOUTS, find_encoder_weights
from flsl_d2.errors import InputError

__all__ = ["FLSLCheckpointer"]


class FLSLCheckpointer(SafeCheckpointer):
    """Loads encoders, detectors and whole runs; saves as :class:`SafeCheckpointer` does.

    A file that holds an encoder (``teacher_backbone.pth``, or a layout of
    :data:`flsl_d2.checkpoint.sources.SOURCES`) goes into every ``FLSLViT`` of the model by exact
    name, with one line that says how many weights matched. Any other file is a checkpoint of the
    model itself. Every file is read by :func:`flsl_d2.checkpoint.read_weights`. A path may end in
    ``?which=student`` to take that encoder of a file that holds a teacher, too.

    Attributes:
        loaded_encoder_only: whether the last file held an encoder and nothing else of the model.
    """

    loaded_encoder_only = False

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file; see the class.

        Args:
            path: file or URL; empty for none.

        Returns:
            What else the file holds.

        Raises:
            InputError: the file cannot be read, or its weights do not cover the encoder.
        """
        self._path, self._which = split_weights_path(path or "")
        if path:
            local_weights_path(path)
        try:
            return super().load(self._path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it set after an exception

    def save(self, name: str, **kwargs: Any) -> None:
        """As :class:`SafeCheckpointer`, with the architecture of the encoder in it as ``encoder``.

        Shapes alone do not tell it all: the number of attention heads changes none.
        """
        architectures = [encoder.architecture for _, encoder in encoders_of(self.model)]
        if architectures and all(each == architectures[0] for each in architectures):
            kwargs.setdefault("encoder", architectures[0])
        super().save(name, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = read_weights(filename)
        if filename.endswith(".pkl") and "__author__" not in content:
            # Detectron2 takes such files for Caffe2's and renames their weights.
            blobs = _tensors(content.get("blobs", content))
            blobs = {name: blobs[name] for name in blobs if not name.endswith("_momentum")}
            return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        model_names = set(self.model.state_dict())
        encoders = encoders_of(self.model)
        nested = content.get("model")
        state = _tensors(nested if isinstance(nested, dict) else content)
        weights = find_encoder_weights(content, self._which) if encoders else None
        # A checkpoint of the model has names outside the encoder, or the encoder's full names.
        if weights is not None and not _is_of_model(state, model_names, encoders[0][0]):
            return {"model": {}, "_encoder": weights}
        if state and model_names.isdisjoint(state) and not content.get("matching_heuristics"):
            raise InputError(
                f"none of the weights in {self._path!r} ({next(iter(state))}, ...) has a name of "
                f"this model; known layouts of encoder files are {KNOWN_LAYOUTS}."
            )
        return {**content, "model": state} if isinstance(nested, dict) else {"model": state}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        weights = checkpoint.pop("_encoder", None)
        self.loaded_encoder_only = weights is not None
        if weights is None:
            for prefix, encoder in encoders_of(self.model):
                fit_encoder_in_detector(encoder, checkpoint["model"], prefix, self._path)
            return super()._load_model(checkpoint)
        checkpoint.pop("model")
        for _, encoder in encoders_of(self.model):
            load_encoder(encoder, weights, self._path)
        return None  # the rest of the model starts as it is, which is nothing to warn of


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        str(name).removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _is_of_model(state: dict[str, Tensor], model_names: set[str], prefix: str) -> bool:
    if not prefix:  # the model is a bare encoder: its own names are an encoder's names
        return False
    return any(name in model_names for name in state if name.startswith(prefix))
