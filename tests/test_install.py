"""The installation as real processes in environments of their own, without a network.

PyTorch and Detectron2's other requirements are stood in for by empty modules; the wheel is a small
one made here, whose SHA-256 takes the place of the pinned one in a copy of the script.
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
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "install_detectron2.py"
WHEEL_NAME = "sal_detectron2-0.7.2-cp310-none-any.whl"
PINNED_HASH = re.search(r'WHEEL_SHA256 = "(\w{64})"', SCRIPT.read_text()).group(1)
# Modules that the script looks for; the kept, compiled and downloaded Detectron2 need none here.
STAND_INS = re.findall(r'^    "(\w+)": "', SCRIPT.read_text(), re.MULTILINE)


def write_wheel(folder: Path) -> str:
    """Write a wheel shaped like the pinned one into ``folder``; return its SHA-256."""
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
        for module in {*STAND_INS, "torch"}.difference(real):
            (self.site / f"{module}.py").write_text("")
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
        """The file that ``import module`` finds in the environment, empty if there is none."""
        code = f"import {module}; print({module}.__file__)"
        done = subprocess.run(
            [self.python, "-c", code], cwd=self.folder, capture_output=True, text=True
        )
        return done.stdout.strip()

    @property
    def switch(self) -> Path:
        """The file that puts the wheel's folder on the path."""
        return self.site / "detectron2-wheel.pth"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fresh environment that can import PyTorch and has no Detectron2."""
    return Environment(tmp_path)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one error line of a run that must have failed without a traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_wheel_brings_only_detectron2_onto_the_path(environment: Environment) -> None:
    done = environment.install("--wheel")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "installed the wheel" in done.stdout
    assert "lacks the compiled operators" in done.stdout
    folder = environment.site / "detectron2-wheel"
    assert environment.where("detectron2") == str(folder / "detectron2" / "__init__.py")
    assert environment.where("tools") == ""
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "detectron2"]
    assert not list((folder / "detectron2").glob("_C.*")), "no torch here can load it"
    assert "/" not in environment.switch.read_text(), "the environment may be moved"


def test_second_run_keeps_what_the_first_installed(environment: Environment) -> None:
    environment.install("--wheel")
    (environment.wheels / WHEEL_NAME).unlink()
    done = environment.install("--wheel")
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
    message = error_of(environment.install("--wheel"))
    assert "no_such_module" in message
    assert "remove it" in message
    assert package.is_dir()
    assert not environment.switch.exists()


def test_folder_without_init_is_no_installation(environment: Environment) -> None:
    """A clone beside the script is importable as a namespace package."""
    (environment.script.parent / "detectron2").mkdir()
    assert environment.install("--wheel").returncode == 0
    assert environment.switch.exists()


@pytest.mark.parametrize("left", ["folder", "temporary", "switch", "broken"])
def test_interrupted_installation_is_done_again(environment: Environment, left: str) -> None:
    folder = environment.site / "detectron2-wheel"
    if left in ("folder", "broken"):
        (folder / "detectron2").mkdir(parents=True)
        (folder / "detectron2" / "half.py").write_text("")
    if left == "broken":
        (folder / "detectron2" / "__init__.py").write_text("import no_such_module\n")
    if left in ("switch", "broken"):
        environment.switch.write_text("detectron2-wheel\n")
    if left == "temporary":
        (environment.site / ".detectron2-wheel-abc").mkdir()
    done = environment.install("--wheel")
    assert done.returncode == 0, done.stderr
    assert environment.where("detectron2") == str(folder / "detectron2" / "__init__.py")
    assert not (folder / "detectron2" / "half.py").exists()
    assert not list(environment.site.glob(".detectron2-wheel-*"))


def test_wheel_with_another_hash_is_refused(environment: Environment) -> None:
    with zipfile.ZipFile(environment.wheels / WHEEL_NAME, "a") as archive:
        archive.writestr("detectron2/added.py", "print('not what was pinned')\n")
    done = environment.install("--wheel")
    assert "SHA-256" in error_of(done)
    assert environment.where("detectron2") == ""
    assert not environment.switch.exists()


def test_nothing_to_be_had_is_one_sentence(environment: Environment) -> None:
    (environment.wheels / WHEEL_NAME).unlink()
    message = error_of(environment.install("--source", "none"))
    assert "check the access to the package index" in message


def test_environment_without_torch_is_one_sentence(environment: Environment) -> None:
    (environment.site / "torch.py").unlink()
    assert "needs PyTorch" in error_of(environment.install("--wheel"))


def test_missing_requirement_that_cannot_be_had_is_named(environment: Environment) -> None:
    (environment.site / "yacs.py").unlink()
    assert "yacs>=0.1.8" in error_of(environment.install("--wheel"))


def test_without_a_compiler_the_source_is_not_tried(environment: Environment) -> None:
    done = environment.install(PATH=str(environment.folder / "bin"))
    assert done.returncode == 0, done.stderr
    assert "as there is no C++ compiler" in done.stdout


def stand_in_for_a_compiler(environment: Environment) -> dict[str, str]:
    """Settings under which the script finds a compiler and Python's headers, both empty."""
    compiler = environment.folder / "bin" / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    text = environment.script.read_text()
    here = 'Path(sysconfig.get_paths()["include"]) / "Python.h"'
    assert here in text
    environment.script.write_text(text.replace(here, "Path(__file__)"))
    return {"PATH": f"{environment.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_unreachable_source_gives_way_to_the_wheel(environment: Environment) -> None:
    gone = (environment.folder / "gone.git").as_uri()
    done = environment.install("--source", gone, **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert f"as {gone} cannot be reached" in done.stdout
    assert environment.switch.exists()


def write_source(environment: Environment, setup: str, operators: str) -> Path:
    """A repository with a Detectron2 whose compiled part is a line of Python."""
    source = environment.folder / "source"
    (source / "detectron2").mkdir(parents=True)
    (source / "setup.py").write_text(setup)
    (source / "detectron2" / "__init__.py").write_text("")
    (source / "detectron2" / "_C.py").write_text(operators)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "source"]):
        subprocess.run(["git", "-C", source, *command], check=True, capture_output=True)
    return source


