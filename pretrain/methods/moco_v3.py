"""MoCo v3: contrast of images with a momentum encoder, made for ViTs (arXiv 2104.02057).

Shape suffixes: B images, D width, F width of the outputs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    by_parts,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    mlp,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class MoCoV3(BaseMethod):
    """The student's output for a view is contrasted with the teacher's for other images.

    The loss is ``2 tau`` times the cross-entropy ``-log softmax_j(q_i.k_j / tau)`` at j = i,
    averaged over images and summed over both ways to take q from one view and k from the other; q
    are the normalised outputs of student and predictor, k those of the teacher.

    The teacher's outputs are those of all processes. Batch norm sees each view by itself, and the
    last one of each head has no weights.

    Args:
        output_dim: F.
        temperature: tau.
        freeze_patches: whether the projection of patches keeps its random start, for stability.
    """

    min_global = 2
    min_images = 2

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        temperature: float = 0.2,
        freeze_patches: bool = True,
    ) -> None:
        if freeze_patches and isinstance(backbone, FLSLViT):
            backbone.patch_embed.requires_grad_(False)
        head = _head(backbone.embed_dim, hidden_dim, hidden_dim, output_dim)
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.predictor = _head(output_dim, hidden_dim, output_dim)
        self.temperature = temperature

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views[:2]]
        tokens = encode_views(self.student.backbone, views, apart=True)
        outputs = by_parts(self.student.head, global_output(tokens), 2)
        queries = F.normalize(by_parts(self.predictor, outputs, 2).float(), dim=-1).chunk(2)
        with torch.no_grad():
            tokens = encode_views(self.teacher.backbone, views, apart=True)
            outputs = by_parts(self.teacher.head, global_output(tokens), 2)
            keys = F.normalize(outputs.float(), dim=-1).chunk(2)
        with full_precision(keys[0]):
            loss = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        return {"loss": loss}, {"feature_std": feature_std(tokens[0])}

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        first = 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, keys.contiguous())
            first, keys = dist.get_rank() * len(queries), torch.cat(gathered)
        labels = first + torch.arange(len(queries), device=queries.device)
        logits = queries @ keys.T / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, labels)


def _head(*widths: int) -> nn.Sequential:
    layers = mlp(*widths, norm=nn.BatchNorm1d, last_bias=False)
    return layers.append(nn.BatchNorm1d(widths[-1], affine=False))
