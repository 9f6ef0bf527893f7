"""Identities by content: hashes of files, data sets and configs, and versions of the software."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import detectron2
import timm
import torch
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig

import flsl_d2
from flsl_d2.annotations.datasets import register_known
from flsl_d2.engine.run_folder import flat_config
from flsl_d2.files import file_sha256

# Metadata of registered data sets: files and folders of labels, which are read, and folders of
# pictures, which are listed with their sizes.
_LABELS = ("json_file", "panoptic_json", "sem_seg_root", "panoptic_root")
_PICTURES = ("image_root",)


@cache
def versions() -> dict[str, str]:
    """Return the versions of the software that computes the numbers.

    The commit is among them in a git checkout only; ``+changes`` behind it says that files differ
    from it.
    """
    packages = (flsl_d2, torch, detectron2, timm)
    found = {package.__name__: str(package.__version__) for package in packages}
    root = Path(flsl_d2.__file__).parents[1]
    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    # The repository around an installed package is someone else's.
    if (root / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            found["commit"] = subprocess.check_output(
                describe, cwd=root, stderr=subprocess.DEVNULL, text=True, timeout=10
            ).strip()
    return found


def sha256_of(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of all parts together, in hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def folder_sha256(root: str | os.PathLike[str], read: bool) -> str:
    """Return a hash of the files below a folder, by their names from there on.

    Args:
        read: whether the files are read; otherwise their sizes stand for them, which is quick for
            pictures and does not notice one that is replaced by another of the same size.
    """

    def parts() -> Iterator[bytes]:
        for file in sorted(p for p in Path(root).rglob("*") if p.is_file()):
            content = file_sha256(file) if read else str(file.stat().st_size)
            yield f"{file.relative_to(root)}\0{content}\0".encode("utf-8", "surrogateescape")

    return sha256_of(parts())


def data_identity(name: str) -> dict[str, str]:
    """Return what decides results on a data set: hashes of its labels and of its list of pictures.

    The name alone stands for a data set without files that are known.

    Args:
        name: registered data set, ``ANNOTATIONS.json:IMAGES``, or folder of pictures by class.
    """
    register_known(name)
    folder = Path(name).expanduser()
    if name not in MetadataCatalog.list() and folder.is_dir():
        return {"pictures": folder_sha256(folder, read=False)}
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else {}
    found = {}
    for key in (*_LABELS, *_PICTURES):
        path = Path(str(metadata.get(key) or "/nowhere")).expanduser()
        if path.is_file():
            found[key] = file_sha256(path)
        elif path.is_dir():
            found[key] = folder_sha256(path, read=key in _LABELS)
    return found or {"name": name}


def result_settings(cfg: DictConfig, without: Iterable[str]) -> dict[str, str]:
    """Return the values of a config that a result depends on, for the settings of a job.

    ``without`` are patterns (``fnmatch``) of keys that do not change the result.
    """
    patterns = tuple(without)
    pairs = flat_config(cfg).items()
    return {k: v for k, v in pairs if not any(fnmatchcase(k, pattern) for pattern in patterns)}