SETUP = "from setuptools import setup\nsetup(name='detectron2', packages=['detectron2'])\n"


def test_source_is_built_and_left_as_it_was(environment: Environment) -> None:
    source = write_source(environment, SETUP, "")
    done = environment.install("--source", str(source), **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert f"compiled and installed from {source}" in done.stdout
    assert environment.where("detectron2") == str(environment.site / "detectron2" / "__init__.py")
    assert not environment.switch.exists()
    status = ["git", "-C", source, "status", "--porcelain", "--ignored"]
    assert subprocess.run(status, capture_output=True, text=True).stdout == ""


@pytest.mark.parametrize(
    ("setup", "operators", "reason"),
    [
        ("raise SystemExit('no <torch/all.h>')\n", "", "could not be compiled"),
        (SETUP, "raise ImportError('undefined symbol')\n", "undefined symbol"),
    ],
)
def test_failed_build_keeps_its_log_and_gives_way_to_the_wheel(
    environment: Environment, setup: str, operators: str, reason: str
) -> None:
    source = write_source(environment, setup, operators)
    done = environment.install("--source", str(source), **stand_in_for_a_compiler(environment))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if "going on with the wheel" in line]
    assert reason in line
    log = Path(re.search(r"\(log: (.+)\)", line).group(1)).read_text()
    assert "no <torch/all.h>" in log or "Successfully installed detectron2" in log
    wheel = environment.site / "detectron2-wheel" / "detectron2" / "__init__.py"
    assert environment.where("detectron2") == str(wheel)


def test_help_names_the_pins() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--source" in done.stdout
    assert "--wheel" in done.stdout


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
    assert "neither empty nor an environment" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_make_does_nothing_where_the_stamp_is_newer(tmp_path: Path) -> None:
    (tmp_path / ".flsl-d2-installed").touch()
    done = run_make("install", "PYTHON=/no/such/python", f"VENV={tmp_path}")
    assert done.returncode == 0, done.stderr


# --- what pip install . ships ---------------------------------------------------------------------


def requirement_name(line: str) -> str:
    """The normalized distribution name at the head of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", line).group()).lower()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from a copy of the tree, so that the checkout gets no build folder."""
    if int(metadata.version("setuptools").split(".")[0]) < 64:
        pytest.skip("building the wheel without a network needs setuptools 64 or newer here")
    folder = tmp_path_factory.mktemp("build")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", "flsl_d2", "configs"],
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("git does not know this tree, so which files belong to it is unknown")
    names = [*listed.stdout.splitlines(), "setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"]
    for name in names:
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(folder / "tree")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "tree" / "flsl_d2" / "model_zoo" / "configs").exists()
    return zipfile.ZipFile(next(folder.glob("*.whl")))


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


def test_wheel_requires_nothing_that_would_replace_torch(built: zipfile.ZipFile) -> None:
    text = built.read(next(n for n in built.namelist() if n.endswith("/METADATA"))).decode()
    required = re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
    assert required
    names = {requirement_name(line) for line in required}
    forbidden = {"torch", "torchvision", "triton", "detectron2", "sal-detectron2"}
    assert not names & forbidden
    assert not [name for name in names if "opencv" in name or "nvidia" in name]
    upper = [line for line in required if re.search(r"(<|==|~=)", line.split(";")[0])]
    assert not upper, "an upper bound brings a newer package of the environment down"


def test_everything_that_the_plugin_imports_is_declared() -> None:
    declared = {requirement_name(line) for line in _install_requires()}
    imported_as = {"hydra": "hydra-core", "PIL": "pillow", "yaml": "pyyaml"}
    assumed = {"torch", "torchvision", "detectron2", "cv2", "flsl_d2"}
    undeclared = set()
    for path in (ROOT / "flsl_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module]
            for top in {module.split(".")[0] for module in modules}:
                known = top in sys.stdlib_module_names or top in assumed
                if not known and requirement_name(imported_as.get(top, top)) not in declared:
                    undeclared.add((top, str(path.relative_to(ROOT))))
    assert not undeclared


def _install_requires() -> list[str]:
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no install_requires")


def test_every_pin_is_exact_and_given_once_for_each_python() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        for system in ("Linux", "Darwin"):
            machine = {"platform_system": system, "python_version": version}
            taken = [p for p in pins if p.marker is None or p.marker.evaluate(machine)]
            names = [requirement_name(pin.name) for pin in taken]
            assert len(names) == len(set(names)), (version, system)
            assert {"torch", "torchvision", "numpy", "timm", "setuptools"} <= set(names)
    assert all(re.fullmatch(r"={2,3}[^*,]+", str(pin.specifier)) for pin in pins)
