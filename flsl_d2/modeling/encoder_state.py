"""The one check of what an encoder takes from weights: a full set for its shape, or an error.

Detectron2 loads with ``strict=False`` and only warns, so a detector can train for a day on an
encoder of which two tensors were loaded. The check therefore runs in the encoder itself, where
every loading path passes, a stock project's included.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling.positions import grid_of_table, num_leading_positions, resample_positions

# Arguments that shapes tell, or that change the result without changing a shape.
_COMPARED = ("embed_dim", "patch_size", "depth", "num_heads", "in_chans", "mlp_ratio", "qkv_bias")


class _Encoder(Protocol):
    """The part of ``FLSLViT`` that the check needs."""

    @property
    def architecture(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class LoadReport:
    """The account of one load.

    Attributes:
        path: path of the file; empty where a state dict was given.
        source: layout of the file.
        location: containers and prefix of the encoder's tensors in the file.
        matched: name in the encoder: name or names in the file, for every tensor that was loaded.
        resampled: sentences on tables of another size.
        new: names in the encoder that the file lacks and that stay as they were.
        dropped: name in the file: why it was left out on purpose.
        unused: names in the file that no rule accounts for.
        note: advice to users of such a file.
        other_sets: names of further sets of weights in the file.
        encoder: arguments of ``FLSLViT`` of the encoder that was loaded.
    """

    path: str = ""
    source: str = ""
    location: str = ""
    matched: dict[str, str] = field(default_factory=dict)
    resampled: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    note: str = ""
    other_sets: list[str] = field(default_factory=list)
    encoder: dict[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The file or the state dict, to begin a sentence with."""
        return f"weights {self.path!r}" if self.path else "the checkpoint's weights"

    def line(self) -> str:
        """Summarise the counts in one line, for logs."""
        parts = [*self.resampled]
        if self.new:
            parts.append(f"{len(self.new)} relative position tables are new and start as they are")
        if self.unused:
            parts.append(f"not used: {listed(self.unused)}")
        parts += [f"{len(n)} left out ({reason})" for reason, n in self._dropped_by_reason()]
        if self.other_sets:
            parts.append(f"the file also holds {listed(self.other_sets)} (?which=NAME takes one)")
        total = len(self.matched) + len(self.new)
        place = self.path or f"as {self.location}"
        return "; ".join(
            [f"encoder weights: {len(self.matched)} of {total} matched ({place})", *parts]
        )

    def table(self) -> str:
        """Lay out counts with names, reasons, and the encoder's arguments, for a person."""
        renamed = [f"{old} -> {new}" for new, old in self.matched.items() if not old.endswith(new)]
        total = len(self.matched) + len(self.new)
        rows = [
            ("file", self.path),
            ("layout", self.source),
            ("found at", self.location),
            ("further", self.other_sets and f"{', '.join(self.other_sets)} (which=NAME takes one)"),
            ("matched", f"{len(self.matched)} of the encoder's {total} tensors"),
            ("renamed", f"{len(renamed)}: {listed(renamed, 4)}" if renamed else "none"),
            *(("resampled", sentence) for sentence in self.resampled or ["none"]),
            *(
                ("dropped", f"{len(names)} ({reason}): {listed(names, 3)}")
                for reason, names in self._dropped_by_reason()
            ),
            ("not used", f"{len(self.unused)}: {listed(self.unused)}" if self.unused else "none"),
            ("new", self.new and f"{len(self.new)}: {listed(self.new, 3)}"),
            ("note", self.note),
            ("encoder", ", ".join(f"{key}={value!r}" for key, value in self.encoder.items())),
        ]
        return "\n".join(f"{name:<10} {value}" for name, value in rows if value)

    def _dropped_by_reason(self) -> list[tuple[str, list[str]]]:
        reasons = dict.fromkeys(self.dropped.values())
        return [(r, [n for n, why in self.dropped.items() if why == r]) for r in reasons]


