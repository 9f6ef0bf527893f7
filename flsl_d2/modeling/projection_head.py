"""The projection head: an MLP into the space of the centroids, and the centroids.

Shape suffixes: D width, K centroids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have a separate norm, ``w = g * v / |v|``.

    The rows are the centroids: with inputs of norm 1 and ``g`` fixed at 1, the output is the
    cosine to each of them.

    Args:
        in_features: width of the input.
        out_features: number of centroids K.
        learn_scale: whether ``g`` is trained; otherwise it stays at 1.
    """

    def __init__(self, in_features: int, out_features: int, learn_scale: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1), requires_grad=learn_scale)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise directions uniformly, like ``nn.Linear``, and norms to 1."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., K)."""
        weight = self.weight_v / self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_g * weight)


class FLSLHead(nn.Module):
    """Projection g: MLP D -> hidden -> hidden -> bottleneck with GELU, L2 norm, K centroids.

    ``bottleneck_dim`` is the width of the space in which the centroids live.
    """

    def __init__(
        self,
        in_dim: int,
        num_centroids: int = 4096,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = WeightNormLinear(bottleneck_dim, num_centroids, learn_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise layers from a truncated normal (0.02), with zero bias."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer.reset_parameters()

    def forward(self, modes: Tensor) -> Tensor:
        """Modes (..., D) to logits (..., K)."""
        return self.last_layer(F.normalize(self.mlp(modes), dim=-1))
