"""The sets of encoder weights in a file, whatever dicts and wrappers lie around them.

A set is found by its patch embedding. The keys of the dicts that lead to it are its containers;
what stands before the names of the encoder is its prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flsl_d2.errors import InputError

# Modules that PyTorch and Lightning put around others: DDP, torch.compile, FSDP, checkpointing.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
# The beginning of a patch embedding's name in the layouts of timm, transformers and Flax.
_PATCH_EMBEDDING = re.compile(
    r"(?:^|.*?[./])(?=patch_embed\.proj\.|embeddings\.patch_embeddings\.projection\."
    r"|embedding/kernel$)"
)
# MoCo v3's own names for its student and its teacher.
_SYNONYMS = {"base_encoder": "student", "momentum_encoder": "teacher"}
_MAX_NESTING = 6


@dataclass(frozen=True)
class WeightSet:
    """The weights of one encoder.

    Attributes:
        label: name by which ``which`` takes the set; empty for the only set of a file.
        containers: keys of the nested dicts that lead to the tensors.
        prefix: beginning of the encoder's names, without wrappers.
        tensors: name without prefix and wrappers: tensor.
        file_names: name in ``tensors``: name in the file.
        outside: name without wrappers: name in the file, of what lies in the same dict under
            another prefix.
    """

    label: str
    containers: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    file_names: dict[str, str]
    outside: dict[str, str]

    @property
    def components(self) -> list[str]:
        """Parts of containers and prefix, without wrappers."""
        parts = [*self.containers, *re.split("[./]", self.prefix)]
        return [part for part in parts if part and part not in _WRAPPERS]

    @property
    def location(self) -> str:
        """Containers and prefix as one text, for messages."""
        return " / ".join([*self.containers, *([f"{self.prefix}*"] if self.prefix else [])])

    def has_key(self, key: str) -> bool:
        """Tell whether ``which=key`` can mean this set."""
        known = self.components
        return key in (self.label, *known, *(_SYNONYMS.get(part) for part in known))


def find_weight_sets(content: Mapping[str, Any]) -> list[WeightSet]:
    """Find every set of encoder weights in the content of a file.

    Raises:
        InputError: two tensors have the same name once wrappers are taken off.
    """
    found = []
    for containers, mapping in tensor_dicts(content):
        names = _without_wrappers(mapping)
        matches = (_PATCH_EMBEDDING.match(name) for name in names)
        for prefix in dict.fromkeys(match[0] for match in matches if match):
            inside = {
                n[len(prefix) :]: original for n, original in names.items() if n.startswith(prefix)
            }
            outside = {n: original for n, original in names.items() if not n.startswith(prefix)}
            tensors = {n: mapping[original] for n, original in inside.items()}
            found.append(WeightSet("", containers, prefix, tensors, inside, outside))
    return _labelled(found)


def choose_set(sets: list[WeightSet], which: str | None, path: str) -> WeightSet:
    """Choose the set that is asked for, or the one that the file's own project evaluates.

    That is the teacher; in MoCo v3 the base encoder; the model where its moving average (``ema``)
    lies beside it.

    Raises:
        InputError: there is no such set, or nothing says which of several to take.
    """
    labels = ", ".join(each.label for each in sets)
    if which is None:
        chosen = _evaluated(sets)
        if len(chosen) != 1:
            raise InputError(
                f"weights {path!r} hold {len(sets)} sets of encoder weights ({labels}); choose one "
                "by which=NAME, e.g. "
                f"{path.split('?')[0]}?which={sets[0].label}."
            )
        return chosen[0]
    exact = [each for each in sets if each.label == which]
    chosen = exact or [each for each in sets if each.has_key(which)]
    if len(chosen) == 1:
        return chosen[0]
    remedy = (
        f"use which=NAME with one of {labels}"
        if len(sets) > 1
        else f"leave which={which} out to take the one set that they have"
    )
    raise InputError(f"weights {path!r} hold no set of encoder weights {which!r}; {remedy}.")


def _evaluated(sets: list[WeightSet]) -> list[WeightSet]:
    for key in ("base_encoder", "teacher"):
        chosen = [each for each in sets if key in each.components]
        if chosen:
            return chosen
    averaged = [each for each in sets if any("ema" in part.lower() for part in each.components)]
    return [each for each in sets if each not in averaged] or averaged


def plain_name(name: str) -> str:
    """Take the names of wrappers out of a tensor's name, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def tensor_dicts(
    node: Mapping[Any, Any], containers: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Walk through nested dicts; yield the keys that lead to tensors, and the tensors by name."""
    tensors = {str(name): value for name, value in node.items() if isinstance(value, Tensor)}
    if tensors:
        yield containers, tensors
    if len(containers) < _MAX_NESTING:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from tensor_dicts(value, (*containers, str(key)))


def _without_wrappers(mapping: Mapping[str, Tensor]) -> dict[str, str]:
    """Names without wrappers and without DINOv2's chunks of blocks: the names in the file."""
    names: dict[str, str] = {}
    for original in mapping:
        name = plain_name(original)
        without_chunk = re.sub(r"(^|\.)blocks\.\d+\.(\d+)\.", r"\1blocks.\2.", name)
        if without_chunk not in names:  # in networks of several stages the numbers repeat
            name = without_chunk
        if name in names:
            raise InputError(
                f"the weights {names[name]!r} and {original!r} have the same name without their "
                "wrappers; save one of the two alone."
            )
        names[name] = original
    return names


def _labelled(sets: list[WeightSet]) -> list[WeightSet]:
    if len(sets) < 2:
        return sets
    shared = set.intersection(*(set(each.components) for each in sets))
    labels = [".".join(p for p in each.components if p not in shared) or "model" for each in sets]
    if len(set(labels)) < len(labels):
        labels = [".".join(each.components) or "model" for each in sets]
    return [replace(each, label=label) for label, each in zip(labels, sets, strict=True)]
