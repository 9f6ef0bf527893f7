"""Commands in forked processes, which saves the seconds of importing PyTorch again."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import IO

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils import logger as detectron2_logger

from flsl_d2.data import register_builtin

ROOT = Path(__file__).resolve().parents[1]


def run_tool(
    tool: str, *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of ``tools/`` in the checkout, like ``python tools/NAME.py ARGUMENTS``."""
    command = [str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(
            target=_run_tool, args=(command, files, environment)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        output, errors = (file.read_text(errors="replace") for file in files)
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def _run_tool(command: list[str], files: list[Path], environment: dict[str, str]) -> None:
    _become_fresh(*(os.open(file, os.O_WRONLY | os.O_CREAT) for file in files), environment)
    os.chdir(ROOT)
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class ForkedJob:
    """Stands for ``subprocess.Popen`` of ``python -m MODULE``, as jobs and the demo use it."""

    def __init__(
        self,
        command: list[str],
        *,
        stdout: IO[str] | int,
        env: Mapping[str, str],
        cwd: str | Path = ".",
        **_: object,
    ) -> None:
        assert command[1] == "-m"
        self.returncode: int | None = None
        reading, output = os.pipe() if isinstance(stdout, int) else (None, stdout.fileno())
        self.pid = os.fork()
        if self.pid:
            if reading is not None:
                os.close(output)
                self.stdout = os.fdopen(reading)
            return
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(cwd)
            _become_fresh(output, output, env)
            sys.argv = command[2:]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def __enter__(self) -> ForkedJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, however long it takes."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


# The parts of the module ``subprocess`` that jobs and the demo use.
FORKED_SUBPROCESS = SimpleNamespace(
    Popen=ForkedJob,
    PIPE=subprocess.PIPE,
    DEVNULL=subprocess.DEVNULL,
    STDOUT=subprocess.STDOUT,
    TimeoutExpired=subprocess.TimeoutExpired,
)


def _become_fresh(output: int, errors: int, environment: Mapping[str, str]) -> None:
    """Take off what this process has from its parent and a new one would not have."""
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
