#!/usr/bin/env python3
"""Set up the environment of this checkout; ``make install`` calls it. Standard library only.

An environment that does not exist yet is made and brought to the pins of requirements.txt. One
that exists and was not made here belongs to its owner: it only gets what it lacks (the ranges of
setup.py), nothing in it changes version, and its torch and Detectron2 stay.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from install_detectron2 import OFFICIAL_SOURCE, InstallError, pip, say

ROOT = Path(__file__).resolve().parent.parent
OWN_MARK = ".made-by-flsl-d2"
CONSTRAINTS = (
    "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, install_detectron2 as i; "
    "i.write_constraints(pathlib.Path(sys.argv[2]))"
)


def python_of(environment: Path) -> Path:
    """The interpreter inside an environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def version_of(python: Path) -> str:
    """The version of an interpreter as "3.11", empty if it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def make_environment(environment: Path) -> None:
    """Make a virtual environment with the running Python, or finish one that was interrupted.

    Raises:
        InstallError: this Python cannot make virtual environments.
    """
    own_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python_of(environment).exists() and version_of(python_of(environment)) != own_version:
        shutil.rmtree(environment)
    doing = "Bringing up to date" if python_of(environment).exists() else "Making"
    say(f"{doing} the virtual environment {environment} with Python {own_version}")
    environment.mkdir(parents=True, exist_ok=True)
    # The mark comes first: half an environment must not pass for one that belongs to someone else.
    (environment / OWN_MARK).touch()
    made = subprocess.run(
        [sys.executable, "-m", "venv", environment], capture_output=True, text=True
    )
    if made.returncode != 0:
        print((made.stderr or made.stdout).strip(), file=sys.stderr)
        raise InstallError(
            f"{sys.executable} could not make a virtual environment, see above: install Python's "
            "venv and pip (Debian, Ubuntu: apt install python3-venv), or name another Python "
            "(make PYTHON=...)"
        )


def install_pins(environment: Path, log: Path) -> None:
    """Bring an environment of our own to the pins of requirements.txt."""
    python, requirements = str(python_of(environment)), str(ROOT / "requirements.txt")
    say(
        "Installing the packages of requirements.txt: about 5 GB on Linux when none is there yet, "
        f"one to two minutes over a fast line (log: {log})"
    )
    # The two packages without wheels are built with the pinned setuptools, not with whatever
    # version is the newest that day.
    built_with = ["install", "-c", requirements, "setuptools", "wheel"]
    rest = ["install", "--no-build-isolation", "--use-pep517", "-r", requirements]
    link = ["install", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    for arguments in (built_with, rest, link):
        if not pip(python, *arguments, log=log):
            raise InstallError(
                f"pip could not install the pinned packages into {environment}: see its last words "
                f"above and the log {log}, then run this again"
            )


def install_missing(environment: Path, log: Path) -> None:
    """Add to someone else's environment what it lacks; nothing there changes version."""
    python = str(python_of(environment))
    say(f"Installing into {environment} what flsl-d2 needs and is missing there")
    with tempfile.TemporaryDirectory(prefix="flsl-d2-") as work:
        constraints = Path(work) / "constraints.txt"
        subprocess.run([python, "-c", CONSTRAINTS, ROOT / "tools", constraints], check=True)
        # opencv comes under four names that overwrite one another: only where cv2 is missing.
        without_cv2 = subprocess.run([python, "-c", "import cv2"], capture_output=True).returncode
        opencv = ["opencv-python-headless"] if without_cv2 else []
        link = ["-e", f"{ROOT}[pretrain,test]"]
        if not pip(python, "install", "-c", str(constraints), *link, *opencv, log=log):
            raise InstallError(
                f"{environment} cannot take flsl-d2 without a change of what it has, see pip's "
                f"last words above and the log {log}: make that change there, or leave VENV out "
                "for an environment of its own"
            )


def set_up(environment: Path, source: str) -> None:
    """Everything that ``make install`` does.

    Args:
        environment: folder of the virtual environment.
        source: what to compile Detectron2 from, as for ``install_detectron2.py --source``.

    Raises:
        InstallError: one sentence that says what is wrong and what to do.
    """
    python = python_of(environment)
    marked = (environment / OWN_MARK).exists()
    own = marked or not python.exists()
    if own and not marked and environment.is_dir() and any(environment.iterdir()):
        raise InstallError(
            f"{environment} is neither empty nor an environment with a Python: name another folder "
            "(make VENV=...)"
        )
    if own:
        make_environment(environment)
    elif not re.fullmatch(r"3\.\d\d+", version_of(python)):
        raise InstallError(f"{python} is not a Python 3.10 or newer: choose another environment")
    log = environment / "flsl-d2-install.log"
    (install_pins if own else install_missing)(environment, log)
    detectron2 = [python, ROOT / "tools" / "install_detectron2.py", "--source", source]
    if subprocess.run(detectron2).returncode != 0:
        raise InstallError("Detectron2 is not installed, see above")


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Set up the environment of this checkout.")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv", help="folder (.venv)")
    parser.add_argument(
        "--detectron2-source",
        default=OFFICIAL_SOURCE,
        metavar="URL_OR_PATH",
        help="repository or folder to compile Detectron2 from; 'none' takes the wheel",
    )
    parser.add_argument("--stamp", type=Path, help="file to write when everything is in place")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        set_up(arguments.environment, arguments.detectron2_source)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to finish", file=sys.stderr)
        return 130
    if arguments.stamp is not None:
        arguments.stamp.touch()
    say(f"Installed in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
