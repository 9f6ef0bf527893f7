"""Running a list of jobs that can be interrupted at any time and continued."""

from __future__ import annotations

import datetime
import fcntl
import math
import os
import re
import shlex
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder
from flsl_d2.studies.cluster import Cluster
from flsl_d2.studies.identity import versions
from flsl_d2.studies.jobs import Job, Record, read_record, write_record
from flsl_d2.studies.machine import Machine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ERROR_CHARS, _PROGRESS_CHARS = 600, 140
_ETA = re.compile(r"\beta\b:? |\d+%\|", re.IGNORECASE)  # a logged line, or tqdm's bar
_POLL_SECONDS, _PROGRESS_SECONDS = 0.1, 30.0

_log = partial(print, flush=True)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep other runs out of the folder.

    The jobs' processes inherit the lock, so it holds while one of them lives, even if this process
    was killed.
    """
    with (writable_folder(folder) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process, or a job that one left behind, works in '{folder}'; wait for "
                "it, end it, or name another --output."
            ) from error
        yield file.fileno()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Turn SIGTERM, and a SIGINT that a shell has set to be ignored, into KeyboardInterrupt."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Child:
    """A job that runs; its output goes to ``console.txt`` in its folder."""

    def __init__(self, job: Job, folder: Path, place: Machine | Cluster, lock: int) -> None:
        self.job, self.folder, self.log = job, folder, folder / "console.txt"
        self.started, self.is_late, self._log_start = time.monotonic(), False, 0
        if isinstance(place, Cluster) and (attached := place.attach(folder)):
            self.process: Any = attached
            return
        folder.mkdir(parents=True, exist_ok=True)
        arguments = job.command(folder, place.num_processes)
        with self.log.open("a") as log:
            log.write(f"$ python {shlex.join(arguments)}\n")
            log.flush()
            self._log_start = log.tell()
            self.process = place.start(arguments, folder, log, lock)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stop(self) -> None:
        self.process.ask_to_stop()
        self.process.wait_for_end()

    def progress(self) -> str:
        """Return the last progress that it printed; empty if none."""
        found = [line[match.start() :] for line in self._lines() if (match := _ETA.search(line))]
        return found[-1][:_PROGRESS_CHARS] if found else ""

    def failure_reason(self) -> str:
        """Return the error that the process printed, or its last line and exit status."""
        lines = self._lines()
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if starts:
            return " ".join(lines[starts[-1] :]).removeprefix("error: ")[:_ERROR_CHARS]
        status = self.process.status() or 0
        end = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return (f"{lines[-1]} ({end})" if lines else end)[:_ERROR_CHARS]

    def _lines(self) -> list[str]:
        """Return the last lines that this process printed, without empty ones."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - 20_000))
            text = log.read().decode(errors="replace")
        # A progress bar returns to the start of its line at every update.
        return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    place: Machine | Cluster,
    on_end: Callable[[dict[str, Record]], object] = lambda records: None,
) -> dict[str, Record]:
    """Run the jobs that are not done yet; a job that fails does not stop the others.

    Each job has the folder ``folder/jobs/KEY`` with ``result.json`` and ``console.txt``. Jobs that
    are done are not run again; those that failed or were interrupted are.

    Args:
        jobs: jobs in the order of their start, each after the one that it needs.
        place: where they run.
        on_end: function that is called with the records so far whenever a job has ended.

    Raises:
        InputError: another process works in the folder, or it cannot be written.
        KeyboardInterrupt: after SIGINT or SIGTERM; the running jobs have been stopped and noted.
    """
    unique = list({job.key: job for job in jobs}.values())
    with locked(folder) as lock, signals_interrupt():
        run = _Run(unique, folder / "jobs", place, lock, on_end)
        try:
            run.work()
        except KeyboardInterrupt:
            run.stop()
            raise
        return run.records


