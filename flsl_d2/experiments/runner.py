"""Running a list of jobs, so that it can be interrupted at any time and goes on where it was."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean

from flsl_d2.errors import InputError
from flsl_d2.experiments.jobs import Job, Record, Slot, read_record, versions, write_record
from flsl_d2.files import writable_folder

__all__ = [
    "SIGNALS",
    "Child",
    "locked",
    "run_jobs",
    "signals_interrupt",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keep other runs out of the folder.

    The jobs' processes inherit the lock: it holds while one of them lives, even where this process
    was killed and they were not.
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
    """SIGTERM, as cluster schedulers send it, is like Ctrl-C; both work in the background, too."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before: list[tuple[int, Callable | int | None]] = [
        (number, signal.signal(number, interrupt)) for number in SIGNALS
    ]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


# How long a process gets to end by itself, in seconds: training finishes its step and writes a
# checkpoint.
_PATIENCE = 120.0
_ERROR_CHARS = 600
_PROGRESS_CHARS = 140
_ETA = re.compile(r"\beta\b:? |\d+%\|", re.IGNORECASE)  # a logged line, or tqdm's bar


class Child:
    """The process of a job.

    Args:
        job: what to run.
        folder: of the job; everything that the process prints goes to ``console.txt`` in it.
        slot: where it runs.
        keep_open: file descriptors that it inherits.
    """

    def __init__(self, job: Job, folder: Path, slot: Slot, keep_open: tuple[int, ...] = ()) -> None:
        self.job, self.folder, self.slot = job, folder, slot
        self.started = time.monotonic()
        self.log = folder / "console.txt"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *job.command(folder, slot.num_processes)]
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            self._own_part = log.tell()
            log.flush()
            # A session of its own, so that Ctrl-C reaches it through ask_to_stop() alone, once.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **slot.environment},
                start_new_session=True,
                pass_fds=keep_open,
            )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Send SIGTERM to it and all that it started."""
        self._send(signal.SIGTERM)

    def wait_for_end(self) -> None:
        """After :meth:`ask_to_stop`: until it has ended, by force if it takes minutes."""
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def progress(self) -> str:
        """The start of the last line of progress that it printed; empty if none."""
        lines = [line for line in self._lines() if _ETA.search(line)]
        return lines[-1][_ETA.search(lines[-1]).start() :][:_PROGRESS_CHARS] if lines else ""

    def last_words(self) -> str:
        """Why it failed, from what it printed: the tool's own sentence, or the last line."""
        lines = self._lines()
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if starts:
            words = " ".join(lines[starts[-1] :]).removeprefix("error: ")
        else:
            status = self._process.returncode
            killed = f"ended by signal {-status}" if (status or 0) < 0 else f"exit status {status}"
            words = f"{lines[-1]} ({killed})" if lines else killed
        return words[:_ERROR_CHARS]

    def _lines(self) -> list[str]:
        """The end of what this process printed, without empty lines."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._own_part, size - 20_000))
            text = log.read().decode(errors="replace")
        # A progress bar returns to the start of its line for every update.
        return [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]


_POLL_SECONDS = 0.1
_PROGRESS_SECONDS = 30.0


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    slots: Sequence[Slot],
    on_end: Callable[[dict[str, Record]], None] = lambda records: None,
) -> dict[str, Record]:
    """Run what has not been done yet; a job that fails does not stop the others.

    Each job has ``folder/jobs/KEY`` with ``result.json`` and ``console.txt``. Jobs whose record
    says done are not run again; those that failed or were interrupted are.

    Args:
        jobs: in the order of their start, each after the one that it needs.
        folder: of all of them.
        slots: how many run at a time, and where.
        on_end: called with the records so far whenever a job has ended.

    Returns:
        The record of every job by its key.

    Raises:
        InputError: another process works in the folder, or it cannot be written.
        KeyboardInterrupt: after SIGINT or SIGTERM; the jobs that ran have been stopped and noted.
    """
    unique = list({job.key: job for job in jobs}.values())
    with locked(folder) as lock, signals_interrupt():
        run = _Run(unique, folder / "jobs", slots, lock, on_end)
        try:
            run.work()
        except KeyboardInterrupt:
            run.stop()
            raise
        return run.records


class _Run:
    def __init__(
        self,
        jobs: list[Job],
        folder: Path,
        slots: Sequence[Slot],
        lock: int,
        on_end: Callable[[dict[str, Record]], None],
    ) -> None:
        self.folder, self.lock, self.on_end = folder, lock, on_end
        self.records: dict[str, Record] = {}
        self.earlier: dict[str, Record] = {}  # of jobs that have to run again
        self.waiting: list[Job] = []
        for job in jobs:
            record = read_record(folder / job.key)
            if record is not None and record.status == "done":
                self.records[job.key] = record
            else:
                self.waiting.append(job)
                if record is not None:
                    self.earlier[job.key] = record
        self.places = {job.key: f"[{place}/{len(jobs)}]" for place, job in enumerate(jobs, start=1)}
        self.free = list(slots)
        self.num_slots = len(slots)
        self.running: list[Child] = []
        self.seconds_by_kind: dict[str, list[float]] = {}
        for job in jobs:
            if job.key in self.records:
                self._note_seconds(job.kind, self.records[job.key].seconds)
        if self.records:
            _say(f"{len(self.records)} of {len(jobs)} jobs are done already")

    def work(self) -> None:
        spoke = time.monotonic()
        while self.waiting or self.running:
            self._start_what_can()
            self._collect()
            if time.monotonic() - spoke > _PROGRESS_SECONDS:
                spoke = time.monotonic()
                for child in self.running:
                    told = f"{child.progress()}{self._eta()}".strip()
                    if told:
                        _say(f"{self.places[child.job.key]} {told}")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        for number in SIGNALS:  # an impatient second Ctrl-C would leave processes behind
            signal.signal(number, signal.SIG_IGN)
        _say(f"\nstopping {len(self.running)} running; the same command goes on from there")
        for child in self.running:
            child.ask_to_stop()
        for child in self.running:
            child.wait_for_end()
            self._write(child, Record("interrupted"))

    def _start_what_can(self) -> None:
        for job in list(self.waiting):
            before = None if job.needs is None else self.records.get(job.needs.key)
            if job.needs is not None and before is None:
                continue  # it runs, or waits itself
            if before is not None and before.status != "done":
                self.waiting.remove(job)
                # Not written: it was never tried.
                reason = f"not run, because its {job.needs.kind} failed: {before.error}"
                self.records[job.key] = Record("failed", error=reason)
            elif self.free:
                self.waiting.remove(job)
                _say(f"{self.places[job.key]} {job.kind}: {job.label}{self._eta(job)}")
                self._start(job)

    def _start(self, job: Job) -> None:
        folder, slot = self.folder / job.key, self.free.pop(0)
        try:
            self.running.append(Child(job, folder, slot, (self.lock,)))
        except InputError as error:  # of what its command is made from, such as a weight file
            self.free.append(slot)
            record = Record("failed", error=str(error), about=versions())
            self.records[job.key] = record
            write_record(folder, job, record)
            _say(f"{self.places[job.key]} failed: {error}")

    def _collect(self) -> None:
        for child in [child for child in self.running if child.status() is not None]:
            job = child.job
            record = self._record_of(child)
            self.running.remove(child)
            self.free.append(child.slot)
            self.records[job.key] = self._write(child, record)
            self._note_seconds(job.kind, child.seconds)
            told = f" {record.error}; see {child.log}" if record.error else ""
            _say(f"{self.places[job.key]} {record.status} in {_clock(child.seconds)}{told}")
            self.on_end(self.records)

    def _record_of(self, child: Child) -> Record:
        ended_well = child.status() == 0
        try:
            outcome = child.job.outcome(child.folder)
        except (InputError, OSError, ValueError, KeyError, TypeError) as error:
            reason = f"its results cannot be read: {error}" if ended_well else child.last_words()
            return Record("failed", error=reason)
        if outcome.failures:
            told = "; ".join(f"{name}: {reason}" for name, reason in outcome.failures.items())
            return Record("failed", outcome, told)
        return Record("done", outcome) if ended_well else Record("failed", error=child.last_words())

    def _write(self, child: Child, record: Record) -> Record:
        before = self.earlier.get(child.job.key, Record(""))
        seconds = before.seconds + child.seconds
        record = replace(record, seconds=round(seconds, 1), about=versions())
        write_record(child.folder, child.job, record)
        return record

    def _note_seconds(self, kind: str, seconds: float) -> None:
        self.seconds_by_kind.setdefault(kind, []).append(seconds)

    def _eta(self, starting: Job | None = None) -> str:
        """Estimated from the jobs of the same kind that have ended; empty while there are none."""
        left = [*self.waiting, *(child.job for child in self.running)]
        left += [] if starting is None else [starting]
        if not left or any(job.kind not in self.seconds_by_kind for job in left):
            return ""
        seconds = sum(mean(self.seconds_by_kind[job.kind]) for job in left)
        seconds -= sum(child.seconds for child in self.running)
        return f"  (ETA of all {_clock(max(seconds, 0.0) / self.num_slots)})"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _say(line: str) -> None:
    print(line, flush=True)
