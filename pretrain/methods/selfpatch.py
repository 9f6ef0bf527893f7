"""SelfPatch: DINO, and patches that resemble their neighbours (arXiv 2206.07990).

Shape suffixes: B images, N tokens, D width, K outputs, V views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    import_extra,
)
from pretrain.methods.dino import assignments
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class _Aggregation(Networks):
    """Encoder, heads, and the attention of a learned token over a set of tokens."""

    def __init__(self, backbone: FLSLViT, head: FLSLHead, patch_head: FLSLHead, depth: int) -> None:
        super().__init__(backbone, head)
        self.patch_head = patch_head
        self.token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        nn.init.trunc_normal_(self.token, std=0.02)
        width = backbone.embed_dim
        # 64 channels a head, as ViTs have, where the encoder's own number is not known.
        num_heads = math.gcd(width, max(width // 64, 1))
        if isinstance(backbone, FLSLViT):
            num_heads = int(str(backbone.architecture["num_heads"]))
        self.blocks = nn.ModuleList(
            LayerScaleBlockClassAttn(width, num_heads, qkv_bias=True, init_values=0.1)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(backbone.embed_dim)

    def aggregate(self, tokens: Tensor) -> Tensor:
        """Aggregate sets of tokens (S, N, D) to one output each (S, D)."""
        token = self.token.expand(len(tokens), -1, -1)
        for block in self.blocks:
            token = block(tokens, token)
        return self.norm(token)[:, 0]


class SelfPatch(BaseMethod):
    """The student's output for a patch is pulled to the teacher's for the patch's neighbours.

    To DINO's loss comes, as nested loops over global views v (x, y the tokens of student and
    teacher, h the aggregation, c the running mean of the teacher's outputs)::

        for v in range(num_global):
            for b in range(B):
                for i in range(N):
                    near = the k of i's 8 neighbours with the largest cos(y[v][b][i], y[v][b][j])
                    p_plus = softmax((g_t(h_t(y[v][b][near])) - c) / tau_t)
                    p = softmax(g_s(x[v][b][i]) / tau_s)
                    patch -= sum_k(p_plus[k] * log(p[k])) / (num_global * B * N)

    The aggregation h is the attention of a learned token (CaiT's, from timm). Over all tokens of a
    view it gives the global output, by which the student's is trained; the teacher's follows. At
    the border of the grid neighbours are mirrored.

    Args:
        backbone: encoder of the student.
        head: projection head of global outputs.
        patch_head: projection head of patches.
        num_neighbours: k.
        aggregation_depth: number of attention blocks of h.
        patch_weight: weight of the patches' term.
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
        losses, options = import_extra("lightly.loss"), (student_temp, center_momentum)
        self.loss = losses.DINOLoss(
            self.num_centroids, student_temp=options[0], center_momentum=options[1]
        )
        self.patch_loss = losses.IBOTPatchLoss(
            len(patch_head.last_layer.weight_v),
            student_temp=options[0],
            center_momentum=options[1],
        )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views, count = [self.normalised(view) for view in inputs.views], inputs.num_global
        student_tokens = encode_views(self.student.backbone, views)
        student = self._global_outputs(self.student, student_tokens)
        patches = torch.cat(student_tokens[:count]).flatten(0, 1)
        with torch.no_grad():
            teacher_tokens = encode_views(self.teacher.backbone, views[:count])
            teacher = self._global_outputs(self.teacher, teacher_tokens)
            together = torch.cat(teacher_tokens)
            near = similar_neighbours(together, self.num_neighbours)  # (V * B, N, k)
            sets = gather_tokens(together, near.flatten(1)).unflatten(1, near.shape[1:])
            targets = self.teacher.patch_head(self.teacher.aggregate(sets.flatten(0, 1))).float()
        monitored = assignments(torch.cat(teacher) - self.loss.center.view(-1), values.teacher_temp)
        every = torch.ones(near.shape[:2], dtype=torch.bool, device=near.device)[:, None]
        outputs = self.student.patch_head(patches).float()
        with full_precision(outputs):
            loss_global = self.loss(teacher, student, teacher_temp=values.teacher_temp)
            loss_patch = self.patch_loss(targets, outputs, every, values.teacher_temp)
        losses = {
            "loss": loss_global + self.patch_weight * loss_patch,
            "loss_global": loss_global,
            "loss_patch": loss_patch,
        }
        return losses, {**monitored, "feature_std": feature_std(together)}

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the last layers of both heads."""
        return [self.student.head.last_layer, self.student.patch_head.last_layer]

    @staticmethod
    def _global_outputs(networks: _Aggregation, tokens: list[Tensor]) -> list[Tensor]:
        assert networks.head is not None
        return [networks.head(networks.aggregate(view)).float() for view in tokens]


def similar_neighbours(tokens: Tensor, count: int) -> Tensor:
    """Indexes (B, N, count) of the most similar of each token's 8 neighbours.

    Args:
        tokens: (B, N, D) of a square grid of at least 2 x 2, row-major.
        count: number of neighbours, up to 8. Beyond the border the grid is mirrored, so that a
            neighbour at the border may be there several times.
    """
    side = math.isqrt(tokens.shape[1])
    grid = torch.arange(side * side, device=tokens.device, dtype=torch.float32)
    padded = F.pad(grid.view(1, 1, side, side), (1, 1, 1, 1), mode="reflect")
    around = F.unfold(padded, 3)[0].T.long()  # (N, 9)
    around = around[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    unit = F.normalize(tokens.float(), dim=-1)
    similarity = (unit @ unit.mT).gather(2, around.expand(len(tokens), -1, -1))
    best = similarity.topk(count, dim=-1).indices
    return around.expand(len(tokens), -1, -1).gather(2, best)
