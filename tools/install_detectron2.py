#!/usr/bin/env python3
"""Install Detectron2 into the environment of the Python that runs this file.

Three ways, tried in this order:

1. A Detectron2 that the environment already has is kept.
2. The official source at a pinned commit, compiled here, where its repository can be reached and
   a C++ compiler is present.
3. A wheel from the package index, pinned by its SHA-256: Detectron2's Python code without the
   compiled operators.

Only the standard library is needed, so the file also serves environments that know nothing else
of this project: ``python tools/install_detectron2.py``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

OFFICIAL_SOURCE = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # 2026-06-06; it has no later releases
WHEEL = "sal-detectron2==0.7.2"  # the official Python code of 2024-04-17 (a59f0563), repackaged
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
REACH_SECONDS = 10

# What Detectron2 declares, plus pkg_resources (setuptools) and cv2, which it imports undeclared.
# Both ways install Detectron2 without its dependencies: the wheel's own list asks for numpy < 2.
DEPENDENCIES = {
    "PIL": "Pillow>=7.1",
    "black": "black",
    "cloudpickle": "cloudpickle",
    "cv2": "opencv-python-headless",
    "fvcore": "fvcore>=0.1.5,<0.1.6",
    "hydra": "hydra-core>=1.1",
    "iopath": "iopath>=0.1.7,<0.1.10",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "omegaconf": "omegaconf>=2.1,<2.4",
    "packaging": "packaging",
    "pkg_resources": "setuptools<81",
    "pycocotools": "pycocotools>=2.0.2",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "termcolor": "termcolor>=1.1",
    "tqdm": "tqdm>4.29.0",
    "yacs": "yacs>=0.1.8",
}


class InstallError(Exception):
    """The installation cannot go on; the message is one sentence that says what to do."""


def say(message: str) -> None:
    """Print one line at once, also into a pipe."""
    print(message, flush=True)


def pip(python: str, *arguments: str, log: Path, shown: int = 12) -> bool:
    """Run pip with all of its output in ``log``; return whether it succeeded.

    pip warns of much that is no fault of the installation (package indexes that lack a folder,
    cache directories), so the terminal sees only its last ``shown`` lines, and only when it fails.
    """
    command = [python, "-m", "pip", "--no-color", *arguments]
    settings = {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
    }
    with log.open("a") as output:
        start = output.tell()
        status = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
        ).returncode
    if status != 0:
        with log.open(errors="replace") as output:
            output.seek(start)
            lines = [line for line in output if not line.startswith("WARNING: Location")]
        sys.stderr.writelines(lines[-shown:] if shown else [])
    return status == 0


def write_constraints(path: Path, except_for: frozenset[str] = frozenset()) -> None:
    """Write a pip constraints file that keeps every installed distribution at its version."""
    lines = set()
    for distribution in metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        # Half-removed distributions have no name; hand-made versions are not for pip to compare.
        if name and version and re.fullmatch(r"[0-9][A-Za-z0-9.!+_-]*", version):
            normalized = re.sub(r"[-_.]+", "-", name).lower()
            if normalized not in except_for:
                lines.add(f"{normalized}=={version}\n")
    path.write_text("".join(sorted(lines)))


def import_failure(module: str) -> str | None:
    """Import ``module`` in a fresh process; return the last line of its error, None if it works."""
    # -P would be shorter but needs Python 3.11: the current folder must not be importable.
    code = f"import sys; sys.path[:] = [p for p in sys.path if p]; import torch, {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def site_folder() -> Path:
    """The folder in which this environment keeps pure Python packages."""
    return Path(sysconfig.get_paths()["purelib"])


def found_at() -> Path | None:
    """Where this environment has Detectron2, or None.

    A folder called detectron2 without an ``__init__.py`` (a clone beside the script) has no origin
    and is none.
    """
    spec = importlib.util.find_spec("detectron2")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def install_dependencies(work: Path, log: Path) -> None:
    """Install what Detectron2 needs and the environment lacks; nothing present changes version."""
    missing = [
        requirement
        for module, requirement in sorted(DEPENDENCIES.items())
        if importlib.util.find_spec(module) is None
    ]
    if not missing:
        return
    say(f"Detectron2: installing what it needs and is missing here: {', '.join(missing)}")
    # A setuptools without pkg_resources is the one thing that has to move.
    moved = frozenset({"setuptools"} if "setuptools<81" in missing else ())
    constraints = work / "constraints.txt"
    write_constraints(constraints, moved)
    if not pip(sys.executable, "install", "-c", str(constraints), *missing, log=log):
        raise InstallError(
            f"pip could not install {', '.join(missing)} beside the packages of {sys.prefix}: "
            f"install them by hand and run this again (log: {log})"
        )


def source_obstacle(source: str) -> str | None:
    """Why ``source`` cannot be built here, found within seconds; None if nothing speaks against it.

    Args:
        source: URL of a git repository, or a folder: a git repository or a source tree.
    """
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++", "cl"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return "there is no C++ compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's C headers (Python.h) are not installed"
    if Path(source).is_dir():
        return None
    if shutil.which("git") is None:
        return "git is not installed"
    try:
        # No prompt for a password: a site that asks for one is not reachable.
        reached = subprocess.run(
            ["git", "ls-remote", "--exit-code", source, "HEAD"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=REACH_SECONDS,
            env={
                **os.environ,
                "GIT_TERMINAL_PROMPT": "0",
                "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
            },
        )
    except subprocess.TimeoutExpired:
        return f"{source} did not answer within {REACH_SECONDS} seconds"
    return None if reached.returncode == 0 else f"{source} cannot be reached"


def pip_target(source: str) -> str:
    """What to hand to pip for ``source``; the official repository is taken at the pinned commit."""
    folder = Path(source)
    if folder.is_dir():
        # A repository is cloned by pip, so that the build leaves nothing behind in it.
        uri = folder.resolve().as_uri()
        return f"git+{uri}" if (folder / ".git").exists() else str(folder.resolve())
    return f"git+{source}@{COMMIT}" if source == OFFICIAL_SOURCE else f"git+{source}"


def build_source(source: str, log: Path) -> str | None:
    """Compile Detectron2 from ``source`` and install it; return why not, None when it works."""
    say(f"Detectron2: compiling {source} (2 minutes on 2 cores; longer with CUDA operators)")
    # Without --no-build-isolation its setup.py does not find torch.
    options = ["--no-build-isolation", "--no-deps"]
    if not pip(sys.executable, "install", *options, pip_target(source), log=log, shown=0):
        return f"{source} could not be compiled"
    failure = import_failure("detectron2._C")
    if failure is not None:
        pip(sys.executable, "uninstall", "-y", "detectron2", log=log)
        return f"what was built does not import ({failure})"
    return None


def download_wheel(folder: Path, log: Path) -> Path:
    """Download the pinned wheel into ``folder``; pip refuses a file with another SHA-256.

    Raises:
        InstallError: no such wheel is to be had.
    """
    pinned = folder / "wheel.txt"
    pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    # The wheel is tagged for Python 3.10 because of its compiled part; the rest runs on any.
    tags = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none"]
    tags += ["--platform", "any", "--only-binary", ":all:", "--no-deps", "--require-hashes"]
    if not pip(sys.executable, "download", *tags, "-d", str(folder), "-r", str(pinned), log=log):
        raise InstallError(
            f"pip could not download {WHEEL} with SHA-256 {WHEEL_SHA256[:12]}...: check the access "
            "to the package index, or install Detectron2 yourself "
            f"(https://detectron2.readthedocs.io) and run this again (log: {log})"
        )
    return next(folder.glob("*.whl"))


def install_wheel(work: Path, log: Path) -> Path:
    """Put the wheel's ``detectron2`` on the path, and nothing else of it; return its folder.

    It gets a folder of its own, which a ``.pth`` file adds to the path: the wheel also holds a
    top-level package ``tools``, which would shadow others, and metadata that asks for numpy < 2,
    of which pip would complain ever after. The ``.pth`` file is written last, so that an
    installation that was interrupted counts as none and is done again.
    """
    site = site_folder()
    folder, switch = site / "detectron2-wheel", site / "detectron2-wheel.pth"
    try:
        site.mkdir(parents=True, exist_ok=True)
        for leftover in site.glob(".detectron2-wheel-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        wheel = download_wheel(work, log)
        unpacked = Path(tempfile.mkdtemp(dir=site, prefix=".detectron2-wheel-"))
        # mkdtemp's folder is its owner's alone; an environment may be shared.
        unpacked.chmod(0o755)
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith("detectron2/") and not is_foreign_binary(member):
                    archive.extract(member, unpacked)
                elif member.endswith(".dist-info/LICENSE"):
                    (unpacked / "LICENSE").write_bytes(archive.read(member))
        switch.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
        # A relative line is relative to the .pth file: the environment's folder may have any name.
        prepared = site / ".detectron2-wheel-switch"
        prepared.write_text(f"{folder.name}\n")
        prepared.replace(switch)
    except PermissionError as error:
        raise InstallError(
            f"{error.filename} cannot be written: make a virtual environment "
            "(python3 -m venv .venv) and run this again with its Python"
        ) from error
    discard_unusable_binary(folder)
    return folder / "detectron2"


def is_foreign_binary(member: str) -> bool:
    """Whether a member of the wheel is compiled for another interpreter or machine than this."""
    if not Path(member).name.startswith("_C."):
        return False
    here = (sys.implementation.name, sys.version_info[:2], sys.platform, platform.machine())
    return here != ("cpython", (3, 10), "linux", "x86_64")


def discard_unusable_binary(folder: Path) -> None:
    """Remove a ``_C`` that this torch cannot load (it was compiled against torch 2.3)."""
    binaries = list((folder / "detectron2").glob("_C.*"))
    if binaries and import_failure("detectron2._C") is not None:
        for binary in binaries:
            binary.unlink()


def install(source: str | None) -> None:
    """Bring Detectron2 into this environment and say in one line how.

    Args:
        source: what to compile first (a URL or a folder); None goes straight to the wheel.

    Raises:
        InstallError: Detectron2 could not be installed, or what is there does not work.
    """
    if importlib.util.find_spec("torch") is None:
        raise InstallError(
            f"Detectron2 needs PyTorch, which {sys.prefix} lacks: install torch and torchvision "
            "there (https://pytorch.org/get-started) and run this again"
        )
    present, own = found_at(), site_folder() / "detectron2-wheel" / "detectron2"
    if present is not None:
        failure = import_failure("detectron2")
        if failure is None:
            say(f"Detectron2: kept the installation in {present}")
            return
        if present.resolve() != own.resolve():
            raise InstallError(
                f"the Detectron2 in {present} does not import ({failure}): repair it, or remove it "
                "(pip uninstall detectron2) and run this again"
            )
    log = Path(sys.prefix) / "detectron2-install.log"
    if not os.access(sys.prefix, os.W_OK):
        log = Path(tempfile.gettempdir()) / f"detectron2-install-{os.getpid()}.log"
    with tempfile.TemporaryDirectory(prefix="detectron2-") as work:
        install_dependencies(Path(work), log)
        reason = "no source was asked for" if source is None else source_obstacle(source)
        if source is not None and reason is None:
            reason = build_source(source, log)
            if reason is None:
                say(f"Detectron2: compiled and installed from {source}")
                return
            say(f"Detectron2: {reason}, going on with the wheel (log: {log})")
        package = install_wheel(Path(work), log)
    failure = import_failure("detectron2")
    if failure is not None:
        raise InstallError(f"the Detectron2 put into {package} does not import ({failure})")
    operators = import_failure("detectron2._C") is None
    say(
        f"Detectron2: installed the wheel {WHEEL}, as {reason}; "
        + (
            "it has its compiled operators"
            if operators
            else "it lacks the compiled operators (rotated boxes, deformable convolution, the fast "
            "COCO evaluator); Mask R-CNN needs none of them"
        )
    )


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Install Detectron2 into the environment of the Python that runs this file: "
        "keep what is there, else compile the official source, else a hash-pinned wheel without "
        "the compiled operators.",
    )
    parser.add_argument(
        "--source",
        metavar="URL_OR_PATH",
        default=OFFICIAL_SOURCE,
        help="git repository or source folder to compile instead of the official one "
        f"({OFFICIAL_SOURCE} at {COMMIT[:12]}); 'none' is --wheel",
    )
    parser.add_argument(
        "--wheel", action="store_true", help="compile nothing, go straight to the wheel"
    )
    arguments = parser.parse_args()
    source = None if arguments.wheel or arguments.source == "none" else arguments.source
    try:
        install(source)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to finish", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
