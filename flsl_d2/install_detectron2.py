"""Install Detectron2 into the environment of the Python that runs this file.

A Detectron2 that is there is kept. Otherwise the official source is compiled at a pinned commit,
or, without a C++ compiler or the repository, a wheel pinned by its SHA-256 is installed, which has
the Python code alone. The script needs the standard library and pip. The packages that Detectron2
requires are the extra ``detectron2`` of flsl-d2.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # 2026-06-06; there are no later releases
# The repository's Python code of 2024-04-17 (commit a59f0563), repackaged.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
SITE = Path(sysconfig.get_paths()["purelib"])


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command without input; keep its output unless ``options`` say otherwise."""
    defaults = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
    return subprocess.run(command, **{**defaults, **options})


def pip(*arguments: str | Path) -> bool:
    """Install by pip without dependencies; return whether that succeeded."""
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *arguments)
    return run(*command, capture_output=False).returncode == 0


def import_error(module: str) -> str | None:
    """Import a module in a fresh process; return the last line of the error, None if it works."""
    done = run(sys.executable, "-c", f"import torch, {module}", cwd=SITE)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["crash"])[-1]


def compile_source(source: str) -> str | None:
    """Compile and install a git repository or a source folder; return why not, None if it works."""
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]):
        return "there is no C++ compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's C headers (Python.h) are not installed"
    if not Path(source).is_dir():
        # A site that asks for a password counts as one that cannot be reached.
        quiet = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -oBatchMode=yes"}
        try:
            run("git", "ls-remote", source, env={**os.environ, **quiet}, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return f"{source} cannot be reached"
        source = f"git+{source}@{COMMIT}" if source == REPOSITORY else f"git+{source}"
    print(f"Detectron2: compiling {source}, which takes minutes", flush=True)
    # An isolated build would lack the torch that it compiles against.
    if not pip("--no-build-isolation", source):
        return f"{source} could not be compiled"
    error = import_error("detectron2._C")
    if error is not None:
        run(sys.executable, "-m", "pip", "uninstall", "--yes", "detectron2")
        return f"the compiled operators do not load ({error})"
    return None


def install_wheel(folder: Path) -> None:
    """Install the package ``detectron2`` of the pinned wheel into a folder of its own.

    The wheel also has a package ``tools``, operators for another PyTorch, and metadata that asks
    for numpy < 2. The ``.pth`` file that puts the folder on the path is written last.
    """
    switch = folder.with_suffix(".pth")
    switch.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        pinned = Path(work, "wheel.txt")
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        # The wheel is tagged for Python 3.10, though its Python code runs on later ones.
        tags = ["--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any"]
        hashed = ["--only-binary=:all:", "--require-hashes", "-r", str(pinned)]
        if not pip(*tags, *hashed, "--target", folder):
            sys.exit(f"error: pip could not install {WHEEL}: check the access to the package index")
    for unwanted in [folder / "tools", *folder.glob("*.dist-info")]:
        shutil.rmtree(unwanted)
    for operators in folder.glob("detectron2/_C.*"):
        operators.unlink()
    switch.write_text(f"{folder.name}\n")


def main() -> None:
    """Install Detectron2 and print one line that says how."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--source", default=REPOSITORY, help="git URL or folder to compile; 'none': take the wheel"
    )
    source = parser.parse_args().source
    if (error := import_error("sys")) is not None:
        sys.exit(f"error: Detectron2 needs PyTorch ({error}): install torch and torchvision first")
    folder = SITE / "detectron2-wheel"
    present = importlib.util.find_spec("detectron2")
    if present is not None and present.origin:
        if (error := import_error("detectron2")) is None:
            return print(f"Detectron2: kept the installation in {Path(present.origin).parent}")
        if folder not in Path(present.origin).parents:
            sys.exit(f"error: {present.origin} does not import ({error}): repair or remove it")
    reason = "no source was asked for" if source == "none" else compile_source(source)
    if reason is None:
        return print(f"Detectron2: compiled and installed {source}")
    install_wheel(folder)
    if (error := import_error("detectron2")) is not None:
        sys.exit(f"error: Detectron2 does not import ({error}): pip install '.[detectron2]' first")
    print(
        f"Detectron2: installed the wheel {WHEEL}, because {reason}; it lacks the compiled "
        "operators (rotated boxes, deformable convolution), which Mask R-CNN does not need"
    )


if __name__ == "__main__":
    main()
