"""Finding and loading config files; every unknown key is an error before anything is built.

``LazyConfig.apply_overrides`` creates whatever key it is given, so a typing error would train with
the default.
"""

from __future__ import annotations

import builtins
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flsl_d2.errors import InputError
from flsl_d2.files import expand_home

_ABSENT = object()


class _Override(NamedTuple):
    key: str
    value: Any
    adds: bool  # whether a leading "+" allows a new key
    raw: str  # the value as it was typed


def apply_lazy_overrides(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Set ``key=value`` overrides in place, in hydra's basic grammar; return the config.

    Texts are such as ``train.max_iter=100`` and ``dataloader.train.dataset.names=[a,b]``; a leading
    ``+`` allows a key that is new.

    Raises:
        InputError: a text that is not ``key=value``, unknown keys (all of them at once), or a value
            of another type than the one it replaces.
    """
    parsed = [_parse(text) for text in overrides]
    named = []
    for override in (each for each in parsed if not each.adds):
        named.append(override.key)
        if isinstance(_select(cfg, override.key), DictConfig):
            named += [f"{override.key}.{key}" for key in _keys_of(override.value, lists=False)]
    unknown = [key for key in named if _select(cfg, key) is _ABSENT]
    if unknown:
        known = list(_keys_of(OmegaConf.to_container(cfg)))
        remedy = "; a new key needs a leading +, as in +key=value"
        raise unknown_keys_error(unknown, known, remedy)
    for override in parsed:
        value = override.value if override.adds else _fitting(cfg, override)
        try:
            OmegaConf.update(cfg, override.key, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            raise InputError(
                f"override {override.key}={override.raw} cannot be applied: "
                f"{str(error).splitlines()[0]}; see the config for what the key holds."
            ) from error
    return cfg


def unknown_keys_error(unknown: Iterable[str], known: list[str], remedy: str = "") -> InputError:
    """Make the error for keys that a config does not have; it names the closest ones.

    Keys have dotted names; ``remedy`` continues the sentence.
    """
    named = []
    for key in dict.fromkeys(unknown):
        close = _closest(key, known)
        named.append(f"{key} (did you mean {' or '.join(close)}?)" if close else key)
    noun = "key" if len(named) == 1 else "keys"
    return InputError(f"the config has no {noun} {', '.join(named)}{remedy}.")


def _closest(key: str, known: list[str], count: int = 2) -> list[str]:
    by_path = difflib.get_close_matches(key, known, n=count, cutoff=0.75)
    last = key.rpartition(".")[2]
    same_name = [path for path in known if path.rpartition(".")[2] == last]
    return list(dict.fromkeys(by_path + sorted(same_name, key=len)))[:count]


def _parse(text: str) -> _Override:
    key, equals, raw = text.partition("=")
    adds = key.startswith("+")
    key = key.lstrip("+").strip()
    if not equals or not key or key.startswith(("~", "-")):
        raise InputError(
            f"override {text!r} is not of the form key=value; write for example "
            "train.max_iter=100 (pairs KEY VALUE are for YAML configs)."
        )
    # The grammar reserves "~", so that it would refuse lists of paths that begin with it.
    raw = re.sub(r"(^|(?<=[\[,]))~(?=[/,\]]|$)", lambda _: os.path.expanduser("~"), raw)
    try:
        parsed = OverridesParser.create().parse_overrides([f"key={raw}"])[0]
        value = raw if parsed.is_sweep_override() else parsed.value()
    except HydraException:
        value = raw  # a path with characters that the grammar reserves
    return _Override(key, value, adds, raw)


def _select(cfg: DictConfig, key: str) -> Any:
    """Return the value of a dotted key: None if it is unresolvable, `_ABSENT` if there is none."""
    try:
        return OmegaConf.select(cfg, key, default=_ABSENT)
    except InterpolationResolutionError:
        return None
    except (OmegaConfBaseException, TypeError):
        return _ABSENT


def _keys_of(node: Any, lists: bool = True) -> Iterator[str]:
    items = enumerate(node) if lists and isinstance(node, list) else ()
    for key, child in node.items() if isinstance(node, Mapping) else items:
        yield str(key)
        yield from (f"{key}.{inner}" for inner in _keys_of(child, lists))


def _fitting(cfg: DictConfig, override: _Override) -> Any:
    """Convert the override's value to the type of the value that it replaces."""
    old, new = _select(cfg, override.key), override.value
    if old is None or (isinstance(new, str) and "${" in new):
        return new
    if isinstance(old, str):  # a name may become a list of names; numbers are names too
        return new if new is None or isinstance(new, (str, list)) else override.raw
    if isinstance(old, bool):
        wanted, fits = "true or false", isinstance(new, bool)
    elif isinstance(old, int):
        if isinstance(new, float) and new.is_integer():
            new = int(new)  # 1e5 is a float to the grammar
        wanted, fits = "a whole number", isinstance(new, int) and not isinstance(new, bool)
    elif isinstance(old, float):
        fits = isinstance(new, (int, float)) and not isinstance(new, bool)
        wanted, new = "a number", float(new) if fits else new
    elif isinstance(old, ListConfig):
        wanted, fits = "a list such as [a,b]", new is None or isinstance(new, list)
    elif isinstance(old, DictConfig):
        wanted, fits = "a group of keys", new is None or isinstance(new, Mapping)
    else:
        return new
    if not fits:
        raise InputError(
            f"override {override.key}={override.raw} is of the wrong type; the key holds {wanted} "
            f"(now {_short(old)})."
        )
    return new


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
