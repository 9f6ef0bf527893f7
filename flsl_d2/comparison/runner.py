"""Running a list of jobs, so that it can be interrupted at any time and goes on where it was."""

from __future__ import annotations

import datetime
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from flsl_d2.comparison.child import Child
from flsl_d2.comparison.guards import SIGNALS, locked, signals_interrupt
from flsl_d2.comparison.jobs import Job, Record, read_record, write_record
from flsl_d2.comparison.provenance import versions
from flsl_d2.comparison.slots import Slot
from flsl_d2.errors import InputError

__all__ = ["run_jobs"]

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
