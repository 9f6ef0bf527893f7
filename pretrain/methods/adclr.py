"""ADCLR: DINO, and query crops that each view describes (arXiv 2306.13337).

Shape suffixes: B images, N tokens of a view, Q query crops of an image, D width, K outputs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.blocks import Block
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    feature_std,
    full_precision,
    global_output,
)
from pretrain.methods.dino import CentredCrossEntropy, assignments
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class ADCLR(BaseMethod):
    """What one view says about a small crop is pulled to what the teacher says from another view.

    The local views are crops of the size of a patch. Each becomes one token without a position,
    which reads the tokens of a view and is read by none. To DINO's loss of the global views comes,
    as nested loops (s, t the outputs of student and teacher for query token i in a global view, c
    the running mean of the teacher's)::

        for a in range(num_global):
            for v in range(num_global):
                if v != a:
                    for b in range(B):
                        for i in range(Q):
                            p_plus = softmax((t[a][b][i] - c) / tau_t)
                            p = softmax(s[v][b][i] / tau_s)
                            query -= sum_k(p_plus[k] * log(p[k])) / (num_pairs * B * Q)

    One head serves both. There are no other local views, which the original has.

    Args:
        student_temp: tau_s.
        center_momentum: momentum of the running means.
    """

    min_global = 2
    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        query_weight: float = 0.5,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.num_centroids, self.query_weight = len(head.last_layer.weight_v), query_weight
        self.loss, self.query_loss = (
            CentredCrossEntropy(self.num_centroids, student_temp, center_momentum) for _ in range(2)
        )

    def check_run(self, views: object, images: int) -> None:
        """Check that local views are query crops, besides what every method checks."""
        super().check_run(views, images)
        patch = self.student.backbone.patch_size
        kinds = getattr(views, "kinds", [])
        sizes = [size for size, *_ in kinds[getattr(views, "num_global", 0) :]]
        if not sizes or sizes[0] != patch:
            raise InputError(
                f"views.num_local is {len(sizes)} with views.local_size "
                f"{sizes[0] if sizes else 'unused'}, and ADCLR's query crops have the size of a "
                f"patch; set views.local_size={patch} and views.num_local to at least 1."
            )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        count = inputs.num_global
        views = torch.cat([self.normalised(view) for view in inputs.views[:count]])
        crops = torch.stack([self.normalised(crop) for crop in inputs.views[count:]], dim=1)
        student, student_queries, _ = self._outputs(self.student, views, crops, count)
        with torch.no_grad():
            teacher, teacher_queries, tokens = self._outputs(self.teacher, views, crops, count)
        monitored = assignments(torch.cat(teacher) - self.loss.center, values.teacher_temp)
        with full_precision(views):
            loss_global = self.loss.between_views(teacher, student, values.teacher_temp)
            loss_query = self.query_loss.between_views(
                teacher_queries, student_queries, values.teacher_temp
            )
            self.loss.update(torch.cat(teacher))
            self.query_loss.update(torch.cat(teacher_queries))
        losses = {
            "loss": loss_global + self.query_weight * loss_query,
            "loss_global": loss_global,
            "loss_query": loss_query,
        }
        return losses, {**monitored, "feature_std": feature_std(tokens)}

    @staticmethod
    def _outputs(
        networks: Networks, views: Tensor, crops: Tensor, count: int
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return outputs (B, K) and (B * Q, K) of each view, and the tokens (V * B, N, D)."""
        assert networks.head is not None
        tokens, queries = encode_with_queries(networks.backbone, views, crops)
        outputs = networks.head(global_output([tokens])).float()
        query_outputs = networks.head(queries.flatten(0, 1)).float()
        return list(outputs.chunk(count)), list(query_outputs.chunk(count)), tokens


def encode_with_queries(backbone: FLSLViT, views: Tensor, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Encode views with query tokens that attend to the view's tokens and to themselves.

    Views (V * B, 3, S, S) and crops (B, Q, 3, P, P) of the size of a patch are normalised. The
    views' tokens (V * B, N, D) are those without queries; the queries' are (V * B, Q, D).
    """
    patches = backbone.embed(views).flatten(1, 2)
    queries = backbone.embed(crops.flatten(0, 1), "none").view(*crops.shape[:2], -1)
    num_tokens, num_queries = patches.shape[1], queries.shape[1]
    tokens = torch.cat([patches, queries.repeat(len(patches) // len(queries), 1, 1)], dim=1)
    total = num_tokens + num_queries
    may_read = torch.eye(total, dtype=torch.bool, device=tokens.device)
    may_read[:, :num_tokens] = True
    tokens = tokens[:, None]  # (V * B, 1, N + Q, D)
    for block in cast(list[Block], list(backbone.blocks)):

        def attend(x: Tensor, _: object, block: Block = block) -> Tensor:
            return block.ls1(block.attn(block.norm1(x), may_read[None, None]))

        def expand(x: Tensor, _: object, block: Block = block) -> Tensor:
            return block.ls2(block.mlp(block.norm2(x)))

        tokens = block.drop_path(attend, tokens, None)
        tokens = block.drop_path(expand, tokens, None)
    tokens = backbone.final_norm(tokens)[:, 0]
    return tokens[:, :num_tokens], tokens[:, num_tokens:]