def listed(names: Iterable[str], most: int = 8) -> str:
    """Join names with commas, and count those beyond the first."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def fit_encoder_state(
    encoder: _Encoder,
    state: dict[str, Tensor],
    prefix: str = "",
    report: LoadReport | None = None,
    stated: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Check that weights cover an encoder, and adapt them to it in place.

    Adapted are the published name of the final norm (``norm.*``), class tokens and registers of
    an encoder that has none (dropped), a position table of another grid (resampled as the encoder
    does it for images of another size) and relative position tables (resampled linearly; where
    they are missing, the encoder's own, which start at zero, are put in).

    Args:
        state: state dict of the encoder or of a model around it; changed only if all fits.
        prefix: beginning of the encoder's names in it, e.g. ``backbone.net.``.
        report: what is known of the file, which is completed.
        stated: what the file says of the encoder's architecture beyond shapes.

    Raises:
        InputError: the weights are of another architecture, incomplete, quantised, or not finite.
    """
    report = report or LoadReport(location=f"{prefix}*" if prefix else "top-level names")
    own, known = encoder.state_dict(), encoder.architecture
    part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    for kind in ("weight", "bias"):
        if f"norm.{kind}" in part and "final_norm.bias" in own:
            part[f"final_norm.{kind}"] = part.pop(f"norm.{kind}")
    if not known["num_prefix_tokens"]:
        _drop_tokens(part, prefix, report)
    _compare(known, {**architecture_of(part), **(stated or {})}, report)
    report.new = [name for name in own if name not in part and ".rel_pos_" in name]
    part |= {name: own[name] for name in report.new}
    unmatched, relative = [], 0
    for name, tensor in own.items():
        loaded = part.get(name)
        if loaded is None:
            unmatched.append(f"{prefix}{name} (missing)")
            continue
        if loaded.shape != tensor.shape and loaded.shape[-1:] == tensor.shape[-1:]:
            if name == "pos_embed" and loaded.dim() == 3:
                loaded = _refit_table(loaded, tensor.shape[1], known, report)
            elif "rel_pos_" in name and loaded.dim() == 2:
                loaded = F.interpolate(loaded.T[None].float(), size=len(tensor), mode="linear")[0].T
                relative += 1
            part[name] = loaded
        if loaded.shape != tensor.shape:
            shapes = f"has {tuple(loaded.shape)}, needs {tuple(tensor.shape)}"
            unmatched.append(f"{prefix}{name} ({shapes})")
        else:
            check_values(loaded, f"{prefix}{name}", report)
    if len(unmatched) == len(own):  # Detectron2 takes tensors of other shapes out beforehand
        raise InputError(
            f"{report.subject} have no tensor that fits the encoder {prefix}*, so they are of "
            "another width, patch size or model; call flsl_d2.configure_from_weights(cfg, FILE) "
            "before the model is built, or give other weights."
        )
    if unmatched:
        raise InputError(
            f"{report.subject} cover {len(own) - len(unmatched)} of the encoder's {len(own)} "
            f"tensors; unmatched are {listed(unmatched)}; use whole weights of the same "
            "architecture (flsl_d2.configure_from_weights sets a config to a file's)."
        )
    if relative:
        report.resampled.append(f"{relative} relative position tables resampled")
    report.matched = {name: prefix + name for name in own if name not in report.new}
    report.unused += sorted(prefix + name for name in set(part) - set(own))
    report.encoder = known
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({prefix + name: tensor for name, tensor in part.items()})
    return report


