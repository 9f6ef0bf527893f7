"""Jobs: commands that are identified by all that their results depend on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import detectron2
import timm
import torch
from omegaconf import DictConfig

import flsl_d2
from flsl_d2.engine.gpus import usable_cores
from flsl_d2.engine.run_folder import flat_config
from flsl_d2.errors import InputError
from flsl_d2.files import write_text


@cache
def versions() -> dict[str, str]:
    """Return the versions of the software that computes the numbers.

    The commit is among them in a git checkout only; ``+changes`` behind it says that files differ
    from it.
    """
    packages = (flsl_d2, torch, detectron2, timm)
    found = {package.__name__: str(package.__version__) for package in packages}
    root = Path(flsl_d2.__file__).parents[1]
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    # The repository around an installed package is someone else's.
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                describe, cwd=root, capture_output=True, text=True, timeout=10, check=True
            )
            found["commit"] = done.stdout.strip()
    return found


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Slot:
    """Share of the machine for one job.

    Attributes:
        environment: variables that keep the job to its share.
        num_processes: ``--num-gpus`` of the job's command.
    """

    environment: dict[str, str]
    num_processes: int = 1


def make_slots(device: str, num_gpus: int = 1, gpus_per_job: int = 1) -> list[Slot]:
    """Share the machine among jobs.

    Args:
        device: ``cuda`` or ``cpu``.
        num_gpus: number of GPUs to use, of those in CUDA_VISIBLE_DEVICES; on the CPU, processes.
        gpus_per_job: number of GPUs of each job.

    Raises:
        InputError: counts or a device that this machine does not have.
    """
    if gpus_per_job < 1 or num_gpus < gpus_per_job:
        raise InputError(
            f"{num_gpus} GPUs with {gpus_per_job} for each job leave no job any; "
            "give --num-gpus of at least --gpus-per-job."
        )
    count = num_gpus // gpus_per_job
    if not device.startswith("cuda"):
        environment = {}
        if num_gpus > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Otherwise every process takes all cores, and they wait for one another.
            environment["OMP_NUM_THREADS"] = str(max(usable_cores() // num_gpus, 1))
        return [Slot(environment, gpus_per_job)] * count
    available = torch.cuda.device_count()
    if available < num_gpus:
        raise InputError(
            f"the jobs are for {num_gpus} GPU(s), but PyTorch sees {available} here; ask for "
            "fewer, check CUDA_VISIBLE_DEVICES, or compute on the CPU (sweep: train.device=cpu, "
            "compare: --device cpu)."
        )
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",") if listed else [str(i) for i in range(available)]
    shares = [names[i * gpus_per_job : (i + 1) * gpus_per_job] for i in range(count)]
    return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(share)}, gpus_per_job) for share in shares]


@dataclass(frozen=True)
class Outcome:
    """Measurements of a job.

    Attributes:
        values: number of each measure.
        failures: reason for each measure that could not be computed.
        omitted: reason for each measure that has no meaning for the encoder.
    """

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A command that is run once.

    Attributes:
        kind: name of the work; starts the name of the job's folder.
        label: description of the job among those of its kind, for people.
        settings: all that the result depends on, as JSON values. Jobs of equal kind and settings
            are the same job, in this run of the tool and in later ones.
        command: function that returns the arguments after ``python``, from the job's folder and
            the number of processes that it may use.
        outcome: function that reads the measurements from the job's folder.
        needs: job that has to be done first.
    """

    kind: str
    label: str
    settings: Mapping[str, Any]
    command: Callable[[Path, int], list[str]] = field(compare=False)
    outcome: Callable[[Path], Outcome] = field(compare=False)
    needs: Job | None = None

    @property
    def key(self) -> str:
        """Name of the job's folder: its kind and a hash of its settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.kind.replace(' ', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Record:
    """State of a job that was started; ``result.json`` in its folder.

    Attributes:
        status: ``done``, ``failed``, or ``interrupted``.
        outcome: measurements; empty unless done or partly failed.
        error: reason of the failure, in a sentence; empty otherwise.
        seconds: duration of all attempts together.
        about: versions of the software of the last attempt.
    """

    status: str
    outcome: Outcome = field(default_factory=Outcome)
    error: str = ""
    seconds: float = 0.0
    about: dict[str, str] = field(default_factory=dict)


def read_record(folder: Path) -> Record | None:
    """Read the record in a job's folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / "result.json").read_text())
        outcome = Outcome(content["values"], content["failures"], content.get("omitted", {}))
        known = {key: content[key] for key in ("status", "error", "seconds", "about")}
        return Record(outcome=outcome, **known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, job: Job, record: Record) -> None:
    """Write ``result.json``: the record with the job's label and settings."""
    content = asdict(record)
    content |= content.pop("outcome") | {"label": job.label, "settings": dict(job.settings)}
    write_text(folder / "result.json", json.dumps(content, indent=1) + "\n")


def result_settings(cfg: DictConfig, without: Iterable[str]) -> dict[str, str]:
    """Return the values of a config that a result depends on, for :attr:`Job.settings`.

    Args:
        without: patterns (``fnmatch``) of keys that do not change the result.
    """
    patterns = tuple(without)
    return {
        key: value
        for key, value in flat_config(cfg).items()
        if not any(fnmatchcase(key, pattern) for pattern in patterns)
    }
