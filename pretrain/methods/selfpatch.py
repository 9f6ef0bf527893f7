"""SelfPatch: DINO, and patches that resemble their neighbours (arXiv 2206.07990).

Shape suffixes: B images, N tokens, D width, K outputs, V views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.cait import LayerScaleBlockClassAttn
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
)
from pretrain.methods.dino import CentredCrossEntropy, assignments
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class _Aggregation(Networks):
    """Encoder, heads, and the attention of a learned token over a set of tokens."""

    def __init__(self, backbone: FLSLViT, head: FLSLHead, patch_head: FLSLHead, depth: int) -> None:
        super().__init__(backbone, head)
        self.patch_head = patch_head
        width = backbone.embed_dim
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.token, std=0.02)
        # 64 channels a head, as ViTs have, where the encoder's own number is not known.
        num_heads = math.gcd(width, max(width // 64, 1))
        if isinstance(backbone, FLSLViT):
            num_heads = int(str(backbone.architecture["num_heads"]))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block: Any = LayerScaleBlockClassAttn(width, num_heads, qkv_bias=True, norm_layer=norm)
            # The authors' blocks have no LayerScale, though their class has it in its name.
            del block.gamma_1, block.gamma_2
            block.gamma_1 = block.gamma_2 = 1.0
            self.blocks.append(block)

    def encode(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Tokens (B, N, D) of each view before the final norm, which the aggregation shares."""
        depth = getattr(self.backbone, "depth", None)
        return encode_views(self.backbone, views, num_blocks=depth)

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the encoder's final norm, if it has one."""
        return getattr(self.backbone, "final_norm", nn.Identity())(tokens)

    def aggregate(self, tokens: Tensor) -> Tensor:
        """Aggregate sets of tokens (S, N, D) to one output each (S, D)."""
        token = self.token.expand(len(tokens), -1, -1)
        for block in self.blocks:
            token = block(tokens, token)
        return self.norm(token)[:, 0]


class SelfPatch(BaseMethod):
    """The student's output for a patch is pulled to the teacher's for the patch's neighbours.

    To DINO's loss comes the cross-entropy of the student's output for each token, in all views, to
    the teacher's for the aggregation of the k of its 8 neighbours that are most similar to it.

    The aggregation h is the attention of a learned token (CaiT's, from timm). Over all tokens of a
    view it gives the global output, by which the student's is trained; the teacher's follows. The
    teacher sees local views as well: their global outputs are no targets, but move the centre. The
    grid is a torus: a border's neighbours lie at the opposite border.

    Args:
        num_neighbours: k.
        aggregation_depth: number of attention blocks of h.
        student_temp: tau_s.
        center_momentum: momentum of the running means.
    """

    min_global = 2

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        patch_head: FLSLHead,
        num_neighbours: int = 4,
        aggregation_depth: int = 2,
        patch_weight: float = 0.1,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        if not 1 <= num_neighbours <= 8:
            raise InputError(
                f"model.num_neighbours is {num_neighbours}; a patch has 8 neighbours, use 1 to 8."
            )
        networks = _Aggregation(backbone, head, patch_head, aggregation_depth)
        super().__init__(networks, has_teacher=True)
        self.num_centroids = len(head.last_layer.weight_v)
        self.num_neighbours, self.patch_weight = num_neighbours, patch_weight
        self.loss, self.patch_loss = (
            CentredCrossEntropy(len(h.last_layer.weight_v), student_temp, center_momentum)
            for h in (head, patch_head)
        )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views, count = [self.normalised(view) for view in inputs.views], inputs.num_global
        tokens = self.student.encode(views)
        student = [self.student.head(self.student.aggregate(view)) for view in tokens]
        patches = [self.student.patch_head(self.student.norm(view)) for view in tokens]
        with torch.no_grad():
            teacher_tokens = self.teacher.encode(views)
            teacher = [self.teacher.head(self.teacher.aggregate(view)) for view in teacher_tokens]
            targets = [self._neighbours_outputs(view) for view in teacher_tokens]
        everything = torch.cat(teacher)
        monitored = assignments(everything - self.loss.center, values.teacher_temp)
        with full_precision(everything):
            loss_global = self.loss.between_views(teacher[:count], student, values.teacher_temp)
            costs = [
                self.patch_loss(target, output, values.teacher_temp).mean()
                for target, output in zip(targets, patches, strict=True)
            ]
            loss_patch = torch.stack(costs).mean()
            self.loss.update(everything)
            self.patch_loss.update(torch.cat([target.flatten(0, 1) for target in targets]))
        losses = {
            "loss": loss_global + self.patch_weight * loss_patch,
            "loss_global": loss_global,
            "loss_patch": loss_patch,
        }
        return losses, {**monitored, "feature_std": feature_std(teacher_tokens[0])}

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the last layers of both heads."""
        return [self.student.head.last_layer, self.student.patch_head.last_layer]

    def _neighbours_outputs(self, tokens: Tensor) -> Tensor:
        """Return the teacher's outputs (B, N, K) for the neighbours of its tokens (B, N, D)."""
        near = similar_neighbours(tokens, self.num_neighbours)  # (B, N, k)
        sets = gather_tokens(tokens, near.flatten(1)).unflatten(1, near.shape[1:])
        outputs = self.teacher.patch_head(self.teacher.aggregate(sets.flatten(0, 1)))
        return outputs.unflatten(0, near.shape[:2])


def similar_neighbours(tokens: Tensor, count: int) -> Tensor:
    """Indexes (B, N, count) of the most similar of each token's 8 neighbours.

    Args:
        tokens: (B, N, D) of a square grid, row-major; the grid is a torus.
        count: number of neighbours, up to 8.
    """
    side = math.isqrt(tokens.shape[1])
    grid = torch.arange(side * side, device=tokens.device).view(side, side)
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if down or right]
    around = torch.stack([grid.roll(move, (0, 1)).flatten() for move in moves], dim=1)  # (N, 8)
    unit = F.normalize(tokens.float(), dim=-1)
    with full_precision(unit):  # half precision changes 4% of the sets
        similarity = (unit @ unit.mT).gather(2, around.expand(len(tokens), -1, -1))
    best = similarity.topk(count, dim=-1).indices
    return around.expand(len(tokens), -1, -1).gather(2, best)
