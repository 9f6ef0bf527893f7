"""One job's process: started with its log, stopped with all that it started, and its last words."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from flsl_d2.comparison.jobs import Job
from flsl_d2.comparison.slots import Slot

__all__ = ["Child"]

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
