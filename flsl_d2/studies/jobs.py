"""Jobs: commands that are identified by all that their results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flsl_d2.files import write_text


@dataclass(frozen=True)
class Outcome:
    """Measurements of a job, with reasons of those that failed or have no meaning (``omitted``)."""

    values: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A command that is run once.

    Attributes:
        kind: name of the work; starts the name of the job's folder.
        label: description of the job among those of its kind, for people.
        settings: all that the result depends on, as JSON values: contents, not paths. Jobs of
            equal kind and settings are the same job, in this run of the tool and in later ones.
        command: arguments after ``python``, from the job's folder and its number of processes.
        outcome: function that reads the measurements from the job's folder.
        needs: job that has to be done first.
        limit: seconds after which the job is stopped and has failed; None for no limit.
    """

    kind: str
    label: str
    settings: Mapping[str, Any]
    command: Callable[[Path, int], list[str]] = field(compare=False)
    outcome: Callable[[Path], Outcome] = field(compare=False)
    needs: Job | None = None
    limit: float | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Name of the job's folder: its kind and a hash of its settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.kind.replace(' ', '_')}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Record:
    """State of a job that was started; ``result.json`` in its folder.

    ``status`` is ``done``, ``failed`` (``error`` is the reason) or ``interrupted``, ``seconds`` the
    duration of all attempts, and ``about`` has the versions of the software of the last one.
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
        outcome = Outcome(*(content[key] for key in ("values", "failures", "omitted")))
        known = {key: content[key] for key in ("status", "error", "seconds", "about")}
        return Record(outcome=outcome, **known)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, job: Job, record: Record) -> None:
    """Write ``result.json``: the record with the job's label and settings."""
    content = asdict(record)
    content |= content.pop("outcome") | {"label": job.label, "settings": dict(job.settings)}
    write_text(folder / "result.json", json.dumps(content, indent=1) + "\n")
