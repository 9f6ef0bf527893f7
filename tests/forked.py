"""Tools as commands in forked processes, which saves the seconds of importing PyTorch again."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils import logger as detectron2_logger

from flsl_d2.data import register_builtin

ROOT = Path(__file__).resolve().parents[1]


def run_tool(
    tool: str, *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a file of ``tools/`` in the checkout, like ``python tools/NAME.py ARGUMENTS``."""
    texts = [str(argument) for argument in arguments]
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(
            target=_run, args=(tool, texts, files, environment)
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([tool, *texts], timeout)
        output, errors = (file.read_text(errors="replace") for file in files)
    return subprocess.CompletedProcess([tool, *texts], process.exitcode, output, errors)


def _run(tool: str, arguments: list[str], files: list[Path], environment: dict[str, str]) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    # Handlers of earlier tests write to streams that are closed.
    known = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    for logger in known:
        logger.handlers.clear()
        logger.propagate = True
    detectron2_logger.setup_logger.cache_clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # Names are registered as by an import: below the folder of the environment, no others.
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    importlib.reload(builtin)
    register_builtin()
    path = str(ROOT / "tools" / f"{tool}.py")
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
