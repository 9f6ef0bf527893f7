"""Checks of the switches of FLSL, before anything is built from them."""

from __future__ import annotations

from torch import nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from pretrain.methods.previous_stage import PreviousStage

# Ways to find the partner of a query in the teacher's view.
PARTNERS = ("similarity", "place")


def check_switches(
    backbone: nn.Module,
    previous_stage: PreviousStage | None,
    *,
    pack_views: bool,
    partner: str,
    position_drop: float,
    position_share: float,
    image_share: float,
    token_share: float,
    prediction_blocks: int,
) -> None:
    """Check the arguments of :class:`pretrain.methods.flsl.FLSL` of the same names.

    Raises:
        InputError: a switch has an unknown value, does not fit the encoder, or excludes another.
    """
    shares = {
        "position_share": position_share,
        "image_share": image_share,
        "token_share": token_share,
    }
    of_tokens = {
        "previous_stage": previous_stage is not None,
        "position_drop": position_drop > 0,
        **{name: share < 1 for name, share in shares.items()},
    }
    if not isinstance(backbone, FLSLViT) and any(of_tokens.values()):
        used = ", ".join(f"model.{name}" for name, on in of_tokens.items() if on)
        raise InputError(
            f"{type(backbone).__name__} has no tokens and positions before its first layer for "
            f"{used}; leave what the recipe has, or use an encoder of class FLSLViT."
        )
    if previous_stage is not None and previous_stage.patch_size != backbone.patch_size:
        raise InputError(
            f"the previous stage has patches of {previous_stage.patch_size} pixels and this one of "
            f"{backbone.patch_size}, so their tokens do not match; use a previous stage with "
            f"patches of {backbone.patch_size}."
        )
    if partner not in PARTNERS:
        raise InputError(f"model.partner is '{partner}'; use one of {', '.join(PARTNERS)}.")
    if not 0 <= position_drop <= 1:
        raise InputError(
            f"model.position_drop is {position_drop}, a probability; use a value from 0 to 1."
        )
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise InputError(f"model.{name} is {share}, a share; use a value above 0 and up to 1.")
    if partner != "place" and min(position_share, image_share) < 1:
        raise InputError(
            f"model.position_share is {position_share}, model.image_share {image_share} and "
            f"model.partner '{partner}', whose targets have no place of their own; set "
            "model.partner=place."
        )
    if previous_stage is not None and (partner == "place" or token_share < 1):
        raise InputError(
            f"model.partner is '{partner}' and model.token_share {token_share} beside a previous "
            "stage, whose attention starts from all queries of the student; set "
            "model.partner=similarity and model.token_share=1."
        )
    if token_share < 1 and not pack_views:
        raise InputError(
            f"model.token_share is {token_share}, and only packed views drop tokens; set "
            "model.pack_views=True."
        )
    if prediction_blocks and (partner != "place" or token_share == 1):
        raise InputError(
            f"model.prediction_blocks is {prediction_blocks}, model.partner '{partner}' and "
            f"model.token_share {token_share}, and only dropped tokens whose targets have a place "
            "are predicted; set model.partner=place and model.token_share below 1."
        )
