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
    *("module", "_orig_mod", "_forward_module"),
    *("_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
}
# The beginning of a patch embedding's name in the layouts of timm, OpenMMLab, transformers,
# torchvision and Flax.
_PATCH_EMBEDDING = re.compile(
    r"(?:^|.*?[./])(?=patch_embed\.proj(ection)?\.|embeddings\.patch_embeddings\.projection\."
    r"|conv_proj\.|embedding/kernel$)"
)
# Whole words in the names of sets, the role that they stand for, and the order in which a set is
# taken where nobody asks for one. It is that of the sources' own evaluations: the base encoder of
# MoCo v3 and BYOL's online network, else the teacher (DINO) or target (I-JEPA), else the model
# whose moving average lies beside it.
_ROLES: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("base encoder", "online", "encoder q"), (0, "student")),
    **dict.fromkeys(("teacher", "target"), (1, "teacher")),
    **dict.fromkeys(("ema", "momentum", "averaged", "encoder k"), (3, "teacher")),
    "student": (4, "student"),
}
_RANK_WITHOUT_ROLE = 2
# Dicts whose tensors have the names of weights and are something else.
_OTHER_TENSORS = {"optimizer", "optimizers", "optim", "grad", "grads", "gradients"}
_MAX_NESTING = 6


@dataclass(frozen=True)
class WeightSet:
    """The weights of one encoder in a file.

    Attributes:
        content: outermost dict of the file.
        containers: keys of the nested dicts that lead to the tensors.
        prefix: beginning of the encoder's names, without wrappers.
        tensors: name without prefix and wrappers, later timm's name: tensor.
        file_names: name in ``tensors``: name or names in the file.
        outside: name without wrappers: name in the file, of what lies beside the prefix.
        label: name by which ``which`` takes the set; empty for the only set of a file.
        layout: library of the names in the file.
    """

    content: Mapping[str, Any]
    containers: tuple[str, ...]
    prefix: str
    tensors: dict[str, Tensor]
    file_names: dict[str, str]
    outside: dict[str, str]
    label: str = ""
    layout: str = "timm"

    @property
    def components(self) -> list[str]:
        """Parts of containers and prefix, without wrappers."""
        parts = [*self.containers, *re.split("[./]", self.prefix)]
        return [part for part in parts if part and part not in _WRAPPERS]

    @property
    def location(self) -> str:
        """Containers and prefix as one text, for messages."""
        return " / ".join([*self.containers, *([f"{self.prefix}*"] if self.prefix else [])])

    @property
    def roles(self) -> list[tuple[int, str]]:
        """Order of preference and role of the words in the set's name, the preferred first."""
        names = [f" {' '.join(words(part))} " for part in self.components]
        return sorted(role for key, role in _ROLES.items() if any(f" {key} " in n for n in names))

    @property
    def positions(self) -> Tensor | None:
        """Table of positions (1, N, D), if there is one."""
        table = self.tensors.get("pos_embed")
        return table if table is not None and table.dim() == 3 else None

    @property
    def in_detector(self) -> bool:
        """Whether the encoder sits in a detector as in ViTDet."""
        return self.prefix.endswith("backbone.net.")

    def has(self, *names: str) -> bool:
        """Tell whether the set has one of the tensors."""
        return any(name in self.tensors for name in names)

    def is_in(self, *containers: str) -> bool:
        """Tell whether the tensors lie in exactly these dicts, without a common prefix."""
        return self.containers == containers and not self.prefix

    def is_run(self, key: str = "") -> bool:
        """Tell whether the file has student or teacher, and this key beside them."""
        pair = {"teacher", "student"} & set(self.components)
        return bool(pair) and (not key or key in self.content)


def words(name: str) -> list[str]:
    """Split a name like ``state_dict_ema`` or ``modelEMA`` into its words, in small letters."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def find_weight_sets(content: Mapping[str, Any]) -> list[WeightSet]:
    """Find every set of encoder weights in a file; raise InputError where two names become one."""
    found = []
    for containers, mapping in tensor_dicts(content):
        if any(word in _OTHER_TENSORS for key in containers for word in words(key)):
            continue
        names = _without_wrappers(mapping)
        matches = (_PATCH_EMBEDDING.match(name) for name in names)
        for prefix in dict.fromkeys(match[0] for match in matches if match):
            inside = {n[len(prefix) :]: o for n, o in names.items() if n.startswith(prefix)}
            outside = {n: o for n, o in names.items() if not n.startswith(prefix)}
            tensors = {n: mapping[original] for n, original in inside.items()}
            found.append(WeightSet(content, containers, prefix, tensors, inside, outside))
    if len(found) < 2:
        return found
    shared = set.intersection(*(set(each.components) for each in found))
    labels = [".".join(p for p in each.components if p not in shared) or "model" for each in found]
    if len(set(labels)) < len(labels):
        labels = [".".join(each.components) or "model" for each in found]
    return [replace(each, label=label) for label, each in zip(labels, found, strict=True)]


def choose_set(sets: list[WeightSet], which: str | None, path: str) -> WeightSet:
    """Choose the set of a label, a part of it or a role (``student``, ``teacher``).

    Without one, the set that the file's own project evaluates.

    Raises:
        InputError: there is no such set, or nothing says which of several to take.
    """
    labels = ", ".join(each.label for each in sets)
    if which is None:
        ranks = [each.roles[0][0] if each.roles else _RANK_WITHOUT_ROLE for each in sets]
        chosen = [each for each, rank in zip(sets, ranks, strict=True) if rank == min(ranks)]
        if len(chosen) == 1:
            return chosen[0]
        raise InputError(
            f"weights {path!r} hold {len(sets)} sets of encoder weights ({labels}), and no name "
            f"says which is the teacher or a moving average; choose one by which=NAME, e.g. "
            f"{path.split('?')[0]}?which={chosen[0].label}."
        )
    for names_of in (
        lambda each: [each.label],
        lambda each: each.components,
        lambda each: [role for _, role in each.roles],
    ):
        chosen = [each for each in sets if which in names_of(each)]
        if len(chosen) == 1:
            return chosen[0]
    remedy = f"leave which={which} out to take the one set that they have"
    if len(sets) > 1:
        remedy = f"use which=NAME with one of {labels}"
    raise InputError(f"weights {path!r} hold no set of encoder weights {which!r}; {remedy}.")


def plain_name(name: str) -> str:
    """Take the names of wrappers out of a tensor's name, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def tensor_dicts(
    node: Mapping[Any, Any], containers: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Walk through nested dicts; yield the keys that lead to tensors, and the tensors by name.

    A whole module, as ``torch.save(model)`` writes it, is one dict by the names of its state dict.
    """
    is_module = "_modules" in node and "_parameters" in node
    named = _module_state(node) if is_module else node.items()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if tensors:
        yield containers, tensors
    if len(containers) < _MAX_NESTING and not is_module:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from tensor_dicts(value, (*containers, str(key)))


def _module_state(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for part in ("_parameters", "_buffers"):
            for name, value in (node.get(part) or {}).items():
                yield f"{prefix}{name}", value
        for name, child in (node.get("_modules") or {}).items():
            yield from _module_state(child, f"{prefix}{name}.")


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
