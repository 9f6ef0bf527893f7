"""Jobs as processes of this machine, each with its share of the GPUs or cores."""

from __future__ import annotations

import contextlib
import os
import signal
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import flsl_d2
from flsl_d2.engine.gpus import check_device, usable_cores
from flsl_d2.errors import InputError

# Seconds that a process has to end by itself: training finishes its step and writes a checkpoint.
STOP_SECONDS = 120.0


def module_search_path() -> dict[str, str]:
    """Return PYTHONPATH with which a child process imports the package that runs here.

    Empty where the package is installed and any Python process finds it.
    """
    root = str(Path(flsl_d2.__file__).parents[1])
    if root in [*site.getsitepackages(), site.getusersitepackages()]:
        return {}
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([root, before] if before else [root])}


def jobs_at_a_time(num_gpus: int, gpus_per_job: int) -> int:
    """Return the number of jobs that fit; raise InputError if that is none."""
    if gpus_per_job < 1 or num_gpus < gpus_per_job:
        raise InputError(
            f"{num_gpus} GPUs with {gpus_per_job} for each job leave no job any; "
            "give --num-gpus of at least --gpus-per-job."
        )
    return num_gpus // gpus_per_job


class Machine:
    """The machine of this process, shared among ``width`` jobs at a time.

    ``shares`` are environment variables that keep each of them to its share.

    Args:
        num_gpus: number of GPUs to use, of those in CUDA_VISIBLE_DEVICES; on the CPU, processes.
        gpus_per_job: number of GPUs, or processes, of each job.

    Raises:
        InputError: counts or a device that this machine does not have.
    """

    def __init__(self, device: str = "cpu", num_gpus: int = 1, gpus_per_job: int = 1) -> None:
        self.width, self.num_processes = jobs_at_a_time(num_gpus, gpus_per_job), gpus_per_job
        check_device(device, num_gpus)
        self._running: dict[int, LocalProcess] = {}
        self.shares: list[dict[str, str]] = [{}] * self.width
        if device.startswith("cuda"):
            listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            names = listed.split(",") if listed else [str(i) for i in range(num_gpus)]
            starts = range(0, self.width * gpus_per_job, gpus_per_job)
            parts = [",".join(names[start : start + gpus_per_job]) for start in starts]
            self.shares = [{"CUDA_VISIBLE_DEVICES": part} for part in parts]
        elif num_gpus > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Otherwise every process takes all cores, and they wait for one another.
            threads = str(max(usable_cores() // num_gpus, 1))
            self.shares = [{"OMP_NUM_THREADS": threads}] * self.width

    def _free(self) -> list[int]:
        running = {i for i, process in self._running.items() if process.status() is None}
        return [i for i in range(self.width) if i not in running]

    def has_room(self) -> bool:
        """Whether a share of the machine is free."""
        return bool(self._free())

    def start(
        self, arguments: Sequence[str], _folder: Path, log: IO[Any], lock: int
    ) -> LocalProcess:
        """Start a process with a free share, which inherits the lock and writes to the log."""
        share = self._free()[0]
        own = {**module_search_path(), "PYTHONUNBUFFERED": "1", **self.shares[share]}
        process = self._running[share] = LocalProcess(arguments, own, log, lock)
        return process


class LocalProcess:
    """A job of this machine, with environment variables of its own."""

    def __init__(
        self, arguments: Sequence[str], own: dict[str, str], log: IO[Any], lock: int
    ) -> None:
        # In a session of its own it gets Ctrl-C once, through ask_to_stop().
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
            pass_fds=(lock,),
        )

    def status(self) -> int | None:
        """Return the exit status, negative for a signal; None while the job runs."""
        return self._process.poll()

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait_for_end(self) -> None:
        """Wait for the end after :meth:`ask_to_stop`; kill the process if it takes minutes."""
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.ask_to_stop(signal.SIGKILL)
            self._process.wait()
