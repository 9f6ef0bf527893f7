"""Installation: the Makefile's refusals, the wheel and the lock file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def test_make_refuses_an_old_python_and_a_folder_of_other_things(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    cases = ((old, tmp_path / "new", "is not a Python 3.10"),
             (sys.executable, tmp_path, "was not made here"))  # fmt: skip
    for python, folder, text in cases:
        command = ["make", "-C", ROOT, "install", f"PYTHON={python}", f"VENV={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert text in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["python3.9"]


@pytest.fixture(scope="module")
def built(wheel: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel)


def test_wheel_holds_the_packages_and_the_configs_and_nothing_else(built: zipfile.ZipFile) -> None:
    names = built.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"flsl_d2", "flsl_d2_cli.py", "pretrain"}
    tracked = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.py")}
    prefix = "flsl_d2/model_zoo/configs/"
    shipped = {Path(name[len(prefix) :]) for name in names if name.startswith(prefix)}
    assert tracked
    assert tracked <= shipped
    assert any(name.endswith("/LICENSE") for name in names)
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "flsl_d2").rglob("*.*") if p.is_file()}
    data = {name for name in data if "__pycache__" not in name}
    assert data <= set(names), "templates, styles and the marker of types are shipped"


@pytest.fixture(scope="module")
def requirements(built: zipfile.ZipFile) -> list[Requirement]:
    """Read what the wheel declares, extras included."""
    text = built.read(next(n for n in built.namelist() if n.endswith("/METADATA"))).decode()
    return [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)]


def names_of(requirements: Iterable[Requirement]) -> set[str]:
    """Return the normalized names of distributions."""
    return {re.sub(r"[-_.]+", "-", requirement.name).lower() for requirement in requirements}


def test_wheel_requires_nothing_that_would_replace_torch(requirements: list[Requirement]) -> None:
    base = [requirement for requirement in requirements if requirement.marker is None]
    assert base
    assert not names_of(base) & {"torch", "torchvision", "triton", "detectron2", "sal-detectron2"}
    assert not [name for name in names_of(base) if "opencv" in name or "nvidia" in name]
    upper = [str(line) for line in base if re.search(r"<|==|~=", str(line.specifier))]
    assert not upper, "an upper bound brings a newer package of the environment down"


def imported_by(folder: str) -> set[str]:
    """Return the top-level modules that the Python files of a folder import."""
    modules = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    return modules - sys.stdlib_module_names - {"torch", "torchvision", "detectron2", "cv2"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("flsl_d2", {"cluster", "export", "evaluation", "formats", "remote", "video"}),
        ("pretrain", {"pretrain", "methods"}),
    ],
)
def test_everything_imported_is_declared(
    folder: str, extras: set[str], requirements: list[Requirement]
) -> None:
    taken = [r for r in requirements if r.marker is None or set(extras_of(r)) & extras]
    imported_as = {"hydra": "hydra-core", "PIL": "pillow", "yaml": "pyyaml"}
    imported_as |= {"faster_coco_eval": "faster-coco-eval", "skimage": "scikit-image"}
    imported_as |= {"sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    imported_as["huggingface_hub"] = "huggingface-hub"
    # Users install these two by hand: one is not kept up, the other brings an OpenCV of its own.
    by_hand = {"lvis", "supervision"}
    imported = imported_by(folder) - {"flsl_d2", "flsl_d2_cli", "pretrain"} - by_hand
    assert {imported_as.get(name, name) for name in imported} <= names_of(taken)


def extras_of(requirement: Requirement) -> list[str]:
    """Return the extras that bring a requirement."""
    return re.findall(r'extra == "(\w+)"', str(requirement.marker))


PLATFORMS = [("Linux", "linux", "x86_64"), ("Darwin", "darwin", "arm64")]


@pytest.mark.parametrize("version", ["3.10", "3.13"])
@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform[0])
def test_lock_pins_everything_declared_once(
    version: str, platform: tuple[str, str, str], requirements: list[Requirement]
) -> None:
    system, name, machine = platform
    where = {"python_version": version, "python_full_version": f"{version}.9"}
    where |= {"platform_system": system, "sys_platform": name, "platform_machine": machine}
    lines = re.findall(r"^([a-z][^\\\n]+?) *\\$", (ROOT / "requirements.lock").read_text(), re.M)
    pins = [Requirement(line) for line in lines]
    taken = {r.name: r for r in pins if r.marker is None or r.marker.evaluate(where)}
    assert len(taken) == sum(r.marker is None or r.marker.evaluate(where) for r in pins)
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
    assert {"torch", "torchvision", "setuptools"} <= set(taken)
    for requirement in requirements:
        (pin,) = names_of([requirement])
        locked = next(iter(taken[pin].specifier)).version
        assert requirement.specifier.contains(locked), f"{requirement} is locked at {locked}"
