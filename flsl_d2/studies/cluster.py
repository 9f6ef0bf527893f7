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
from pathlib import Path
from typing import IO, Any

from flsl_d2.errors import InputError
from flsl_d2.studies.machine import STOP_SECONDS, jobs_at_a_time, module_search_path

CLUSTERS = ("slurm", "local")
_ID_FILE = "cluster_job.txt"
_MINUTES = 24 * 60
# Training handles this signal by a checkpoint; submitit's own, USR2, would end it.
_SIGNAL = "USR1"


class Cluster:
    """A cluster that submitit knows, in the place of :class:`flsl_d2.studies.machine.Machine`.

    Slurm gets all jobs that can start; ``local`` runs ``num_gpus // gpus_per_job`` at a time.

    Args:
        name: one of :data:`CLUSTERS`.
        folder: results folder; submitit's files go to ``submitit`` in it.
        options: ``KEY=VALUE`` each, parameters of submitit such as ``slurm_partition=gpu``.

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
        self.width, self.num_processes = jobs_at_a_time(num_gpus, gpus_per_job), gpus_per_job
        try:
            import cloudpickle
            import submitit
            from submitit.core.job_environment import JobEnvironment
        except ImportError as error:
            raise InputError(
                f"--cluster {name} needs submitit; install it: pip install 'flsl-d2[cluster]'."
            ) from error
        JobEnvironment.USR_SIG = _SIGNAL
        # A job that carries this module's code does not have to import the package.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self._is_local, self._running = name == "local", list[_ClusterJob]()
        parameters: dict[str, Any] = {"timeout_min": _MINUTES}
        parameters["gpus_per_node"] = gpus_per_job if device.startswith("cuda") else 0
        for option in options:
            key, _, value = option.partition("=")
            if not (key and value):
                raise InputError(f"--cluster-option {option!r} is not KEY=VALUE.")
            parameters[key] = int(value) if value.isdecimal() else value
        try:
            requeues = {f"{name}_max_num_timeout": 1000}
            logs = folder / "submitit" / "%j"
            self._executor: Any = submitit.AutoExecutor(logs, cluster=name, **requeues)
            self._executor.update_parameters(**parameters)
        except (NameError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"--cluster {name}: {' '.join(str(error).split())}") from error

    def has_room(self) -> bool:
        """Whether another job may be submitted now."""
        self._running = [job for job in self._running if job.status() is None]
        return not self._is_local or len(self._running) < self.width

    def attach(self, folder: Path) -> _ClusterJob | None:
        """Return the job of a folder that an earlier run submitted and that is not done.

        Raises:
            InputError: it is a process of the local executor, which only its parent can watch.
        """
        if not (folder / _ID_FILE).is_file():
            return None
        number = (folder / _ID_FILE).read_text()
        if self._is_local:
            command = Path(f"/proc/{number}/cmdline")
            if command.is_file() and b"submitit" in command.read_bytes():
                raise InputError(f"process {number} of an earlier run works on it; end that first.")
            return None
        slurm = self._executor._executor
        job = slurm.job_class(str(slurm.folder).replace("%j", number), number)
        return None if job.done(force_check=True) else self._keep(job, folder / "console.txt")

    def start(
        self, arguments: Sequence[str], folder: Path, log: IO[Any], _lock: int
    ) -> _ClusterJob:
        """Submit a job, which writes to the log's file."""
        before = dict(os.environ)
        # Slurm and the local executor hand on the environment of the submission.
        os.environ |= module_search_path()
        os.environ |= {"PYTHONUNBUFFERED": "1", "SUBMITIT_PREEMPT_SIGNAL": _SIGNAL}
        try:
            command = _Command([sys.executable, *arguments], os.path.abspath(log.name))
            job = self._executor.submit(command)
        except Exception as error:  # submitit's and Slurm's refusals have no common class
            raise InputError(f"the cluster takes no job: {' '.join(str(error).split())}") from error
        finally:
            os.environ.clear()
            os.environ.update(before)
        (folder / _ID_FILE).write_text(job.job_id)
        return self._keep(job, Path(log.name))

    def _keep(self, job: Any, log: Path) -> _ClusterJob:
        self._running.append(_ClusterJob(job, log))
        return self._running[-1]


class _ClusterJob:
    """Has the methods of :class:`flsl_d2.studies.machine.LocalProcess`."""

    def __init__(self, job: Any, log: Path) -> None:
        self._job, self._log = job, log
        self._status: int | None = None

    def status(self) -> int | None:
        if self._status is None and self._job.done():
            try:
                self._status = int(self._job.result())
            except Exception as error:  # whatever the job or the cluster died of
                with self._log.open("a") as log:
                    log.write(f"error: job {self._job.job_id}: {str(error).splitlines()[0]}\n")
                self._status = 1
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
