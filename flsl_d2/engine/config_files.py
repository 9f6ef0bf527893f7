"""Finding and loading config files; every unknown key is an error before anything is built.

``LazyConfig.apply_overrides`` creates whatever key it is given, so a typing error would train with
the default.
"""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, Node

from flsl_d2.engine.overrides import apply_lazy_overrides
from flsl_d2.errors import InputError
from flsl_d2.files import expand_home

# A wheel carries a copy of the checkout's folder.
_SHIPPED = Path(__file__).parents[1] / "model_zoo" / "configs"
CONFIGS_FOLDER = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[2] / "configs"


def resolve_config_path(path: str) -> str:
    """Find a config file by its path, or by its name relative to the ``configs`` folder.

    Raises:
        InputError: there is no such file, or it is neither ``.py`` nor ``.yaml``.
    """
    if not path:
        raise InputError("no config file was given; add --config-file configs/....py or ....yaml.")
    name = path.removeprefix("./").removeprefix("configs/")  # from any folder
    for candidate in (Path(path).expanduser(), CONFIGS_FOLDER / name):
        if candidate.is_file():
            if candidate.suffix not in (".py", ".yaml", ".yml"):
                raise InputError(
                    f"config file {path!r} ends in {candidate.suffix!r}; give a LazyConfig .py "
                    "or a .yaml file."
                )
            return str(candidate)
    shipped = {
        file.name: str(file.relative_to(CONFIGS_FOLDER.parent))
        for file in CONFIGS_FOLDER.rglob("*")
        if file.suffix in (".py", ".yaml")
    }
    close = difflib.get_close_matches(Path(path).name, shipped, n=1)
    hint = f"did you mean {shipped[close[0]]}?" if close else "`flsl-d2 recipes` lists all."
    raise InputError(f"config file {path!r} does not exist; {hint}")


def is_yaml(path: str) -> bool:
    """Whether a config file is YAML; the other kind is a LazyConfig ``.py``."""
    return path.endswith((".yaml", ".yml"))


def load_lazy_config(path: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a LazyConfig file, apply overrides, and replace ``~`` at the start of paths.

    Raises:
        InputError: a missing file, a syntax error in it, or an override that cannot be applied.
    """
    path = resolve_config_path(path)
    if is_yaml(path):
        raise InputError(f"config file {path!r} is YAML, and this tool takes a LazyConfig .py.")
    with _restored_import():
        try:
            cfg = LazyConfig.load(path)
        except SyntaxError as error:
            # Detectron2's own sentence names the file, and its cause the line.
            cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
            raise InputError(
                f"{str(error).rstrip('!')}: {cause.msg} in line {cause.lineno}; correct it."
            ) from error
    _expand_home_in(apply_lazy_overrides(cfg, overrides))
    return cfg


def call_target(node: DictConfig) -> Any:
    """Return the function or class that a call in a LazyConfig names."""
    target = node["_target_"]
    return locate(target) if isinstance(target, str) else target


def _expand_home_in(node: DictConfig | ListConfig) -> None:
    """Replace ``~`` at the start of every text of a config; no other text begins with it."""
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            if not child._is_none() and not child._is_interpolation():
                _expand_home_in(child)
        elif isinstance(child, Node) and str(child._value()).startswith("~"):
            node[key] = expand_home(child._value())


@contextmanager
def _restored_import() -> Iterator[None]:
    """Undo LazyConfig's patch of Python's import, which stays in place after an exception."""
    original = builtins.__import__
    try:
        yield
    finally:
        builtins.__import__ = original
