"""The encoders of a comparison: named files, and untrained ones of the same architecture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flsl_d2.errors import InputError
from flsl_d2.experiments.evaluations import EncoderFile
from flsl_d2.experiments.jobs import file_sha256
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import build_encoder
from flsl_d2.weights.export import write_encoder
from flsl_d2.weights.reading import local_weights_path, split_weights_path

__all__ = ["ComparedEncoder", "read_encoders"]


@dataclass(frozen=True)
class ComparedEncoder:
    """One row of a comparison.

    Attributes:
        name: name of the row.
        source: path or URL; ``random`` for an untrained encoder.
        architecture: arguments of ``FLSLViT``.
        sha256: checksum of the file; empty for an untrained encoder.
        failure: reason why it cannot be used; empty if it can.
    """

    name: str
    source: str
    architecture: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    failure: str = ""

    def file(self, seed: int, folder: Path) -> EncoderFile:
        """Return the weight file to evaluate; that of an untrained encoder is written first."""
        label = f"{self.name}, seed {seed}"
        if self.source != "random":
            return EncoderFile(label, self.source, {"sha256": self.sha256}, seed=seed)
        identity = {"random": self.architecture, "seed": seed}
        text = json.dumps(identity, sort_keys=True)
        path = folder / f"random-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pth"
        if not path.is_file():
            _write_untrained(self.architecture, seed, path)
        return EncoderFile(label, str(path), identity, seed=seed)


def read_encoders(weights: Sequence[tuple[str, str]]) -> list[ComparedEncoder]:
    """Read every file once; a file that cannot be used is a failure of its encoder.

    Args:
        weights: name and source of each; an empty name stands for that of the file. A source is a
            file, a URL, ``random`` or ``random:NAME``. An untrained encoder has the architecture
            of the first file that can be read, or of the file of that name; without a file, it is
            a ViT-S/16.

    Raises:
        InputError: no encoders, two of one name, or an architecture of an unknown name.
    """
    if not weights:
        raise InputError("there is no encoder to evaluate; give --weights NAME=FILE or random.")
    pairs = [(name or _default_name(source), source) for name, source in weights]
    names = [name for name, _ in pairs]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise InputError(f"two encoders are called {repeated[0]!r}; give each a name: NAME=FILE.")
    files = {name: _read(name, source) for name, source in pairs if not _is_random(source)}
    return [
        files[name] if name in files else _untrained(name, source, files) for name, source in pairs
    ]


def _is_random(source: str) -> bool:
    return source == "random" or source.startswith("random:")


def _default_name(source: str) -> str:
    return source if _is_random(source) else Path(source).stem


def _read(name: str, source: str) -> ComparedEncoder:
    try:
        path, which = split_weights_path(source)
        sha256 = file_sha256(local_weights_path(path)) + (f"?which={which}" if which else "")
        return ComparedEncoder(name, source, dict(build_encoder(source).architecture), sha256)
    except InputError as error:
        return ComparedEncoder(name, source, failure=str(error))


def _untrained(name: str, source: str, files: dict[str, ComparedEncoder]) -> ComparedEncoder:
    model = source.partition(":")[2]
    if model and model not in files:
        raise InputError(
            f"encoder {source!r} names no file of this comparison; choose from "
            f"{', '.join(files) or 'none, so write random'}."
        )
    if model and files[model].failure:
        return ComparedEncoder(name, "random", failure=files[model].failure)
    candidates = [files[model]] if model else [file for file in files.values() if not file.failure]
    architecture = candidates[0].architecture if candidates else FLSLViT().architecture
    return ComparedEncoder(name, "random", dict(architecture))


def _write_untrained(architecture: dict[str, Any], seed: int, path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = FLSLViT(**architecture)
    write_encoder(encoder, path)
