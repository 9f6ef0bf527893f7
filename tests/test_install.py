"""Installation: Detectron2's script, the Makefile's refusals, the wheel and the lock file.

The script runs in environments of its own without a network. An empty module stands for PyTorch; a
small wheel made here takes the place of the pinned one in a copy of the script.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "install_detectron2.py"
WHEEL_NAME = "sal_detectron2-0.7.2-cp310-none-any.whl"
WHEEL_ONLY = ("--source", "none")
PINNED_HASH = re.search(r'WHEEL_SHA256 = "(\w{64})"', SCRIPT.read_text()).group(1)


def write_wheel(folder: Path, changes: dict[str, str] | None = None) -> str:
    """Write a wheel shaped like the pinned one into ``folder``; return its SHA-256.

    Args:
        folder: folder of wheels.
        changes: content of members that differ from the pinned wheel's.
    """
    info = "sal_detectron2-0.7.2.dist-info"
    members = {
        "detectron2/__init__.py": "import torch\n__version__ = '0.6'\n",
        "detectron2/layers/__init__.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "not a library",
        "tools/__init__.py": "",
        f"{info}/LICENSE": "Apache-2.0",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
        "Requires-Dist: numpy<2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: cp310-none-any\n",
        f"{info}/RECORD": "",
    }
    members |= changes or {}
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL_NAME, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256((folder / WHEEL_NAME).read_bytes()).hexdigest()


class Environment:
    """A virtual environment in a folder with a blank in its name, and the script to run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my environment"
        venv.create(self.folder, with_pip=False, symlinks=True)
        self.python = self.folder / "bin" / "python"
        self.site = next(self.folder.glob("lib/python*/site-packages"))
        # pip comes from the environment of the tests: a copy of its own takes seconds to unpack.
        # Its build tools too, with their metadata: setuptools finds its commands by that.
        real = ("_distutils_hack", "packaging", "pip", "setuptools", "wheel")
        for spec in filter(None, map(importlib.util.find_spec, real)):
            package = Path(spec.origin).parent
            for path in [package, *package.parent.glob(f"{spec.name}-*.dist-info")]:
                (self.site / path.name).symlink_to(path)
        (self.site / "torch.py").write_text("")
        self.wheels = folder / "wheels"
        self.script = folder / "install_detectron2.py"
        self.script.write_text(SCRIPT.read_text().replace(PINNED_HASH, write_wheel(self.wheels)))

    def install(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run the script in the environment, with the folder of wheels as the only index."""
        settings = {
            "PATH": os.environ["PATH"],
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels.as_uri()),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return subprocess.run(
            [self.python, self.script, *arguments],
            env={**settings, **extra},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def where(self, module: str) -> str:
        """Return the file that ``import module`` finds in the environment, empty if none."""
        code = f"import {module}; print({module}.__file__)"
        done = subprocess.run(
            [self.python, "-I", "-c", code], cwd=self.folder, capture_output=True, text=True
        )
        return done.stdout.strip()

    @property
    def switch(self) -> Path:
        """The file that puts the wheel's folder on the path."""
        return self.site / "detectron2-wheel.pth"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Make a fresh environment that can import PyTorch and has no Detectron2."""
    return Environment(tmp_path)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a run that must have failed without a traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_wheel_brings_only_detectron2_onto_the_path(environment: Environment) -> None:
    done = environment.install(*WHEEL_ONLY)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "installed the wheel" in line
    assert "lacks the compiled operators" in line
    folder = environment.site / "detectron2-wheel"
    assert environment.where("detectron2") == str(folder / "detectron2" / "__init__.py")
    assert environment.where("tools") == ""
    assert [path.name for path in folder.iterdir()] == ["detectron2"]
    assert not list((folder / "detectron2").glob("_C.*")), "it is compiled for another PyTorch"
    assert "/" not in environment.switch.read_text(), "the environment may be moved"


def test_second_run_keeps_what_the_first_installed(environment: Environment) -> None:
    environment.install(*WHEEL_ONLY)
    (environment.wheels / WHEEL_NAME).unlink()
    done = environment.install(*WHEEL_ONLY)
    assert done.returncode == 0, done.stderr
    assert "kept the installation" in done.stdout


def test_detectron2_of_the_environment_is_kept(environment: Environment) -> None:
    package = environment.site / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.6+own'\n")
    done = environment.install("--source", "https://invalid.invalid/detectron2.git")
    assert done.returncode == 0, done.stderr
    assert f"kept the installation in {package}" in done.stdout
    assert not environment.switch.exists()


def test_broken_detectron2_of_the_environment_is_named_and_left_alone(
    environment: Environment,
) -> None:
    package = environment.site / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module\n")
    message = error_of(environment.install(*WHEEL_ONLY))
    assert "no_such_module" in message
    assert "remove it" in message
    assert package.is_dir()
    assert not environment.switch.exists()


def test_folder_without_init_is_no_installation(environment: Environment) -> None:
    """A clone beside the script is importable as a namespace package."""
    (environment.script.parent / "detectron2").mkdir()
    assert environment.install(*WHEEL_ONLY).returncode == 0
    assert environment.switch.exists()


@pytest.mark.parametrize("left", ["folder", "switch", "broken"])
def test_interrupted_installation_is_done_again(environment: Environment, left: str) -> None:
    folder = environment.site / "detectron2-wheel"
    if left in ("folder", "broken"):
        (folder / "detectron2").mkdir(parents=True)
        (folder / "detectron2" / "half.py").write_text("")
    if left == "broken":
        (folder / "detectron2" / "__init__.py").write_text("import no_such_module\n")
    if left in ("switch", "broken"):
        environment.switch.write_text("detectron2-wheel\n")
    done = environment.install(*WHEEL_ONLY)
    assert done.returncode == 0, done.stderr
    assert environment.where("detectron2") == str(folder / "detectron2" / "__init__.py")
    assert not (folder / "detectron2" / "half.py").exists()


def test_wheel_with_another_hash_is_refused(environment: Environment) -> None:
    with zipfile.ZipFile(environment.wheels / WHEEL_NAME, "a") as archive:
        archive.writestr("detectron2/added.py", "print('not what was pinned')\n")
    done = environment.install(*WHEEL_ONLY)
    assert "could not install sal-detectron2" in error_of(done)
    assert "HASHES" in done.stderr, "pip says that the hash differs"
    assert environment.where("detectron2") == ""
    assert not environment.switch.exists()


def test_nothing_to_be_had_is_one_sentence(environment: Environment) -> None:
    (environment.wheels / WHEEL_NAME).unlink()
    message = error_of(environment.install(*WHEEL_ONLY))
    assert "check the access to the package index" in message
    assert not environment.switch.exists()


def test_environment_without_torch_is_one_sentence(environment: Environment) -> None:
    (environment.site / "torch.py").unlink()
    assert "needs PyTorch" in error_of(environment.install(*WHEEL_ONLY))


def test_missing_requirement_is_named_with_the_remedy(environment: Environment) -> None:
    content = {"detectron2/__init__.py": "import yacs\n"}
    digest = write_wheel(environment.wheels, content)
    text = environment.script.read_text()
    environment.script.write_text(re.sub(r"[0-9a-f]{64}", digest, text))
    message = error_of(environment.install(*WHEEL_ONLY))
    assert "No module named 'yacs'" in message
    assert "pip install '.[detectron2]'" in message


def test_without_a_compiler_the_source_is_not_tried(environment: Environment) -> None:
    done = environment.install(PATH=str(environment.folder / "bin"))
    assert done.returncode == 0, done.stderr
    assert "because there is no C++ compiler" in done.stdout


def stand_in_for_a_compiler(environment: Environment) -> dict[str, str]:
    """Return settings under which the script finds a compiler and Python's headers."""
    compiler = environment.folder / "bin" / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    text = environment.script.read_text()
    here = 'Path(sysconfig.get_paths()["include"], "Python.h")'
    assert here in text
    environment.script.write_text(text.replace(here, "Path(__file__)"))
    return {"PATH": f"{environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_unreachable_source_gives_way_to_the_wheel(environment: Environment) -> None:
    gone = (environment.folder / "gone.git").as_uri()
    done = environment.install("--source", gone, **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert f"because {gone} cannot be reached" in done.stdout
    assert environment.switch.exists()


def write_source(environment: Environment, setup: str, operators: str) -> Path:
    """Write a source folder of a Detectron2 whose compiled part is a line of Python."""
    source = environment.folder / "source"
    (source / "detectron2").mkdir(parents=True)
    (source / "setup.py").write_text(setup)
    (source / "detectron2" / "__init__.py").write_text("")
    (source / "detectron2" / "_C.py").write_text(operators)
    return source


SETUP = "from setuptools import setup\nsetup(name='detectron2', packages=['detectron2'])\n"


def test_source_is_built(environment: Environment) -> None:
    source = write_source(environment, SETUP, "")
    done = environment.install("--source", str(source), **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert f"compiled and installed {source}" in done.stdout
    assert environment.where("detectron2") == str(environment.site / "detectron2" / "__init__.py")
    assert not environment.switch.exists()


@pytest.mark.parametrize(
    ("setup", "operators", "reason"),
    [
        ("raise SystemExit('no <torch/all.h>')\n", "", "could not be compiled"),
        (SETUP, "raise ImportError('undefined symbol')\n", "undefined symbol"),
    ],
)
def test_failed_build_gives_way_to_the_wheel(
    environment: Environment, setup: str, operators: str, reason: str
) -> None:
    source = write_source(environment, setup, operators)
    done = environment.install("--source", str(source), **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout.splitlines()[-1]
    assert not list(environment.site.glob("detectron2-*.dist-info")), "the build is still there"
    wheel = environment.site / "detectron2-wheel" / "detectron2" / "__init__.py"
    assert environment.where("detectron2") == str(wheel)


# --- make ----------------------------------------------------------------------------------------


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout."""
    return subprocess.run(
        ["make", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=60
    )


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = run_make("install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "error:" in done.stderr
    assert "is not a Python 3.10 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_does_not_take_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    done = run_make("install", f"PYTHON={sys.executable}", f"VENV={tmp_path}")
    assert done.returncode != 0
    assert "was not made here and is left as it is" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_make_does_nothing_where_the_stamp_is_newer(tmp_path: Path) -> None:
    (tmp_path / ".flsl-d2-installed").touch()
    done = run_make("install", "PYTHON=/no/such/python", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr


# --- what pip install . ships ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(wheel: Path) -> zipfile.ZipFile:
    """Open the wheel."""
    return zipfile.ZipFile(wheel)


def test_wheel_holds_the_plugin_and_its_configs_and_nothing_else(built: zipfile.ZipFile) -> None:
    names = built.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"flsl_d2"}
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
        ("flsl_d2", {"export", "evaluation", "formats", "remote"}),
        ("pretrain", {"pretrain", "methods"}),
    ],
)
def test_everything_imported_is_declared(
    folder: str, extras: set[str], requirements: list[Requirement]
) -> None:
    taken = [r for r in requirements if r.marker is None or set(extras_of(r)) & extras]
    imported_as = {"hydra": "hydra-core", "PIL": "pillow", "yaml": "pyyaml"}
    imported_as |= {"faster_coco_eval": "faster-coco-eval", "skimage": "scikit-image"}
    # Users install these two by hand: one is not kept up, the other brings an OpenCV of its own.
    by_hand = {"lvis", "supervision"}
    imported = imported_by(folder) - {"flsl_d2", "pretrain"} - by_hand
    assert {imported_as.get(name, name) for name in imported} <= names_of(taken)


def extras_of(requirement: Requirement) -> list[str]:
    """Return the extras that bring a requirement."""
    return re.findall(r'extra == "(\w+)"', str(requirement.marker))


PLATFORMS = [("Linux", "linux", "x86_64"), ("Darwin", "darwin", "arm64")]


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
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
