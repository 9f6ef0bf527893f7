"""Commands and workers in forked processes, which saves the seconds of importing PyTorch again."""

from __future__ import annotations

import atexit
import importlib
import logging
import multiprocessing.util
import os
import pickle
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import IO, Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils import logger as detectron2_logger
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import start_processes

from flsl_d2.annotations import register_builtin

ROOT = Path(__file__).resolve().parents[1]
FORK = multiprocessing.get_context("fork")


def run_forked(
    command: Sequence[object],
    *,
    cwd: str | Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    before: Callable[[], None] = lambda: None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` or ``python FILE`` to its end, like ``subprocess.run``.

    The process calls the function ``before`` first.
    """
    command = [*map(str, command)]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        numbers = [os.open(file, os.O_WRONLY | os.O_CREAT) for file in files]
        arguments = (command[1:], *numbers, env or {}, cwd, before)
        process = FORK.Process(target=_run, args=arguments)
        process.start()
        for number in numbers:
            os.close(number)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        output, errors = (file.read_text(errors="replace") for file in files)
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def run_tool(
    tool: str, *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of ``tools/`` in the checkout, like ``python tools/NAME.py ARGUMENTS``."""
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", *arguments]
    return run_forked(command, env=environment, timeout=timeout)


def assert_refused(status: int, errors: str, part: str, arguments: object = ()) -> None:
    """Check that a tool has ended with one sentence about bad input."""
    assert status == 2, (arguments, status, errors)
    assert errors.startswith("error: "), (arguments, errors)
    assert part in errors, (arguments, errors)
    assert errors.count("\n") == 1, (arguments, errors)


class ForkedJob:
    """Stands for ``subprocess.Popen`` of ``python -m MODULE`` or ``python FILE``."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[Any] | int,
        env: Mapping[str, str],
        cwd: str | Path = ".",
        **_: object,
    ) -> None:
        reading, output = os.pipe() if isinstance(stdout, int) else (None, stdout.fileno())
        arguments = (command[1:], output, output, env, cwd, os.setsid)
        self._process = FORK.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        if reading is not None:
            os.close(output)
            self.stdout = os.fdopen(reading)

    def __enter__(self) -> ForkedJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; subprocess.TimeoutExpired after ``timeout`` seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone, not to those that it has started."""
        os.kill(self.pid, number)


# The parts of the module ``subprocess`` that jobs and the demo use.
FORKED_SUBPROCESS = SimpleNamespace(Popen=ForkedJob)
for _name in ("PIPE", "DEVNULL", "STDOUT", "TimeoutExpired"):
    setattr(FORKED_SUBPROCESS, _name, getattr(subprocess, _name))


def start_forked(
    function: Callable[..., None],
    args: tuple[Any, ...],
    *more: Any,
    start_method: str,
    **options: Any,
) -> Any:
    """Start workers like PyTorch's ``start_processes``, by forking whatever is asked for.

    pickle.PicklingError where the function or its arguments would not reach a fresh process.
    """
    *plain, _reports, given = args
    pickle.dumps((function, plain, given))
    return start_processes(_worker, (function, *args), *more, start_method="fork", **options)


def _worker(rank: int, function: Callable[..., None], *args: Any) -> None:
    _forget_exit_functions()
    function(rank, *args)


def run_elastic(
    function: Callable[..., None], *arguments: object, processes: int = 2, restarts: int = 0
) -> None:
    """Run a function in the ranks of torchrun's agent, which here are forked.

    Agent, store, variables and restarts are those of the command ``torchrun``.
    """
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=restarts, run_id="test",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )  # fmt: skip

    def rank() -> None:
        _forget_exit_functions()
        function(*arguments)

    agent = FORK.Process(target=elastic_launch(config, rank))
    agent.start()
    agent.join()
    assert agent.exitcode == 0


def _forget_exit_functions() -> None:
    """Leave to the parent what it does at its own end, such as removing temporary folders."""
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)


def _run(
    arguments: Sequence[str],
    output: int,
    errors: int,
    environment: Mapping[str, str],
    folder: str | Path,
    before: Callable[[], None],
) -> None:
    _forget_exit_functions()
    before()
    _become_fresh(output, errors, environment)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv = [*arguments[1:]]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*arguments]
        runpy.run_path(arguments[0], run_name="__main__")


def _become_fresh(output: int, errors: int, environment: Mapping[str, str]) -> None:
    """Take off what this process has from its parent and a new one would not have."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    # Handlers of earlier tests write to streams that are closed.
    known = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for logger in known:
        logger.handlers.clear()
        logger.propagate = True
    detectron2_logger.setup_logger.cache_clear()
    os.environ.update(environment)
    # Names are registered as by an import: below the folder of the environment, no others.
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    importlib.reload(builtin)
    register_builtin()
