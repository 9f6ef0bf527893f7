"""Loading config files, with every unknown key and unusable value found before anything is built.

``LazyConfig.apply_overrides`` creates whatever key it is given, so a typo trains with the default;
yacs stops at the first unknown key.
"""

from __future__ import annotations

import builtins
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from omegaconf import DictConfig

from flsl_d2.detection.own_data import add_own_data_config
from flsl_d2.detection.solver import add_solver_config
from flsl_d2.engine.overrides import apply_lazy_overrides, unknown_keys_error
from flsl_d2.errors import InputError
from flsl_d2.modeling import add_flsl_config

__all__ = [
    "CONFIGS_FOLDER",
    "is_yaml",
    "load_config",
    "load_lazy_config",
    "load_yaml_config",
    "resolve_config_path",
]

# A wheel carries a copy of the checkout's folder.
_SHIPPED = Path(__file__).parents[1] / "model_zoo" / "configs"
CONFIGS_FOLDER = _SHIPPED if _SHIPPED.is_dir() else Path(__file__).parents[2] / "configs"


def resolve_config_path(path: str) -> str:
    """The config file that a user means.

    Args:
        path: as given, or relative to the ``configs`` folder of the checkout.

    Raises:
        InputError: no such file, or neither ``.py`` nor ``.yaml``.
    """
    if not path:
        raise InputError("no config file was given; add --config-file configs/....py or ....yaml.")
    for candidate in (Path(path).expanduser(), CONFIGS_FOLDER / path):
        if candidate.is_file():
            if candidate.suffix not in (".py", ".yaml", ".yml"):
                raise InputError(
                    f"config file {path!r} ends in {candidate.suffix!r}; give a LazyConfig .py "
                    "or a .yaml file."
                )
            return str(candidate)
    shipped = {p.name: str(p.relative_to(CONFIGS_FOLDER.parent)) for p in _shipped_configs()}
    close = difflib.get_close_matches(Path(path).name, shipped, n=1)
    hint = f"did you mean {shipped[close[0]]}" if close else "check the path"
    raise InputError(f"config file {path!r} does not exist; {hint}?")


def is_yaml(path: str) -> bool:
    """Whether a config file is of the YAML kind (the other is LazyConfig ``.py``)."""
    return path.endswith((".yaml", ".yml"))


def load_config(path: str, overrides: Sequence[str] = ()) -> DictConfig | CfgNode:
    """A config of either kind; see :func:`load_lazy_config` and :func:`load_yaml_config`."""
    return (load_yaml_config if is_yaml(path) else load_lazy_config)(path, overrides)


def load_lazy_config(path: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a LazyConfig file and apply overrides.

    Args:
        path: see :func:`resolve_config_path`.
        overrides: ``key=value``; see
            :func:`flsl_d2.engine.overrides.apply_lazy_overrides`.

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
            cause = error.__cause__ or error  # Detectron2's own sentence names the file
            raise InputError(
                f"{str(error).rstrip('!')}: {cause.msg} in line {cause.lineno}; correct it."
            ) from error
    return apply_lazy_overrides(cfg, overrides)


def load_yaml_config(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Load a YAML config over Detectron2's defaults and this project's nodes.

    Args:
        path: see :func:`resolve_config_path`. Plain YAML only, no tags that run code.
        overrides: ``[KEY, VALUE, KEY, VALUE, ...]``.

    Raises:
        InputError: a missing or broken file, unknown keys (all of them at once), or a value of
            another type than the one it replaces.
    """
    path = resolve_config_path(path)
    cfg = get_cfg()
    add_flsl_config(cfg)
    add_solver_config(cfg)
    add_own_data_config(cfg)
    try:
        loaded = dict(CfgNode.load_yaml_with_base(path, allow_unsafe=False))
    except (yaml.YAMLError, AssertionError, OSError, TypeError, ValueError) as error:
        raise InputError(
            f"config file {path!r} cannot be read as YAML: {_one_line(error)}; correct it."
        ) from error
    keys = overrides[::2]
    odd = next((key for key in keys if "=" in key), None)
    if odd is not None or len(overrides) % 2:
        raise InputError(
            f"overrides of a YAML config are pairs KEY VALUE, but {odd or overrides[-1]!r} is not "
            "followed by a value; write for example SOLVER.MAX_ITER 100."
        )
    known = list(_paths(cfg))
    unknown = [path for path in [*_paths(loaded), *keys] if path not in known]
    if unknown:
        raise unknown_keys_error(_topmost(unknown), known, remedy=f" ({path})")
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
        cfg.merge_from_list(list(overrides))
    except (ValueError, KeyError, AssertionError) as error:
        raise InputError(
            f"a value in {path!r} or its overrides cannot be used: {_one_line(error)}"
        ) from error
    return cfg


def _shipped_configs() -> Iterator[Path]:
    for suffix in (".py", ".yaml"):
        yield from CONFIGS_FOLDER.rglob(f"*{suffix}")


@contextmanager
def _restored_import() -> Iterator[None]:
    """LazyConfig patches Python's import while it loads, and leaves it so after an exception."""
    original = builtins.__import__
    try:
        yield
    finally:
        builtins.__import__ = original


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _topmost(paths: list[str]) -> list[str]:
    """Without the paths below another path of the list."""
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