def architecture_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of ``FLSLViT`` off the shapes of its tensors, as far as they tell them."""
    known: dict[str, Any] = {}
    patches = tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.dim() == 4:
        known["embed_dim"], known["in_chans"], known["patch_size"], _ = patches.shape
    table = tensors.get("pos_embed")
    if table is not None and table.dim() == 3 and "patch_size" in known:
        positions = table.shape[1] - num_leading_positions(table.shape[1])
        known["img_size"] = grid_of_table(positions) * known["patch_size"]
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if not blocks:
        return known
    known["depth"] = max(blocks) + 1
    if "blocks.0.attn.qkv.weight" in tensors:
        known["qkv_bias"] = "blocks.0.attn.qkv.bias" in tensors
    hidden = tensors.get("blocks.0.mlp.fc1.weight")
    if hidden is not None and hidden.dim() == 2 and 0 not in hidden.shape:
        known["mlp_ratio"] = _ratio(*hidden.shape)
    known["layer_scale_init"] = 1.0 if "blocks.0.ls1.gamma" in tensors else None
    known["final_norm"] = any(n.startswith(("final_norm.", "norm.")) for n in tensors)
    prefix = tensors.get("prefix_tokens")
    known["num_prefix_tokens"] = 0 if prefix is None else prefix.shape[1]
    return {**known, **_relative_positions(tensors, known)}


def _ratio(hidden: int, width: int) -> float:
    """Divide so that ``int(width * ratio)`` is ``hidden`` in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _relative_positions(tensors: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Read ViTDet's windows: a table has 2 G - 1 rows for G tokens, fewer in windows."""
    tables = [tensors.get(f"blocks.{i}.attn.rel_pos_h") for i in range(known["depth"])]
    present = [table for table in tables if table is not None]
    if len(present) < len(tables) or "patch_size" not in known:
        return {"use_rel_pos": False}
    sizes = [(len(table) + 1) // 2 for table in present]
    found = {
        "use_rel_pos": True,
        "num_heads": known["embed_dim"] // present[0].shape[-1],
        "rel_pos_img_size": max(sizes) * known["patch_size"],
    }
    if min(sizes) < max(sizes):
        found["window_size"] = min(sizes)
        found["global_block_indexes"] = [i for i, size in enumerate(sizes) if size == max(sizes)]
    return found


def _compare(own: Mapping[str, Any], stated: Mapping[str, Any], report: LoadReport) -> None:
    """Raise an InputError that names each value in which weights and encoder differ."""
    differing = [key for key in _COMPARED if stated.get(key) not in (None, own[key])]
    # These add or need weights. The reverse of some is fine: windows cannot hold prefix tokens,
    # new relative positions start at zero, and a last norm may be left out.
    if (stated.get("layer_scale_init") is None) != (own["layer_scale_init"] is None):
        differing += ["layer_scale_init"] if "layer_scale_init" in stated else []
    if stated.get("use_rel_pos") and not own["use_rel_pos"]:
        differing.append("use_rel_pos")
    if own["final_norm"] and stated.get("final_norm") is False:
        differing.append("final_norm")
    if own["num_prefix_tokens"] not in (0, stated.get("num_prefix_tokens", 0)):
        differing.append("num_prefix_tokens")
    if differing:
        of_file = ", ".join(f"{key}={stated.get(key)}" for key in differing)
        of_model = ", ".join(f"{key}={own[key]}" for key in differing)
        raise InputError(
            f"{report.subject} are of an encoder with {of_file}, but the model's has {of_model}; "
            f"call flsl_d2.configure_from_weights(cfg, {report.path or 'FILE'!r}) before the model "
            "is built, or give other weights."
        )


def check_values(tensor: Tensor, name: str, report: LoadReport) -> None:
    """Raise an InputError where values are quantised, infinite or NaN."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise InputError(
            f"{report.subject} hold {name} as {tensor.dtype}, as quantised networks do; give the "
            "floating-point weights."
        )
    if not tensor.is_meta and not tensor.float().isfinite().all():
        raise InputError(
            f"{report.subject} hold infinite values or NaN in {name}, as training that diverged "
            "leaves them; give an earlier checkpoint."
        )


def _drop_tokens(part: dict[str, Tensor], prefix: str, report: LoadReport) -> None:
    """Leave out tokens beside the patches, for which windows have no place, and their positions."""
    table = part.get("pos_embed")
    if table is not None and table.dim() == 3 and num_leading_positions(table.shape[1]):
        part["pos_embed"] = table[:, 1:]
        report.dropped[f"{prefix}pos_embed[:, 0]"] = "the position of a class token"
    for name in ("cls_token", "prefix_tokens"):
        if part.pop(name, None) is not None:
            report.dropped[prefix + name] = (
                "tokens beside the patches; the encoder has num_prefix_tokens=0, as windows require"
            )


def _refit_table(
    table: Tensor, num_positions: int, own: Mapping[str, Any], report: LoadReport
) -> Tensor:
    old, new = grid_of_table(table.shape[1]), grid_of_table(num_positions)
    resampled = resample_positions(
        table.float(), (new, new), own["position_offset"], own["position_antialias"]
    )
    report.resampled.append(f"positions resampled from {old} x {old} to {new} x {new}")
    return resampled.flatten(1, 2).to(table.dtype)
