"""Tools are thin files over modules, and the package needs neither them nor ``pretrain``."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import flsl_d2_cli
from flsl_d2.engine.command_line import SHARED_OPTIONS
from flsl_d2.engine.config_files import load_lazy_config, resolve_config_path
from flsl_d2.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "benchmark": "pretrain.studies.benchmark.__main__",
    "compare": "flsl_d2.studies.compare",
    "convert_checkpoint": "flsl_d2.export.convert",
    "demo": "pretrain.studies.demo",
    "export_model": "flsl_d2.export.__main__",
    "eval_davis": "flsl_d2.evaluation.davis.__main__",
    "eval_features": "flsl_d2.evaluation.__main__",
    "finetune": "flsl_d2.detection.finetune",
    "make_shards": "flsl_d2.images.shards",
    "predict": "flsl_d2.detection.predict",
    "pretrain_net": "pretrain.__main__",
    "sweep": "pretrain.studies.sweep",
    "train_net": "flsl_d2.detection.__main__",
    "visualize": "flsl_d2.visualization.__main__",
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("tool", MODULES)
def test_a_tool_runs_the_main_of_a_module(tool):
    path = ROOT / "tools" / f"{tool}.py"
    assert MODULES[tool] in imported(path)
    assert len(path.read_text().splitlines()) < 15
    assert "main" in functions_of(MODULES[tool])


def test_the_package_needs_no_checkout():
    for path in (ROOT / "flsl_d2").rglob("*.py"):
        names = [name.partition(".")[0] for name in imported(path)]
        assert not {"pretrain", "tools", "tests"} & set(names), path


def test_shared_options_are_declared_once():
    """No tool spells out an option that :data:`SHARED_OPTIONS` has."""
    for path in [*(ROOT / "flsl_d2").rglob("*.py"), *(ROOT / "pretrain").rglob("*.py")]:
        for node in ast.walk(tree(path)):
            called = getattr(node, "func", None)
            if getattr(called, "attr", getattr(called, "id", "")) in ("add", "add_argument"):
                options = {a.value for a in node.args if isinstance(a, ast.Constant)}
                assert not options & set(SHARED_OPTIONS), (path, node.lineno)


def functions_of(module: str) -> set[str]:
    return {
        node.name for node in tree(Path(find_spec(module).origin)).body if hasattr(node, "name")
    }


def test_every_command_is_the_main_of_a_module():
    for module, text in flsl_d2_cli.COMMANDS.values():
        assert text
        assert not module or "main" in functions_of(module), module
    assert {module for module, _ in flsl_d2_cli.COMMANDS.values()} >= {
        MODULES[tool] for tool in MODULES if tool != "convert_checkpoint"
    }


def test_help_and_recipes_import_nothing_heavy():
    code = "import sys, flsl_d2_cli; flsl_d2_cli.main(sys.argv[1:]); print(*sys.modules)"
    for arguments in (["--help"], ["recipes", "mae"]):
        command = [sys.executable, "-c", code, *arguments]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        assert not {"torch", "detectron2", "flsl_d2", "numpy"} & set(printed.split())
        assert ("MAE pre-training" in printed) == (arguments[0] == "recipes")


@pytest.mark.parametrize(
    "name", ["pretrain/mae_vit_small_p16_in1k.py", "coco/faster_rcnn_flsl_vit_s16_1x.py"]
)
def test_a_copied_recipe_is_the_recipe(name, tmp_path, capsys):
    target = tmp_path / "own" / "mine.py"
    assert flsl_d2_cli.main(["recipes", "--copy", name, str(target)]) == 0
    mine, own = (load_lazy_config(path) for path in (str(target), name))
    assert OmegaConf.to_yaml(mine, sort_keys=True) == OmegaConf.to_yaml(own, sort_keys=True)
    assert flsl_d2_cli.main(["recipes", "--copy", name, str(target)]) == 2
    assert flsl_d2_cli.main(["recipes", "--copy", f"{name}x", "x.py"]) == 2
    assert "exists" in (errors := capsys.readouterr().err)
    assert f"did you mean {name}?" in errors


def test_a_wrong_command_names_the_closest(capsys):
    assert flsl_d2_cli.main(["predct"]) == 2
    assert "did you mean predict?" in capsys.readouterr().err


def test_the_checkout_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "ade20k/semantic_fpn_flsl_vit_s16_40k.py"
    assert Path(resolve_config_path(f"configs/{name}")).samefile(ROOT / "configs" / name)
    with pytest.raises(InputError, match="did you mean configs/ade20k/sem"):
        resolve_config_path("semantic_fpn_flsl_vit_s16_40k.py")


def test_the_same_option_has_the_same_name_everywhere(monkeypatch, capsys):
    """An option that only one tool has, or that all spell alike, is no synonym of another."""
    found = {}
    for name, (module, _) in flsl_d2_cli.COMMANDS.items():
        if module.startswith(("flsl_d2.", "pretrain.")) and not name.startswith(("doc", "inst")):
            with pytest.raises(SystemExit):
                importlib.import_module(module).main(["--help"])
            found[name] = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    synonyms = "out output-dir out-dir iters steps max-iters img-size gpu gpus threshold"
    synonyms = {f"--{word}" for word in f"{synonyms} model-weights checkpoint".split()}
    assert not [(n, bad) for n, options in found.items() if (bad := options & synonyms)]
    for name in ("pretrain", "train", "finetune"):
        assert {"--output", "--max-iter", "--device", "--num-gpus"} <= found[name], name
    for name in ("visualize", "evaluate", "davis", "predict"):
        assert {"--device", "--short-side"} <= found[name], name
