"""SimCLR: contrast of images (arXiv 2002.05709).

Shape suffixes: B images, D width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import Networks, TwoViewMethod, mlp


class NTXentLoss(nn.Module):
    """Cross-entropy of finding the other view of an image among all views of all processes.

    Args:
        temperature: tau.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare the outputs (B, D) of two views."""
        own = F.normalize(torch.cat([x, y]), dim=1)
        every, first = own, 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            every, first = torch.cat(dist_nn.all_gather(own)), dist.get_rank() * len(own)
        rows = torch.arange(len(own), device=own.device)
        logits = own @ every.T / self.temperature
        logits = logits.index_put((rows, first + rows), logits.new_full((), -math.inf))
        return F.cross_entropy(logits, first + rows.roll(len(x)))


class SimCLR(TwoViewMethod):
    """Two views of an image are contrasted with the views of all other images of the batch.

    The loss is the mean over all 2 B views i of ``-log softmax_k(z_i.z_k / tau)`` at k = j(i), over
    all k != i; z are the normalised outputs, j(i) the other view of the image of view i.

    The batch is that of all processes. The global output is the mean of the tokens. Batch norm
    follows both layers of the head, behind the last one without a bias.

    Args:
        temperature: tau.
    """

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        temperature: float = 0.1,
    ) -> None:
        widths, norm = (backbone.embed_dim, hidden_dim, output_dim), nn.BatchNorm1d
        head = mlp(*widths, norm=norm, last_bias=False).append(norm(output_dim))
        head[-1].register_parameter("bias", None)
        super().__init__(Networks(backbone, head))
        self.loss = NTXentLoss(temperature)
