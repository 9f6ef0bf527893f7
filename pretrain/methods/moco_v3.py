"""MoCo v3: contrast of images with a momentum encoder, made for ViTs (arXiv 2104.02057).

Shape suffixes: B images, D width, F width of the outputs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    import_extra,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class MoCoV3(BaseMethod):
    """The student's output for a view is contrasted with the teacher's for other images.

    As nested loops (q the normalised outputs of student and predictor, k those of the teacher)::

        for a, b in ((0, 1), (1, 0)):
            for i in range(B):
                for j in range(B):
                    sum[i] += exp(q[a][i] . k[b][j] / tau)
                loss -= 2 * tau * log(exp(q[a][i] . k[b][i] / tau) / sum[i]) / B

    The teacher's outputs are those of all processes. Heads are lightly's; the batch norm in them
    sees the images of one process, in the teacher's as well.

    Args:
        backbone: encoder of the student.
        hidden_dim: width of the heads' hidden layers.
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
        heads = import_extra("lightly.models.modules.heads")
        head = heads.MoCoProjectionHead(backbone.embed_dim, hidden_dim, output_dim, 3, True)
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.predictor = heads.MoCoProjectionHead(output_dim, hidden_dim, output_dim, 2, True)
        self.temperature = temperature

    def train(self, mode: bool = True) -> MoCoV3:
        """Set the mode; the batch norm of the teacher's head is that of the student's."""
        super().train(mode)
        self.teacher.head.train(mode)
        return self

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views[:2]]
        outputs = self.student.head(global_output(encode_views(self.student.backbone, views)))
        queries = F.normalize(self.predictor(outputs).float(), dim=-1).chunk(2)
        with torch.no_grad():
            tokens = encode_views(self.teacher.backbone, views)
            keys = F.normalize(self.teacher.head(global_output(tokens)).float(), dim=-1).chunk(2)
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
