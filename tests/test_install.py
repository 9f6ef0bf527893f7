"""Installation: Detectron2's script, the Makefile's refusals, the wheel and the lock file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flsl_d2 import install_detectron2 as script
from flsl_d2.modeling import FLSLViT
from flsl_d2.weights import write_encoder

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def command(*words: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], capture_output=True, text=True, **options)


def test_the_pinned_wheel_is_installed_alone(tmp_path, monkeypatch, capsys) -> None:
    """Nothing but Detectron2 comes onto the path; what is there is kept."""
    members = ("detectron2/__init__.py", "detectron2/_C.cpython-310.so", "tools/__init__.py")

    def pip(*arguments) -> bool:
        pinned = Path(arguments[arguments.index("-r") + 1]).read_text()
        assert pinned == f"{script.WHEEL} --hash=sha256:{script.WHEEL_SHA256}\n"
        assert "--require-hashes" in arguments
        for name in (*members, "sal_detectron2-0.7.2.dist-info/METADATA"):
            (arguments[-1] / name).parent.mkdir(parents=True, exist_ok=True)
            (arguments[-1] / name).touch()
        return True

    def main(*errors: str | None) -> str:
        """Run the script where imports have these errors, one after the other."""
        monkeypatch.setattr(script, "import_error", lambda _: each.pop(0))
        each = [*errors]
        script.main()
        return capsys.readouterr().out

    monkeypatch.setattr(script, "pip", pip)
    monkeypatch.setattr(script, "SITE", tmp_path)
    monkeypatch.setattr("sys.argv", ["install", "--source", "none"])
    assert "kept the installation" in main(None, None)
    with pytest.raises(SystemExit, match="needs PyTorch"):
        main("no module torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "installed the wheel" in main(None, None)
    (folder,) = (tmp_path / "detectron2-wheel").iterdir()
    # Its operators are compiled for another PyTorch.
    assert (folder.name, [file.name for file in folder.iterdir()]) == (
        "detectron2",
        ["__init__.py"],
    )
    assert (tmp_path / "detectron2-wheel.pth").read_text() == "detectron2-wheel\n"


def test_make_refuses_an_old_python_and_a_folder_of_other_things(tmp_path: Path) -> None:
    old, used = tmp_path / "python3.9", tmp_path / "used"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    used.mkdir()
    (used / "thesis.tex").write_text("")
    for python, folder, reason in (
        (old, tmp_path / "venv", "is not a Python 3.10 or newer"),
        (sys.executable, used, "was not made here and is left as it is"),
    ):
        done = command("make", "-C", ROOT, "install", f"PYTHON={python}", f"VENV={folder}")
        assert done.returncode != 0
        assert reason in done.stderr
    assert not (tmp_path / "venv").exists()
    assert [path.name for path in used.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The package's wheel, built from a copy so that the checkout gets no build folder."""
    shipped = ("flsl_d2", "flsl_d2_cli.py", "pretrain", "configs")
    listed = command("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard", *shipped)
    if listed.returncode != 0:
        pytest.skip("git does not know this tree, so which files belong to it is unknown")
    folder = tmp_path_factory.mktemp("wheel")
    named = ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md")
    for name in (*listed.stdout.splitlines(), *named):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    done = command(sys.executable, "-c", build, cwd=folder / "tree")
    assert done.returncode == 0, done.stderr
    assert not (folder / "tree" / "flsl_d2" / "model_zoo" / "configs").exists()
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_the_packages_and_the_configs_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"flsl_d2", "flsl_d2_cli.py", "pretrain"}
    assert any(name.endswith("/LICENSE") for name in names)
    configs = {f"flsl_d2/model_zoo/{path.relative_to(ROOT)}" for path in CONFIGS.rglob("*.py")}
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "flsl_d2").rglob("*.*") if p.is_file()}
    wanted = configs | {name for name in data if "__pycache__" not in name}
    assert wanted <= {*names}, "templates, styles and the marker of types are shipped"


