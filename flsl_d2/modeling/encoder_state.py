"""What an encoder takes from a checkpoint: a full set of weights, counted aloud, or an error.

Detectron2 loads with ``strict=False`` and only warns, so a detector can train for a day on an
encoder of which two tensors were loaded. The check therefore sits in the encoder itself, where
every loading path passes, a stock project's included.
"""

from __future__ import annotations

import logging

import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.modeling.positions import (
    grid_of_table,
    num_leading_positions,
    resample_positions,
)

__all__ = ["fit_encoder_state"]

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2")


def fit_encoder_state(
    encoder: nn.Module, state: dict[str, Tensor], prefix: str, errors: list[str]
) -> None:
    """Adapt the encoder's part of a state dict in place, and check that it is complete.

    Adapted are the published name of the final norm (``norm.*``), a class token with its position
    (both dropped, said in the log), a position table of another grid (resampled as the encoder
    does it for images of another size) and relative position tables of another length (resampled
    linearly).

    Args:
        encoder: an ``FLSLViT``.
        state: the state dict that is being loaded.
        prefix: where the encoder's names start in it, e.g. ``backbone.net.``.
        errors: PyTorch's list of loading errors; one sentence is appended where the encoder is
            not fully covered, which makes ``load_state_dict`` raise even when not strict.
    """
    own = encoder.state_dict()
    _accept_published_names(own, state, prefix)
    if "prefix_tokens" not in own:
        _drop_class_token(state, prefix)
    for name, tensor in own.items():
        loaded = state.get(prefix + name)
        if loaded is None or loaded.shape == tensor.shape:
            continue
        if name == "pos_embed" and loaded.shape[-1] == tensor.shape[-1]:
            state[prefix + name] = _refit_table(loaded, tensor.shape[1], encoder)
        elif "rel_pos_" in name and loaded.shape[-1] == tensor.shape[-1]:
            state[prefix + name] = F.interpolate(
                loaded.T[None].float(), size=len(tensor), mode="linear"
            )[0].T.to(loaded.dtype)
    good = [n for n, t in own.items() if getattr(state.get(prefix + n), "shape", None) == t.shape]
    if len(good) == len(own):
        logger.info(
            "FLSLViT: all %d encoder tensors loaded (as %s*).", len(own), prefix or "top-level "
        )
        return
    unmatched = [
        f"{n} (has {tuple(state[prefix + n].shape)}, needs {tuple(t.shape)})"
        if prefix + n in state
        else f"{n} (missing)"
        for n, t in own.items()
        if n not in set(good)
    ]
    errors.append(
        f"the checkpoint covers {len(good)} of the encoder's {len(own)} tensors under "
        f"{prefix or 'the top level'!r}; unmatched: {', '.join(unmatched)}. Use weights of the "
        "same architecture: width, depth, patch size, final_norm and use_rel_pos."
    )


def _accept_published_names(own: dict[str, Tensor], state: dict[str, Tensor], prefix: str) -> None:
    for kind in ("weight", "bias"):
        old, new = f"{prefix}norm.{kind}", f"{prefix}final_norm.{kind}"
        if old in state and f"final_norm.{kind}" in own:
            state[new] = state.pop(old)


def _drop_class_token(state: dict[str, Tensor], prefix: str) -> None:
    table = state.get(f"{prefix}pos_embed")
    token = state.pop(f"{prefix}cls_token", None)
    if table is not None and num_leading_positions(table.shape[1]):
        state[f"{prefix}pos_embed"] = table[:, 1:]
        logger.info("FLSLViT: the class token's position was dropped; this encoder has none.")
    elif token is not None:
        logger.info("FLSLViT: a class token was dropped; this encoder has none.")


def _refit_table(table: Tensor, num_positions: int, encoder: nn.Module) -> Tensor:
    old, new = grid_of_table(table.shape[1]), grid_of_table(num_positions)
    resampled = resample_positions(
        table.float(), (new, new), encoder.position_offset, encoder.position_antialias
    )
    logger.info("FLSLViT: positions resampled from %d x %d to %d x %d.", old, old, new, new)
    return resampled.flatten(1, 2).to(table.dtype)
