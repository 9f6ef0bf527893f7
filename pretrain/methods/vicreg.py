"""VICReg and VICRegL: variance, invariance, covariance (arXiv 2105.04906, 2210.01571).

Shape suffixes: B images, N tokens of a view, D width, M matches, F width of the expander.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    TwoViewMethod,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    mlp,
)
from pretrain.methods.places import token_centres
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class VICRegLoss(nn.Module):
    """The weighted sum of the terms of VICReg."""

    def __init__(
        self,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.invariance_weight = invariance_weight
        self.variance_weight, self.covariance_weight = variance_weight, covariance_weight

    def forward(self, x: Tensor, y: Tensor, covariance_factor: float = 1.0) -> Tensor:
        """Compare the outputs (B, F) of two views, or (B, M, F), match by match."""
        statistics = self.statistics(x, covariance_factor) + self.statistics(y, covariance_factor)
        return self.invariance_weight * F.mse_loss(x, y) + statistics

    def statistics(self, z: Tensor, covariance_factor: float = 1.0) -> Tensor:
        """Variance, halved, and covariance of outputs (B, F), or the mean of those of (B, M, F)."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # As rows, whose gradients are contiguous: gloo mixes up those of other layouts.
            rows = torch.cat(dist_nn.all_gather(z.flatten(1).contiguous()))
            z = rows.view(-1, *z.shape[1:])
        z = z - z.mean(dim=0)
        variance = (1 - (z.var(dim=0) + 1e-4).sqrt()).relu().mean() / 2
        z = z.view(len(z), -1, z.shape[-1]).transpose(0, 1)  # (M, B, F)
        squares = (z.mT @ z / (z.shape[1] - 1)).pow(2)
        others = squares.sum(dim=(1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(dim=1)
        covariance = covariance_factor * others.mean() / z.shape[-1]
        return self.variance_weight * variance + self.covariance_weight * covariance


class VICReg(TwoViewMethod):
    """Outputs of two views agree, vary over the batch, and have uncorrelated components.

    ``loss = 25 * invariance + 25 * variance + covariance``: the mean squared difference of the
    outputs x, y of the two views; the mean over components of ``max(0, 1 - sqrt(var + 1e-4))``,
    averaged over x and y; the sum of the squared covariances of different components over F, of x
    and of y.

    The batch is that of all processes; batch norm sees each view by itself.

    Args:
        output_dim: F.
    """

    views_apart = True

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ) -> None:
        widths = (backbone.embed_dim, hidden_dim, hidden_dim, output_dim)
        super().__init__(Networks(backbone, mlp(*widths, norm=nn.BatchNorm1d, last_bias=False)))
        self.loss = VICRegLoss(invariance_weight, variance_weight, covariance_weight)


class VICRegL(BaseMethod):
    """VICReg of global outputs, and of tokens that are matched by place and by feature.

    As nested loops, over pairs of views (a global, b any other; z the local expander's outputs, u
    the tokens' centres in the image)::

        for a, b in pairs:
            for distance in (|u[a][i] - u[b][j]|, |z[a][i] - z[b][j]|):
                for i in range(N):
                    near[i] = argmin_j(distance[i][j])
                # by place the M tokens i with the smallest distance[i][near[i]], by feature all
                best = matched tokens in the order of the grid
                local += vicreg(z[a][best], z[b][near[best]]) / num_pairs   # and b to a, halved
        loss = alpha * vicreg(global outputs) + (1 - alpha) * local

    VICReg's statistics of matched tokens are taken over the batch, match by match. Expanders have
    layer norm, as the authors' for ConvNeXt. Centres are measured in shares of the image, where
    the authors have pixels.

    Args:
        alpha: weight of the global term.
        num_matches: number M of matches by place from the first to the second view, and back.
        all_by_feature: whether all tokens are matched by feature; otherwise M, as by place.
    """

    min_global = 2
    min_images = 2

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        local_dim: int = 512,
        alpha: float = 0.75,
        num_matches: tuple[int, int] = (20, 4),
        all_by_feature: bool = True,
    ) -> None:
        norm, width = nn.LayerNorm, backbone.embed_dim
        head = mlp(width, hidden_dim, hidden_dim, output_dim, norm=norm, last_bias=False)
        super().__init__(Networks(backbone, head))
        local_widths = (width, local_dim, local_dim, local_dim)
        self.student.local_head = mlp(*local_widths, norm=norm, last_bias=False)
        self.alpha, self.num_matches = alpha, tuple(num_matches)
        self.all_by_feature, self.loss = all_by_feature, VICRegLoss()

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        tokens = encode_views(self.student.backbone, views)
        outputs = self.student.head(global_output(tokens)).float().chunk(len(views))
        maps = [self.student.local_head(view).float() for view in tokens]
        centres = [
            token_centres(view.shape[1], box)
            for box, view in zip(inputs.regions, tokens, strict=True)
        ]
        pairs = [(a, b) for a in range(inputs.num_global) for b in range(len(views)) if a != b]
        with full_precision(views[0]):
            statistics = [2 * self.loss.statistics(z, 0.5) for z in outputs]
            invariance = [F.mse_loss(outputs[a], outputs[b]) for a, b in pairs]
            weight = self.loss.invariance_weight
            whole = weight * _mean(invariance) + _mean(statistics)
            local = _mean([self._matched(maps, centres, a, b) for a, b in pairs])
            loss = self.alpha * whole + (1 - self.alpha) * local
        losses = {"loss": loss, "loss_global": whole, "loss_local": local}
        return losses, {"feature_std": feature_std(tokens[0])}

    def _matched(self, maps: Sequence[Tensor], centres: Sequence[Tensor], a: int, b: int) -> Tensor:
        """VICReg of the matched tokens of two views."""
        total = maps[a].new_zeros(())
        for by, limits in (
            (maps, (None, None) if self.all_by_feature else self.num_matches),
            (centres, self.num_matches),
        ):
            for (i, j), limit in zip(((a, b), (b, a)), limits, strict=True):
                first, second = nearest_pairs(torch.cdist(by[i], by[j]), limit)
                pair = gather_tokens(maps[i], first), gather_tokens(maps[j], second)
                total = total + self.loss(*pair, covariance_factor=0.5) / 2
        return total


def _mean(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def nearest_pairs(distances: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """Match each token of one view with the nearest of another, and keep the nearest pairs.

    Distances are (B, N, N'); ``limit`` is the number M of pairs, None for all N. The indexes
    (B, M) in the first view are ascending.
    """
    smallest, nearest = distances.min(dim=-1)
    count = distances.shape[1] if limit is None else limit
    kept = smallest.sort(dim=1).indices[:, :count].sort(dim=1).values
    return kept, nearest.gather(1, kept)