INSTALLED = """
import sys
installed, tests, *arguments = sys.argv[1:]
sys.path.insert(0, installed)
import flsl_d2, flsl_d2.detection.train, flsl_d2.model_zoo as zoo
assert flsl_d2.__file__.startswith(installed)
from detectron2.data import DatasetCatalog
known = {"pennfudan_val", "uavdt_test", "objects365_train", "imagenet_boxes_val"}
assert not known & {*DatasetCatalog}, "an import registers nothing"
DatasetCatalog.register("objects365_train", list)  # a host project's own
from flsl_d2.annotations.datasets import check_registered_name
for name in known:
    check_registered_name(name)
    assert name in DatasetCatalog
assert DatasetCatalog["objects365_train"] is list
for path in sorted(zoo.configs_folder().rglob("*.*")):
    name = path.relative_to(zoo.configs_folder())
    # Those of pre-training need the checkout.
    if not {"common", "pretrain", "demo", "__pycache__"} & set(name.parts):
        cfg = zoo.get_config(str(name))
        built = "ROI_HEADS" in cfg.MODEL if name.suffix == ".yaml" else cfg.train.max_iter > 0
        print("recipe" if built else "unreadable", name)
sys.path.append(tests)
import forked  # jobs run in this process's children, which saves their imports
from flsl_d2.studies import compare, machine
machine.subprocess = forked.FORKED_SUBPROCESS
compare.main(arguments)
"""


def test_an_installed_wheel_reads_recipes_and_compares(wheel, scenes_root, tmp_path):
    """In an empty folder, from the installed files alone."""
    wheel.extractall(tmp_path / "installed")
    write_encoder(FLSLViT(img_size=48, embed_dim=32, depth=1, num_heads=2), tmp_path / "a.pth")
    (tmp_path / "empty").mkdir()
    data = "--train flsl_scenes_train --val flsl_scenes_val --max-images 4 --short-side 96"
    given = "--device cpu --output out --measures knn_segmentation --pictures 1 --weights"
    settings = {"DETECTRON2_DATASETS": str(scenes_root), "PYTHONPATH": str(tmp_path / "installed")}
    done = command(
        *(sys.executable, "-c", INSTALLED, tmp_path / "installed", ROOT / "tests"),
        *(*data.split(), *given.split(), f"one={tmp_path / 'a.pth'}"),
        cwd=tmp_path / "empty",
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shipped = {Path(name) for name in re.findall("^recipe (.+)", done.stdout, re.MULTILINE)}
    files = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.*")}
    held_back = {"common", "pretrain", "demo"}
    assert shipped == {
        name for name in files if name.suffix != ".pyc" and not held_back & set(name.parts)
    }
    assert {"lvis", "objects365", "uavdt", "ade20k", "coco"} == {name.parts[0] for name in shipped}
    (log,) = (file.read_text() for file in (tmp_path / "empty/out").glob("jobs/*/console.txt"))
    assert " -m flsl_d2.evaluation " in log
    assert not any(str(ROOT / part) in log for part in ("tools", "flsl_d2"))
    assert "</html>" in (tmp_path / "empty" / "out" / "index.html").read_text()


@pytest.fixture(scope="module")
def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    """What the wheel declares, extras included."""
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))).decode()
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
        ("flsl_d2", "cluster export evaluation formats remote video"),
        ("pretrain", "pretrain methods"),
    ],
)
def test_everything_imported_is_declared(folder, extras, requirements: list[Requirement]) -> None:
    extra_of = [re.search(r'extra == "(\w+)"', str(r.marker)) for r in requirements]
    pairs = zip(requirements, extra_of, strict=True)
    taken = [r for r, extra in pairs if r.marker is None or (extra and extra[1] in extras.split())]
    imported_as = {"hydra": "hydra-core", "PIL": "pillow", "yaml": "pyyaml"}
    imported_as |= {"skimage": "scikit-image", "sklearn": "scikit-learn", "faiss": "faiss-cpu"}
    # Users install these two by hand: one is not kept up, the other brings an OpenCV of its own.
    by_hand = {"lvis", "supervision"}
    imported = imported_by(folder) - {"flsl_d2", "flsl_d2_cli", "pretrain"} - by_hand
    assert {imported_as.get(name, name.replace("_", "-")) for name in imported} <= names_of(taken)


@pytest.mark.parametrize("version", ["3.10", "3.13"])
@pytest.mark.parametrize("platform", ["Linux linux x86_64", "Darwin darwin arm64"])
def test_lock_pins_everything_declared_once(version, platform, requirements) -> None:
    system, name, machine = platform.split()
    where = {"python_version": version, "python_full_version": f"{version}.9"}
    where |= {"platform_system": system, "sys_platform": name, "platform_machine": machine}
    lines = re.findall(r"^([a-z][^\\\n]+?) *\\$", (ROOT / "requirements.lock").read_text(), re.M)
    pins = [Requirement(line) for line in lines]
    there = [r for r in pins if r.marker is None or r.marker.evaluate(where)]
    taken = {r.name: r for r in there}
    assert len(taken) == len(there)
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
    assert {"torch", "torchvision", "setuptools"} <= set(taken)
    for requirement in requirements:
        (pin,) = names_of([requirement])
        locked = next(iter(taken[pin].specifier)).version
        assert requirement.specifier.contains(locked), f"{requirement} is locked at {locked}"
