"""Tools are thin files over modules, and the package needs neither them nor ``pretrain``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from flsl_d2.engine.command_line import SHARED_OPTIONS

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
    spec = find_spec(MODULES[tool])
    assert spec is not None
    functions = [n.name for n in tree(Path(spec.origin)).body if isinstance(n, ast.FunctionDef)]
    assert "main" in functions


def test_the_package_needs_no_checkout():
    for path in (ROOT / "flsl_d2").rglob("*.py"):
        names = [name.partition(".")[0] for name in imported(path)]
        assert not {"pretrain", "tools", "tests"} & set(names), path


def test_shared_options_are_declared_once():
    """No tool spells out an option that :data:`SHARED_OPTIONS` has."""
    for path in [*(ROOT / "flsl_d2").rglob("*.py"), *(ROOT / "pretrain").rglob("*.py")]:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Attribute | ast.Name
            ):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("add", "add_argument"):
                options = {a.value for a in node.args if isinstance(a, ast.Constant)}
                assert not options & set(SHARED_OPTIONS), (path, node.lineno)
