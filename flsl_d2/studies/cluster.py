"""Jobs handed to a cluster by submitit (extra ``cluster``): Slurm, or its executor for one machine.

The results folder must be on a file system that the nodes share. A job that is preempted or
reaches its time limit saves a checkpoint and is queued again by submitit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flsl_d2.errors import InputError
from flsl_d2.studies.machine import STOP_SECONDS, Process, check_counts, module_search_path

CLUSTERS = ("slurm", "local")
_ID_FILE = "cluster.txt"
_MINUTES = 24 * 60


class Cluster:
    """A cluster that submitit knows.

    Slurm gets all jobs that can start; ``local`` has ``num_gpus // gpus_per_job`` at a time.

    Args:
        name: one of :data:`CLUSTERS`.
        folder: results folder; submitit's files go to ``submitit`` in it.
        options: ``KEY=VALUE`` each, parameters of submitit's executor such as
            ``slurm_partition=gpu``, ``timeout_min=600``, ``cpus_per_task=16``.
        device: ``cuda`` or ``cpu``.
        num_gpus: see above.
        gpus_per_job: number of GPUs, or processes, of each job.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an unknown option.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        options: Sequence[str],
        device: str,
        num_gpus: int,
        gpus_per_job: int,
    ) -> None:
        check_counts(num_gpus, gpus_per_job)
        # Training handles this signal by a checkpoint; submitit's own, USR2, would end it.
        os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        try:
            import cloudpickle  # type: ignore[import-untyped]
            import submitit
        except ImportError as error:
            raise InputError(
                f"--cluster {name} needs submitit; install it: pip install 'flsl-d2[cluster]'."
            ) from error
        # A job that carries this module's code does not have to import the package.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.num_processes, self.width = gpus_per_job, num_gpus // gpus_per_job
        self._limited, self._running = name == "local", list[_Submitted]()
        pairs = [option.partition("=") for option in options]
        given = {key: int(value) if value.isdecimal() else value for key, _, value in pairs}
        if not all(equals and value for _, equals, value in pairs):
            raise InputError("--cluster-option takes KEY=VALUE, such as slurm_partition=gpu.")
        gpus = gpus_per_job if device.startswith("cuda") else 0
        parameters: dict[str, Any] = {"timeout_min": _MINUTES, "gpus_per_node": gpus} | given
        try:
            logs = folder / "submitit" / "%j"
            limits = {f"{name}_max_num_timeout": 1000}
            self._executor: Any = submitit.AutoExecutor(folder=logs, cluster=name, **limits)
            self._executor.update_parameters(**parameters)
        except (NameError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"--cluster {name}: {' '.join(str(error).split())}") from error

    def has_room(self) -> bool:
        """Whether another job may be submitted now."""
        self._running = [job for job in self._running if job.status() is None]
        return not self._limited or len(self._running) < self.width

    def start(self, arguments: Sequence[str], folder: Path, log: IO[Any], lock: int) -> Process:
        """Submit a job; its output goes to the log's file."""
        before = dict(os.environ)
        # Slurm and the local executor hand on the environment of the submission.
        os.environ.update({**module_search_path(), "PYTHONUNBUFFERED": "1"})
        try:
            command = _Command([sys.executable, *arguments], str(Path(log.name).resolve()))
            job = self._executor.submit(command)
        except Exception as error:  # submitit's and Slurm's refusals have no common class
            raise InputError(f"the cluster takes no job: {' '.join(str(error).split())}") from error
        finally:
            os.environ.clear()
            os.environ.update(before)
        (folder / _ID_FILE).write_text(job.job_id)
        self._running.append(_Submitted(job, folder, Path(log.name)))
        return self._running[-1]

    def attach(self, folder: Path) -> Process | None:
        """Return the job of a folder that is still queued or running."""
        try:
            number = (folder / _ID_FILE).read_text().strip()
        except OSError:
            return None
        executor = self._executor._executor
        if self._limited:  # the local executor's jobs are processes
            command = Path(f"/proc/{number}/cmdline")
            if not command.is_file() or b"submitit" not in command.read_bytes():
                return None
            raise InputError(
                f"'{folder}' is still worked on by process {number} of an earlier run; wait for "
                "it, or end it."
            )
        job = executor.job_class(str(executor.folder).replace("%j", number), number)
        if job.done(force_check=True):
            return None
        self._running.append(_Submitted(job, folder, folder / "console.txt"))
        return self._running[-1]


class _Submitted:
    def __init__(self, job: Any, folder: Path, log: Path) -> None:
        self._job, self._folder, self._log = job, folder, log
        self._status: int | None = None

    def status(self) -> int | None:
        if self._status is None and self._job.done():
            try:
                self._status = int(self._job.result())
            except Exception as error:  # whatever the job or the cluster died of
                lines = str(error).split("\n")
                with self._log.open("a") as log:
                    log.write(f"error: job {self._job.job_id} of the cluster failed: {lines[0]}\n")
                self._status = 1
            with suppress(OSError):
                (self._folder / _ID_FILE).unlink(missing_ok=True)
        return self._status

    def ask_to_stop(self) -> None:
        self._job.cancel(check=False)

    def wait_for_end(self) -> None:
        end = time.monotonic() + STOP_SECONDS
        while self.status() is None and time.monotonic() < end:
            time.sleep(0.2)


class _Command:
    """Command that submitit runs on a node, and again after a preemption or a time limit."""

    def __init__(self, command: list[str], log: str) -> None:
        self.command, self.log, self.pid = command, log, 0

    def __call__(self) -> int:
        """Run the command to its end, and return its status."""
        with open(self.log, "a") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
            self.pid = process.pid
            try:
                while process.poll() is None:
                    time.sleep(0.2)
            except KeyboardInterrupt:  # the local executor's way to cancel
                process.send_signal(signal.SIGTERM)
                process.wait()
        return process.returncode

    def checkpoint(self) -> Any:
        """Have the command save a checkpoint, and return what continues it."""
        import submitit

        os.kill(self.pid, signal.SIGUSR1)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(_Command(self.command, self.log))
