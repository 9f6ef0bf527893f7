"""``key=value`` overrides of a LazyConfig, checked against its keys and their types."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from flsl_d2.errors import InputError

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
