"""VICReg and VICRegL: variance, invariance, covariance (arXiv 2105.04906, 2210.01571).

Shape suffixes: B images, N tokens of a view, D width, M matches, F width of the expander.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    TwoViewMethod,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    import_extra,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class VICReg(TwoViewMethod):
    """Outputs of two views agree, vary over the batch, and have uncorrelated components.

    As nested loops (x, y the expanders' outputs of the two views, C(z) the covariance of z over
    the batch, V its variance)::

        for z in (x, y):
            for f in range(F):
                variance += max(0, 1 - sqrt(V(z)[f] + 1e-4)) / F / 2
                for g in range(F):
                    if g != f:
                        covariance += C(z)[f][g] ** 2 / F
        for b in range(B):
            invariance += sum_f((x[b][f] - y[b][f]) ** 2) / (F * B)
        loss = 25 * invariance + 25 * variance + 1 * covariance

    The batch is that of all processes. Expander and loss are lightly's.

    Args:
        backbone: the encoder.
        hidden_dim: width of the expander's hidden layers.
        output_dim: F.
        invariance_weight: weight of the invariance.
        variance_weight: weight of the variance.
        covariance_weight: weight of the covariance.
    """

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 8192,
        output_dim: int = 8192,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
    ) -> None:
        heads = import_extra("lightly.models.modules.heads")
        head = heads.VICRegProjectionHead(backbone.embed_dim, hidden_dim, output_dim)
        super().__init__(Networks(backbone, head))
        self.loss = import_extra("lightly.loss").VICRegLoss(
            invariance_weight, variance_weight, covariance_weight, gather_distributed=True
        )


class _LocalNetworks(Networks):
    def __init__(self, backbone: FLSLViT, hidden_dim: int, output_dim: int, local_dim: int) -> None:
        heads = import_extra("lightly.models.modules.heads")
        super().__init__(
            backbone, heads.VICRegProjectionHead(backbone.embed_dim, hidden_dim, output_dim)
        )
        self.local_head = heads.VicRegLLocalProjectionHead(backbone.embed_dim, local_dim, local_dim)


class VICRegL(BaseMethod):
    """VICReg of global outputs, and of tokens that are matched by place and by feature.

    As nested loops, over pairs of views (a global, b any other; z the local expander's outputs, u
    the tokens' places in the image)::

        for a, b in pairs:
            for distance in (|u[a][i] - u[b][j]|, |z[a][i] - z[b][j]|):
                for i in range(N):
                    near[i] = argmin_j(distance[i][j])
                best = the M tokens i with the smallest distance[i][near[i]]
                local += vicreg(z[a][best], z[b][near[best]]) / num_pairs   # and b to a, halved
        loss = alpha * vicreg(global outputs) + (1 - alpha) * local

    VICReg's statistics of matched tokens are taken over the batch, match by match. Expanders and
    loss are lightly's; the original measures places in pixels, this one as shares of the image.

    Args:
        backbone: the encoder.
        hidden_dim: width of the global expander's hidden layers.
        output_dim: width of the global outputs.
        local_dim: width of the local expander.
        alpha: weight of the global term.
        num_matches: number of matches from the first to the second view, and back.
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
    ) -> None:
        super().__init__(_LocalNetworks(backbone, hidden_dim, output_dim, local_dim))
        self.loss = import_extra("lightly.loss").VICRegLLoss(
            alpha=alpha, num_matches=tuple(num_matches), gather_distributed=True
        )

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        tokens = encode_views(self.student.backbone, views)
        outputs = self.student.head(global_output(tokens)).float().chunk(len(views))
        features = []
        for output, view in zip(outputs, tokens, strict=True):
            side = math.isqrt(view.shape[1])
            features.append(
                (output, self.student.local_head(view).float().unflatten(1, (side, side)))
            )
        grids = [
            token_places(place, local.shape[1])
            for place, (_, local) in zip(inputs.places, features, strict=True)
        ]
        count = inputs.num_global
        local_views = (features[count:], grids[count:]) if len(views) > count else (None, None)
        with full_precision(views[0]):
            loss = self.loss(features[:count], grids[:count], *local_views).squeeze()
        return {"loss": loss}, {"feature_std": feature_std(tokens[0])}


def token_places(places: Tensor, side: int) -> Tensor:
    """Centres of a view's patches in the image, as shares of it.

    Args:
        places: (B, 4) of :class:`pretrain.methods.protocol.StepInputs`.
        side: number of tokens along each side of the view.

    Returns:
        (B, side, side, 2): x and y.
    """
    centres = (torch.arange(side, device=places.device) + 0.5) / side
    top, left, height, width = places[..., None].unbind(1)
    x = (left + centres * width)[:, None, :].expand(-1, side, -1)
    y = (top + centres * height)[:, :, None].expand(-1, -1, side)
    return torch.stack([x, y], dim=-1)
