"""A job is one command of a tool, identified by what its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flsl_d2.files import write_text

__all__ = [
    "Job",
    "Outcome",
    "Record",
    "config_settings",
    "read_record",
    "write_record",
]


@dataclass(frozen=True)
class Outcome:
    """What a job measured.

    Attributes:
        values: number by measure.
        failures: reason by measure, for those that could not be computed.
    """

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One command, run once.

    Attributes:
        kind: what it does in one word; starts the name of its folder.
        label: which of its kind, for people.
        settings: all that the result depends on, as JSON values. Jobs of equal kind and settings
            are the same job, in this run of the tool and in later ones.
        command: gives the arguments after ``python``, from the job's folder and the number of
            processes that it may use.
        outcome: reads the measures, and the reasons of those that failed, off the folder.
        needs: a job that has to be done first.
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
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Record:
    """What is known of a job that was started; ``result.json`` in its folder.

    Attributes:
        status: ``done``, ``failed``, or ``interrupted``.
        outcome: the measures; empty unless done or partly failed.
        error: why it failed, in a sentence; empty otherwise.
        seconds: it ran, all attempts together.
        about: versions of the software of the last attempt.
    """

    status: str
    outcome: Outcome = field(default_factory=Outcome)
    error: str = ""
    seconds: float = 0.0
    about: dict[str, str] = field(default_factory=dict)


def read_record(folder: Path) -> Record | None:
    """The record in a job's folder; None where there is none that can be read."""
    try:
        content = json.loads((folder / "result.json").read_text())
        outcome = Outcome(content["values"], content["failures"])
        known = {key: content[key] for key in ("status", "error", "seconds", "about")}
        return Record(outcome=outcome, **known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, job: Job, record: Record) -> None:
    """Write ``result.json``: the record with the job's label and settings."""
    content = asdict(record)
    content |= content.pop("outcome") | {"label": job.label, "settings": dict(job.settings)}
    write_text(folder / "result.json", json.dumps(content, indent=1) + "\n")


def config_settings(cfg: DictConfig, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A LazyConfig as JSON values, for :attr:`Job.settings`.

    Args:
        cfg: any; classes and functions become their names.
        without: dotted keys that do not change a result, such as where it is written.
    """
    container = OmegaConf.to_container(cfg, resolve=False)
    for key in without:
        *groups, last = key.split(".")
        node = container
        for name in groups:
            node = node.get(name, {})
        node.pop(last, None)
    return json.loads(json.dumps(container, default=_name))


def _name(value: Any) -> str:
    """A class or function by its name, anything else as it prints."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(value)
