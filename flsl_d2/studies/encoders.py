"""The encoders of a comparison: files, timm's models by name, and untrained ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import RANDOM, frozen_encoder
from flsl_d2.files import file_sha256
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX, parse_timm_name
from flsl_d2.studies.evaluations import EncoderFile, Evaluation
from flsl_d2.studies.identity import sha256_of, versions
from flsl_d2.studies.table import Subject
from flsl_d2.weights import build_encoder, write_encoder
from flsl_d2.weights.reading import local_weights_path, split_weights_path


@dataclass(frozen=True)
class ComparedEncoder:
    """One row of a comparison: a path or URL, ``timm:NAME``, or ``random``.

    ``architecture`` are arguments of ``FLSLViT`` or of ``timm.create_model``, ``sha256`` is empty
    for untrained encoders, and ``failure`` is the reason why it cannot be used.
    """

    name: str
    source: str
    architecture: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    failure: str = ""

    def file(self, seed: int, folder: Path) -> EncoderFile:
        """Return the weights to evaluate; those of an untrained FLSLViT are written first."""
        label = f"{self.name}, seed {seed}"
        if self.sha256:
            return EncoderFile(label, self.source, {"sha256": self.sha256}, seed=seed)
        identity = {"random": self.architecture, "seed": seed}
        if self.source != RANDOM:
            return EncoderFile(label, self.source, identity, seed=seed)
        digest = sha256_of([json.dumps(identity, sort_keys=True).encode()])
        path = folder / f"random-{digest[:12]}.pth"
        if not path.is_file():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                write_encoder(FLSLViT(**self.architecture), path)
        return EncoderFile(label, str(path), identity, seed=seed)

    def subject(
        self,
        labels: dict[str, str],
        evaluations: Sequence[Evaluation],
        seeds: Sequence[int],
        output: Path,
    ) -> Subject:
        """Make the row of a table, with the jobs of all evaluations and seeds."""
        files = [] if self.failure else [self.file(seed, output / "encoders") for seed in seeds]
        jobs = {e.name: [e.job(file) for file in files] for e in evaluations if files}
        about = {
            "source": self.source,
            "sha256": self.sha256,
            "architecture": json.dumps(self.architecture),
            "seeds": ",".join(map(str, seeds)),
            "folders": " ".join(dict.fromkeys(job.key for stage in jobs.values() for job in stage)),
            **versions(),
        }
        return Subject(labels, jobs, about, self.failure)


def read_encoders(weights: Sequence[tuple[str, str]]) -> list[ComparedEncoder]:
    """Read every file once; a file that cannot be used is a failure of its encoder.

    Args:
        weights: name (empty: that of the file) and source of each: a file, a URL, ``timm:NAME``, or
            ``random`` with the architecture of the first ``FLSLViT`` that can be read (without
            one, a ViT-S/16), or ``random:NAME`` with that of the file of this name.

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
    return [files.get(name) or _untrained(name, source, files) for name, source in pairs]


def _is_random(source: str) -> bool:
    return source == RANDOM or source.startswith(f"{RANDOM}:")


def _default_name(source: str) -> str:
    if source.startswith(TIMM_PREFIX):
        return source.removeprefix(TIMM_PREFIX).partition("?")[0]
    return source if _is_random(source) else Path(source).stem


def _read(name: str, source: str) -> ComparedEncoder:
    try:
        if source.startswith(TIMM_PREFIX):
            return _read_timm(name, source)
        path, which = split_weights_path(source)
        sha256 = file_sha256(local_weights_path(path)) + (f"?which={which}" if which else "")
        return ComparedEncoder(name, source, dict(build_encoder(source).architecture), sha256)
    except InputError as error:
        return ComparedEncoder(name, source, failure=str(error))


def _read_timm(name: str, source: str) -> ComparedEncoder:
    model, arguments = parse_timm_name(source)
    architecture = {"timm": model, **arguments}
    encoder = frozen_encoder(source)
    if arguments.get("pretrained") is False and not arguments.get("weights"):
        return ComparedEncoder(name, source, architecture)
    tensors = encoder.state_dict().items()
    sha256 = sha256_of(key.encode() + tensor.numpy().tobytes() for key, tensor in tensors)
    return ComparedEncoder(name, source, architecture, sha256)


def _untrained(name: str, source: str, files: dict[str, ComparedEncoder]) -> ComparedEncoder:
    model = source.partition(":")[2]
    own = {key: file for key, file in files.items() if not file.source.startswith(TIMM_PREFIX)}
    if model and model not in own:
        raise InputError(
            f"encoder {source!r} names no file of this comparison; choose from "
            f"{', '.join(own) or 'none, so write random'}."
        )
    if model and own[model].failure:
        return ComparedEncoder(name, RANDOM, failure=own[model].failure)
    candidates = [own[model]] if model else [file for file in own.values() if not file.failure]
    architecture = candidates[0].architecture if candidates else FLSLViT().architecture
    return ComparedEncoder(name, RANDOM, dict(architecture))
