"""What software and which files a number comes from."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path

import detectron2
import timm
import torch

import flsl_d2

__all__ = ["file_sha256", "versions"]


@cache
def versions() -> dict[str, str]:
    """Versions of what computes the numbers; "commit" only in a git checkout.

    A commit with ``+changes`` had files that differ from it.
    """
    packages = (flsl_d2, torch, detectron2, timm)
    found = {package.__name__: str(package.__version__) for package in packages}
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        found["commit"] = commit + ("+changes" if changed else "")
    return found


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _git(*arguments: str) -> str:
    folder = Path(flsl_d2.__file__).parents[1]
    if not (folder / ".git").exists():  # an installed package inside someone else's repository
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