class _Run:
    """State of a list of jobs while they run."""

    def __init__(
        self,
        jobs: list[Job],
        folder: Path,
        place: Machine | Cluster,
        lock: int,
        on_end: Callable[[dict[str, Record]], object],
    ) -> None:
        self.folder, self.place, self.lock, self.on_end = folder, place, lock, on_end
        found = {job.key: record for job in jobs if (record := read_record(folder / job.key))}
        self.records = {key: record for key, record in found.items() if record.status == "done"}
        self.earlier_seconds = {key: r.seconds for key, r in found.items() if r.status != "done"}
        self.waiting = [job for job in jobs if job.key not in self.records]
        self.running: list[_Child] = []
        self.numbers = {job.key: f"[{i}/{len(jobs)}]" for i, job in enumerate(jobs, start=1)}
        self.seconds_by_kind: defaultdict[str, list[float]] = defaultdict(list)
        for job in jobs:
            if job.key in self.records:
                self.seconds_by_kind[job.kind].append(self.records[job.key].seconds)
        if self.records:
            _log(f"{len(self.records)} of {len(jobs)} jobs are done already")

    def work(self) -> None:
        last_report_time = time.monotonic()
        while self.waiting or self.running:
            self._start_what_can()
            self._collect()
            if time.monotonic() - last_report_time > _PROGRESS_SECONDS:
                last_report_time = time.monotonic()
                for child in self.running:
                    if message := f"{child.progress()}{self._eta()}".strip():
                        _log(f"{self.numbers[child.job.key]} {message}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        for number in _SIGNALS:  # an impatient second Ctrl-C would leave processes behind
            signal.signal(number, signal.SIG_IGN)
        _log(f"\nstopping {len(self.running)} running; the same command goes on from there")
        for child in self.running:
            child.process.ask_to_stop()
        for child in self.running:
            child.process.wait_for_end()
            self._write(child, Record("interrupted"))

    def _start_what_can(self) -> None:
        for job in list(self.waiting):
            needed = self.records.get(job.needs.key) if job.needs else None
            if job.needs and needed is None:
                continue  # the needed job runs or waits
            if job.needs and needed and needed.status != "done":
                self.waiting.remove(job)
                # The record is not written, because the job was not tried.
                reason = f"not run, because its {job.needs.kind} failed: {needed.error}"
                self.records[job.key] = Record("failed", error=reason)
            elif self.place.has_room():
                _log(f"{self.numbers[job.key]} {job.kind}: {job.label}{self._eta()}")
                self.waiting.remove(job)
                folder = self.folder / job.key
                try:
                    self.running.append(_Child(job, folder, self.place, self.lock))
                except InputError as error:  # a file that the command is made from is unusable
                    record = Record("failed", error=str(error), about=versions())
                    self.records[job.key] = record
                    write_record(folder, job, record)
                    _log(f"{self.numbers[job.key]} failed: {error}")

    def _collect(self) -> None:
        for child in self.running:
            if child.seconds > (child.job.limit or math.inf) and not child.is_late:
                child.is_late = True
                child.stop()
        for child in [child for child in self.running if child.process.status() is not None]:
            job, record = child.job, self._record_of(child)
            self.running.remove(child)
            self.records[job.key] = self._write(child, record)
            self.seconds_by_kind[job.kind].append(child.seconds)
            reason = f" {record.error}; see {child.log}" if record.error else ""
            _log(f"{self.numbers[job.key]} {record.status} in {_clock(child.seconds)}{reason}")
            self.on_end(self.records)

    def _record_of(self, child: _Child) -> Record:
        """Read the results of a process that has ended; even a failed one may leave some."""
        status = child.process.status()
        if child.is_late:
            return Record("failed", error=f"stopped after its limit of {child.job.limit:g} s")
        try:
            outcome = child.job.outcome(child.folder)
        except (InputError, OSError, ValueError, KeyError, TypeError) as error:
            unreadable = f"its results cannot be read: {error}"
            return Record("failed", error=child.failure_reason() if status else unreadable)
        if outcome.failures:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in outcome.failures.items())
            return Record("failed", outcome, reasons)
        if status:
            return Record("failed", error=child.failure_reason())
        return Record("done", outcome)

    def _write(self, child: _Child, record: Record) -> Record:
        seconds = self.earlier_seconds.get(child.job.key, 0.0) + child.seconds
        record = replace(record, seconds=round(seconds, 1), about=versions())
        write_record(child.folder, child.job, record)
        return record

    def _eta(self) -> str:
        """Return the remaining time, estimated from ended jobs of the same kinds, or nothing."""
        left = [*self.waiting, *(child.job for child in self.running)]
        if not left or any(job.kind not in self.seconds_by_kind for job in left):
            return ""
        seconds = sum(mean(self.seconds_by_kind[job.kind]) for job in left)
        seconds -= sum(child.seconds for child in self.running)
        return f"  (ETA of all {_clock(max(seconds, 0.0) / self.place.width)})"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
