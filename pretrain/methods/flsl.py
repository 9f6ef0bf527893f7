"""Student and teacher, and one step of FLSL from views to losses.

Shape suffixes: B images, N tokens, D width, Q queries, K centroids.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.mean_shift import attention, mean_shift, mix_attention
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.packing import packed_tokens
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.flsl_objective import FLSLLoss, gather_queries
from pretrain.methods.previous_stage import PreviousStage
from pretrain.schedules import StepValues

__all__ = ["FLSL", "Encoder"]


class Encoder(nn.Module):
    """An FLSLViT with its head, as student or teacher.

    Args:
        backbone: the vision transformer.
        head: maps modes to centroids.
        norm_modes: apply the final LayerNorm to modes instead of tokens.
    """

    def __init__(self, backbone: FLSLViT, head: FLSLHead, norm_modes: bool = False) -> None:
        super().__init__()
        self.backbone, self.head, self.norm_modes = backbone, head, norm_modes

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D)."""
        return self.backbone.forward_tokens(images, num_blocks=self._num_blocks)

    def packed_tokens(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`tokens` of images of several sizes, in one pass."""
        return packed_tokens(self.backbone, batches, num_blocks=self._num_blocks)

    @property
    def _num_blocks(self) -> int | None:
        return self.backbone.depth if self.norm_modes else None  # a number leaves the norm out

    def logits(self, modes: Tensor) -> Tensor:
        """Modes (..., D) to logits (..., K)."""
        return self.head(self.backbone.final_norm(modes) if self.norm_modes else modes)


class FLSL(nn.Module):
    """One image, several views: the student's modes are pulled to the teacher's.

    Args:
        backbone: encoder of the student; the teacher is a copy without stochastic depth.
        head: head of the student.
        loss: the objective.
        norm_modes: see :class:`Encoder`.
        previous_stage: the teacher of an earlier run, whose attention mixes into the teacher's;
            None for training in one stage.
        pack_views: encode student views of all sizes in one pass; see
            :mod:`flsl_d2.modeling.packing`.

    Raises:
        InputError: head and loss disagree about the number of centroids, or the previous stage
            has other patches.
    """

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        loss: FLSLLoss,
        norm_modes: bool = False,
        previous_stage: PreviousStage | None = None,
        pack_views: bool = False,
    ) -> None:
        super().__init__()
        num_centroids = len(head.last_layer.weight_v)
        if len(loss.log_prior) != num_centroids:
            raise InputError(
                f"the head has {num_centroids} centroids and the loss {len(loss.log_prior)}; "
                "set both to the same number."
            )
        if previous_stage is not None and previous_stage.patch_size != backbone.patch_size:
            raise InputError(
                f"the previous stage has patches of {previous_stage.patch_size} pixels and this "
                f"one of {backbone.patch_size}, so their tokens do not match; use a previous stage "
                f"with patches of {backbone.patch_size}."
            )
        self.previous_stage, self.pack_views = previous_stage, pack_views
        self.student = Encoder(backbone, head, norm_modes)
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False).eval()
        self.loss = loss
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), False)

    def train(self, mode: bool = True) -> FLSL:
        """As of ``nn.Module``, but the teacher stays in evaluation: no stochastic depth."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        views: list[Tensor],
        queries: list[Tensor],
        values: StepValues,
        crops: Sequence[Tensor] = (),
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step's losses.

        Args:
            views: uint8 images (B, 3, S, S), the teacher's view first. Student views of the same
                size that follow each other are encoded together.
            queries: for every student view, which of its tokens are queries: (B, Q) int64.
            values: the scheduled values of this step.
            crops: the views before augmentation, in the same order; for a previous stage only.

        Returns:
            Losses of :class:`FLSLLoss`, and monitored tensors: ``assigned`` (K,) how many queries
            the teacher gives to each centroid, ``mean_assignment`` (K,), and ``feature_std``.
        """
        scale = self.student.backbone.embed_dim**-0.5
        teacher_view, *student_views = [self._normalised(view) for view in views]
        with torch.no_grad():
            teacher_tokens = self.teacher.tokens(teacher_view)  # (B, N, D)
        priors = self._priors(crops, queries) if self.previous_stage else [None] * len(queries)
        groups = _groups_of_one_size(student_views, queries, priors)
        parts = []
        for group, tokens in zip(groups, self._student_tokens(groups), strict=True):
            _, indexes, group_priors = zip(*group, strict=True)
            points = gather_queries(tokens, torch.cat(indexes))  # (V * B, Q, D)
            modes = mean_shift(points, tokens, values.self_scale * scale)
            with torch.no_grad():
                keys = teacher_tokens.repeat(len(group), 1, 1)
                cross_modes = self._cross_modes(
                    points, keys, values.cross_scale * scale, group_priors, values.own_attention
                )
            parts.append([x.flatten(0, 1) for x in (points, modes, cross_modes)])
        points, modes, cross_modes = (torch.cat(part) for part in zip(*parts, strict=True))
        with torch.no_grad():
            teacher_logits = self.teacher.logits(cross_modes)
        losses, monitored = self.loss(
            points,
            modes,
            self.student.logits(modes),
            teacher_logits,
            intra_weight=values.intra_weight,
            teacher_temp=values.teacher_temp,
        )
        return losses, {**monitored, "feature_std": _feature_std(teacher_tokens)}

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the transformer blocks of student and teacher (``torch.compile``).

        All blocks of an encoder share their code, so it is compiled once for each size of view,
        during the first steps; the rest of the step is small beside them. Where stochastic depth
        skips images, the student's blocks see other numbers of them at each step, and only their
        branches are compiled, for any number.

        Args:
            backend: of ``torch.compile``.
        """
        student, teacher = self.student.backbone.blocks, self.teacher.backbone.blocks
        if any(block.drop_path.skips for block in student):
            for block in student:
                block.compile_branches(backend)
        else:
            for block in student:
                block.compile(dynamic=False, backend=backend)
        for block in teacher:
            block.compile(dynamic=False, backend=backend)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Exponential moving average: ``teacher = momentum * teacher + (1 - momentum) * student``.

        Frozen parameters (fixed positions) are averaged, too, and stay what they are.
        """
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum
        )

    def _student_tokens(self, groups: list[list[tuple[Any, ...]]]) -> list[Tensor]:
        """Tokens (V * B, N, D) of each group's V views."""
        batches = [torch.cat([view for view, *_ in group]) for group in groups]
        if self.pack_views:
            return self.student.packed_tokens(batches)
        return [self.student.tokens(images) for images in batches]

    def _cross_modes(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: float,
        priors: Sequence[Tensor | None],
        own_attention: float,
    ) -> Tensor:
        """Modes in the teacher's view, its attention mixed with the previous stage's, if any."""
        if priors[0] is None:
            return mean_shift(queries, keys, scale)
        own = attention(queries, keys, scale)
        return mix_attention(own, torch.cat(list(priors)).to(own.dtype), own_attention) @ keys

    def _priors(self, crops: Sequence[Tensor], queries: list[Tensor]) -> list[Tensor]:
        """The previous stage's attention (B, Q, N) of each student view's queries."""
        teacher_crop, *student_crops = [self._normalised(crop) for crop in crops]
        keys = self.previous_stage.tokens(teacher_crop)
        return [
            self.previous_stage.prior(crop, indexes, keys)
            for crop, indexes in zip(student_crops, queries, strict=True)
        ]

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() - self.pixel_mean) / self.pixel_std


def _groups_of_one_size(views: list[Tensor], *others: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
    """Views that can be encoded in one batch, each with what belongs to it."""
    items = zip(views, *others, strict=True)
    return [list(group) for _, group in groupby(items, key=lambda item: item[0].shape[-1])]


@torch.no_grad()
def _feature_std(tokens: Tensor) -> Tensor:
    """Collapse shows as features that do not vary.

    The standard deviation over tokens (B, N, D) of the L2-normalised features, times sqrt(D):
    about 1 for features that fill the space, 0 when all are the same.
    """
    unit = F.normalize(tokens.float().flatten(0, 1), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[-1] ** 0.5
