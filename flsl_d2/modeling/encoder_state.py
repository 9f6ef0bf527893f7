"""The one check of what an encoder takes from a checkpoint: a full set of weights, or an error.

Detectron2 loads with ``strict=False`` and only warns, so a detector can train for a day on an
encoder of which two tensors were loaded. The check therefore sits in the encoder itself, where
every loading path passes, a stock project's included.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from flsl_d2.modeling.positions import (
    grid_of_table,
    num_leading_positions,
    resample_positions,
)

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2")


class _Encoder(Protocol):
    """The part of ``FLSLViT`` that the check needs."""

    position_offset: float
    position_antialias: bool

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class Fit:
    """How a state dict fits an encoder.

    Attributes:
        total: number of the encoder's tensors.
        unmatched: those that the state dict lacks or has in another shape, with the shapes.
        notes: what was adapted.
    """

    total: int
    unmatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def shortfall(self) -> str:
        """Say how many tensors are covered, which are not, and what to do."""
        shown = ", ".join(self.unmatched[:8])
        rest = f" and {len(self.unmatched) - 8} more" if len(self.unmatched) > 8 else ""
        return (
            f"{self.total - len(self.unmatched)} of the encoder's {self.total} tensors; unmatched "
            f"are {shown}{rest}. Use weights of the same architecture: width, depth, patch size, "
            "final_norm and use_rel_pos"
        )


def fit_encoder_state(
    encoder: _Encoder, state: dict[str, Tensor], prefix: str, errors: list[str]
) -> None:
    """Adapt and check the encoder's part of a state dict that PyTorch is loading.

    Args:
        state: the state dict, changed in place as :func:`adapt_encoder_state` does.
        prefix: beginning of the encoder's names in it, e.g. ``backbone.net.``.
        errors: PyTorch's list of loading errors; one sentence is appended where the encoder is
            not fully covered, which makes ``load_state_dict`` raise even when not strict.
    """
    fit = adapt_encoder_state(encoder, state, prefix)
    for note in fit.notes:
        logger.info("FLSLViT: %s.", note)
    if fit.unmatched:
        errors.append(f"the checkpoint covers {fit.shortfall()}.")
    else:
        place = prefix or "top-level "
        logger.info("FLSLViT: all %d encoder tensors loaded (as %s*).", fit.total, place)


def adapt_encoder_state(encoder: _Encoder, state: dict[str, Tensor], prefix: str) -> Fit:
    """Adapt the encoder's part of a state dict in place, and compare it with the encoder.

    Adapted are the published name of the final norm (``norm.*``), a class token with its position
    (both dropped), a position table of another grid (resampled as the encoder does it for images
    of another size) and relative position tables of another length (resampled linearly).

    Args:
        state: state dict of the encoder or of a model around it.
    """
    own = encoder.state_dict()
    fit = Fit(len(own))
    for kind in ("weight", "bias"):
        old, new = f"{prefix}norm.{kind}", f"{prefix}final_norm.{kind}"
        if old in state and f"final_norm.{kind}" in own:
            state[new] = state.pop(old)
    if "prefix_tokens" not in own:
        _drop_class_token(state, prefix, fit)
    relative = 0
    for name, tensor in own.items():
        loaded = state.get(prefix + name)
        if loaded is None:
            fit.unmatched.append(f"{prefix}{name} (missing)")
            continue
        if loaded.shape != tensor.shape and loaded.shape[-1:] == tensor.shape[-1:]:
            if name == "pos_embed" and loaded.dim() == 3:
                loaded = _refit_table(loaded, tensor.shape[1], encoder, fit)
            elif "rel_pos_" in name and loaded.dim() == 2:
                loaded = F.interpolate(loaded.T[None].float(), size=len(tensor), mode="linear")[0].T
                relative += 1
            state[prefix + name] = loaded
        if loaded.shape != tensor.shape:
            fit.unmatched.append(
                f"{prefix}{name} (has {tuple(loaded.shape)}, needs {tuple(tensor.shape)})"
            )
    if relative:
        fit.notes.append(f"{relative} relative position tables resampled")
    return fit


def _drop_class_token(state: dict[str, Tensor], prefix: str, fit: Fit) -> None:
    table = state.get(f"{prefix}pos_embed")
    token = state.pop(f"{prefix}cls_token", None)
    if table is not None and table.dim() == 3 and num_leading_positions(table.shape[1]):
        state[f"{prefix}pos_embed"] = table[:, 1:]
        fit.notes.append("the position of a class token was dropped, as this encoder has none")
    elif token is not None:
        fit.notes.append("a class token was dropped, as this encoder has none")


def _refit_table(table: Tensor, num_positions: int, encoder: _Encoder, fit: Fit) -> Tensor:
    old, new = grid_of_table(table.shape[1]), grid_of_table(num_positions)
    resampled = resample_positions(
        table.float(), (new, new), encoder.position_offset, encoder.position_antialias
    )
    fit.notes.append(f"positions resampled from {old} x {old} to {new} x {new}")
    return resampled.flatten(1, 2).to(table.dtype)
