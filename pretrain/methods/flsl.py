"""FLSL: student and teacher, and one step from views to losses (arXiv 2306.06203).

Shape suffixes: B images, N tokens, D width, Q queries, K centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.mean_shift import attention, mean_shift, mix_attention
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import BaseMethod, feature_std
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.methods.flsl_switches import check_switches
from pretrain.methods.masking import TokenDecoder
from pretrain.methods.places import VarianceBound, token_centres, tokens_at
from pretrain.methods.previous_stage import PreviousStage
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues
from pretrain.views import NestedViews


class EncoderWithHead(nn.Module):
    """An encoder with its projection head, as student or teacher.

    Args:
        head: the head, which maps modes to centroids.
    """

    def __init__(self, backbone: FLSLViT, head: FLSLHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def packed_tokens(
        self,
        batches: Sequence[Tensor],
        positions: str = "own",
        kept: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Tokens (B, N, D) of images of several sizes, in one pass for a ``FLSLViT``."""
        if not isinstance(self.backbone, FLSLViT):
            return [self.backbone.forward_tokens(images) for images in batches]
        return self.backbone.forward_packed(batches, None, positions, kept)


class FLSL(BaseMethod):
    """The modes of several student views are pulled to the modes of the teacher's view.

    A :class:`pretrain.methods.protocol.Method`.

    Args:
        backbone: encoder of the student; the teacher is a copy without stochastic depth.
        previous_stage: teacher of an earlier run, whose attention is mixed into the teacher's;
            None for training in one stage.
        pack_views: whether student views of all sizes are encoded in one pass; see
            :meth:`flsl_d2.modeling.FLSLViT.forward_packed`.
        partner: how the mode m+_i that a query z_i is compared with is found.
            ``similarity``, as published: the mode of the student's query in the teacher's view,
            ``m+_i = sum_j softmax_j(s_ca z_i.z+_j) z+_j``. ``place``: the mode of the teacher's
            own token where the query's patch came from,
            ``m+_n = sum_j softmax_j(s_ca z+_n.z+_j) z+_j`` for each token n of the teacher, whose
            logits ``g_t(m+_n)`` are interpolated bilinearly in the teacher's grid.
        position_drop: probability that the student's patches get no positions in a step, drawn
            from the step's seed; keeps the encoder usable with positions and without.
        position_share: largest share of the variance of the targets' logits that a token's place
            in the teacher's view may explain (:class:`pretrain.methods.places.VarianceBound`); 1
            for no bound. It needs ``partner=place``.
        image_share: likewise, the largest share that the mean of an image may explain.
        token_share: share of the tokens of the student's global view that is encoded, drawn for
            each image; all of them are queries. The others are dropped before the first block, as
            in masked Siamese networks (arXiv 2204.07141), which makes a step cheaper.
        prediction_blocks: number of blocks of a small decoder that predicts the targets of the
            dropped tokens from the encoded ones, as CAPI predicts clusters of masked patches
            (arXiv 2502.08769); each dropped token is then one query more of the inter-view loss.
            0 for no prediction. The decoder is not exported.

    Raises:
        InputError: head and loss disagree about the number of centroids, the previous stage has
            other patches, a switch has an unknown value, or switches exclude each other.
    """

    views_type: ClassVar[type] = NestedViews

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        loss: FLSLLoss,
        previous_stage: PreviousStage | None = None,
        pack_views: bool = True,
        partner: str = "similarity",
        position_drop: float = 0.0,
        position_share: float = 1.0,
        image_share: float = 1.0,
        token_share: float = 1.0,
        prediction_blocks: int = 0,
    ) -> None:
        super().__init__(EncoderWithHead(backbone, head), has_teacher=True)
        num_centroids = len(head.last_layer.weight_v)
        if loss.num_centroids != num_centroids:
            raise InputError(
                f"the head has {num_centroids} centroids and the loss {loss.num_centroids}; "
                "set both to the same number."
            )
        check_switches(
            backbone,
            previous_stage,
            pack_views=pack_views,
            partner=partner,
            position_drop=position_drop,
            position_share=position_share,
            image_share=image_share,
            token_share=token_share,
            prediction_blocks=prediction_blocks,
        )
        self.decoder: TokenDecoder | None = None
        if prediction_blocks:
            width = backbone.embed_dim
            heads = cast(int, backbone.architecture["num_heads"])
            self.decoder = TokenDecoder(width, width, width, prediction_blocks, heads)
            self.mask_token = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.mask_token, std=0.02)
        self.previous_stage, self.pack_views = previous_stage, pack_views
        self.needs_crops = previous_stage is not None
        self.num_centroids = num_centroids
        self.partner, self.position_drop = partner, position_drop
        self.token_share = token_share
        self.variance_bound: VarianceBound | None = None
        if min(position_share, image_share) < 1:
            self.variance_bound = VarianceBound(
                backbone.pos_embed.shape[1], num_centroids, position_share, image_share
            )
        self.loss = loss

    def check_run(self, views: object, images: int) -> None:
        """Check views and batch, and bound the variance at the places of the teacher's view."""
        super().check_run(views, images)
        if self.variance_bound is not None:
            side = cast(NestedViews, views).global_size // self.student.backbone.patch_size
            self.variance_bound.set_num_tokens(side**2)

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`.

        Args:
            inputs: the views; student views of the same size that follow each other are encoded
                together.

        Returns:
            The losses of :class:`FLSLLoss`, and what is monitored.
        """
        scale = self.student.backbone.embed_dim**-0.5
        teacher_view, *student_views = [self.normalised(view) for view in inputs.views]
        queries = inputs.queries
        priors = self._priors(inputs) if self.previous_stage else [None] * len(queries)
        by_place = self.partner == "place"
        regions = inputs.regions if by_place else [None] * len(queries)
        groups = _groups_of_one_size(student_views, queries, priors, regions)
        student_tokens, splits = self._student_tokens(groups)
        # The teacher comes second, so that the student's draws do not depend on the teacher's.
        with torch.no_grad():
            teacher_tokens = self.teacher.backbone.forward_tokens(teacher_view)  # (B, N, D)
            if by_place:
                place_logits = self._place_logits(teacher_tokens, values.cross_scale * scale)
        parts = []
        for group, tokens, split in zip(groups, student_tokens, splits, strict=True):
            _, view_indexes, group_priors, boxes = zip(*group, strict=True)
            indexes, points = torch.cat(view_indexes) if split is None else split[0], tokens
            if split is None:
                points = gather_tokens(tokens, indexes)  # (V * B, Q, D)
            if by_place:
                num_tokens = tokens.shape[1] if split is None else sum(x.shape[1] for x in split)
                grid = token_centres(num_tokens, torch.cat(boxes))
                xy = gather_tokens(grid, indexes)
            modes = compared = mean_shift(points, tokens, values.self_scale * scale)
            if split is not None and self.decoder is not None:
                predicted = self.decoder.predict_masked(tokens, self.mask_token, *split)
                compared = torch.cat([modes, predicted], dim=1)
                xy = gather_tokens(grid, torch.cat(split, dim=1))
            with torch.no_grad():
                if by_place:
                    targets = tokens_at(place_logits.repeat(len(group), 1, 1), xy)
                else:
                    keys = teacher_tokens.repeat(len(group), 1, 1)
                    targets = self._cross_modes(
                        points,
                        keys,
                        values.cross_scale * scale,
                        group_priors,
                        values.own_attention,
                    )
            parts.append([x.flatten(0, 1) for x in (points, modes, compared, targets)])
        points, modes, compared, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        with torch.no_grad():
            teacher_logits = targets if by_place else self.teacher.head(targets)
        losses, monitored = self.loss(
            points,
            modes,
            self.student.head(compared),
            teacher_logits,
            intra_weight=values.intra_weight,
            teacher_temp=values.teacher_temp,
        )
        return losses, {**monitored, "feature_std": feature_std(teacher_tokens)}

    def _student_tokens(
        self, groups: list[list[tuple[Any, ...]]]
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor] | None]]:
        """Tokens (V * B, N, D) of each group's V views, and how these are split.

        The latter are indexes (V * B, N - M) of the encoded and (V * B, M) of the dropped tokens
        for the global view where tokens are dropped, and else None.
        """
        batches = [torch.cat([view for view, *_ in group]) for group in groups]
        splits: list[tuple[Tensor, Tensor] | None] = [None] * len(groups)
        if self.token_share < 1:
            num_tokens = (batches[0].shape[-1] // self.student.backbone.patch_size) ** 2
            order = torch.rand(len(batches[0]), num_tokens, device=batches[0].device).argsort(dim=1)
            count = max(round(self.token_share * num_tokens), 1)
            splits[0] = order[:, :count], order[:, count:]
        # Nothing is drawn without the switch, so that stochastic depth draws what it did.
        dropped = self.training and self.position_drop > 0
        drop = dropped and float(torch.rand(())) < self.position_drop
        positions = "none" if drop else "own"
        if self.pack_views:
            kept = [None if split is None else split[0] for split in splits]
            return self.student.packed_tokens(batches, positions, kept), splits
        encoded = [self.student.packed_tokens([images], positions) for images in batches]
        return [tokens for (tokens,) in encoded], splits

    def _place_logits(self, teacher_tokens: Tensor, scale: float) -> Tensor:
        """Logits (B, N, K) of the modes of the teacher's tokens (B, N, D) within its view."""
        logits = self.teacher.head(mean_shift(teacher_tokens, teacher_tokens, scale))
        return logits if self.variance_bound is None else self.variance_bound(logits)

    def _cross_modes(
        self,
        starts: Tensor,
        keys: Tensor,
        scale: float,
        priors: Sequence[Tensor | None],
        own_attention: float,
    ) -> Tensor:
        """Modes in the teacher's view, with the previous stage's attention mixed in, if any."""
        if priors[0] is None:
            return mean_shift(starts, keys, scale)
        own = attention(starts, keys, scale)
        prior = torch.cat([each for each in priors if each is not None])
        return mix_attention(own, prior.to(own.dtype), own_attention) @ keys

    def _priors(self, inputs: StepInputs) -> list[Tensor]:
        """Attention (B, Q, N) of the previous stage for each student view's queries."""
        assert self.previous_stage is not None
        teacher_crop, *student_crops = [self.normalised(crop) for crop in inputs.crops]
        keys = self.previous_stage.tokens(teacher_crop)
        return [
            self.previous_stage.prior(crop, indexes, keys)
            for crop, indexes in zip(student_crops, inputs.queries, strict=True)
        ]


def _groups_of_one_size(views: list[Tensor], *others: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
    """Group views that can be encoded in one batch, each with what belongs to it."""
    items = zip(views, *others, strict=True)
    return [list(group) for _, group in groupby(items, key=lambda item: item[0].shape[-1])]
