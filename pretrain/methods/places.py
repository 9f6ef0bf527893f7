"""Places of student views' patches in the teacher's view, and the teacher's targets there.

Shape suffixes: B images, Q queries, N tokens of a square grid, D width, K centroids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from pretrain.methods.flsl_objective import mean_over_ranks


def token_centres(num_tokens: int, boxes: Tensor) -> Tensor:
    """Centres of a view's patches in the teacher's view, or in the image.

    Token ``n`` of a view of G x G tokens has its centre at ``((n mod G) + 1/2) / G`` of the view's
    width and ``(floor(n / G) + 1/2) / G`` of its height; the view's box takes that into the
    teacher's view.

    Boxes (B, 4) are ``regions`` of :class:`pretrain.methods.protocol.StepInputs`; the centres
    (B, N, 2) are x and y as shares.
    """
    side = math.isqrt(num_tokens)
    indexes = torch.arange(num_tokens, device=boxes.device)
    top, left, height, width = boxes[..., None].unbind(1)  # each (B, 1)
    x = left + (indexes % side + 0.5) / side * width
    y = top + (indexes.div(side, rounding_mode="floor") + 0.5) / side * height
    return torch.stack([x, y], dim=-1)


def tokens_at(tokens: Tensor, xy: Tensor) -> Tensor:
    """Tokens at any places, interpolated bilinearly between the centres of their patches.

    Tokens (B, N, D) are row-major, and ``xy`` (B, Q, 2) are x and y as shares of the view; the
    result (B, Q, D) is float32. Places outside the outermost centres get the value at the border.
    """
    side = math.isqrt(tokens.shape[1])
    grid = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    # Half precision would place the samples up to a patch off.
    with torch.autocast(tokens.device.type, enabled=False):
        out = F.grid_sample(
            grid, 2 * xy.float()[:, None] - 1, padding_mode="border", align_corners=False
        )
    return out[:, :, 0].transpose(1, 2)


class VarianceBound(nn.Module):
    """Bound on what a token's place, and its image, explain of the targets' variance.

    Logits ``l_bn`` of token n of image b have a mean ``mu_n`` for each place n and ``mu`` over all.
    The variance between places, ``V_p = mean_n |mu_n - mu|^2``, and that within them,
    ``V_w = mean_bn |l_bn - mu_n|^2``, give place the share ``V_p / (V_p + V_w)``. Where it exceeds
    ``position_share``, the means of the places are shrunk until it does not; then the means
    ``nu_b`` of the images likewise::

        kept = min(1, sqrt(position_share / (1 - position_share) * V_w / V_p))
        for b in range(B):
            for n in range(N):
                l[b, n] -= (1 - kept) * (mu[n] - mu)
        kept = min(1, sqrt(image_share / (1 - image_share) * V_w / V_i))  # of the images' means
        for b in range(B):
            for n in range(N):
                l[b, n] -= (1 - kept) * (nu[b] - mu)

    The places' means and variances are running averages over steps and ranks, so that small batches
    do; those of the images are of the batch.

    Args:
        num_tokens: N, number of tokens of the view.
        num_centroids: K.
        position_share: largest share of place, above 0; 1 for no bound.
        image_share: largest share of the image, above 0; 1 for no bound.
    """

    def __init__(
        self,
        num_tokens: int,
        num_centroids: int,
        position_share: float = 1.0,
        image_share: float = 1.0,
        momentum: float = 0.95,
    ) -> None:
        super().__init__()
        self.position_share, self.image_share = position_share, image_share
        self.momentum = momentum
        self.means: Tensor
        self.variance: Tensor
        self.weight: Tensor
        self.register_buffer("means", torch.zeros(num_tokens, num_centroids))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))  # of the averages so far, which start at 0

    def set_num_tokens(self, num_tokens: int) -> None:
        """Set N, before the first step."""
        self.means = self.means.new_zeros(num_tokens, self.means.shape[1])

    @torch.no_grad()
    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, N, K) to logits of the same shape, float32.

        Raises:
            InputError: the view has another number of tokens.
        """
        if logits.shape[1] != len(self.means):
            raise InputError(
                f"the teacher's view has {logits.shape[1]} tokens and the table of positions "
                f"{len(self.means)}, and model.position_share and model.image_share need as many; "
                "set model.backbone.img_size to views.global_size."
            )
        logits = logits.float()
        if self.training:
            rest = 1 - self.momentum
            self.means.lerp_(mean_over_ranks(logits.mean(dim=0)), rest)
            self.weight.lerp_(torch.ones_like(self.weight), rest)
            within = _mean_square(logits - self.means / self.weight)
            self.variance.lerp_(mean_over_ranks(within), rest)
        means, within = self.means / self.weight, self.variance / self.weight
        mean = means.mean(dim=0)
        logits = logits - _excess(means - mean, within, self.position_share)
        image_means = logits.mean(dim=1, keepdim=True)  # (B, 1, K)
        within = mean_over_ranks(_mean_square(logits - image_means))
        return logits - _excess(image_means - mean, within, self.image_share)


def _excess(deviations: Tensor, within: Tensor, share: float) -> Tensor:
    """Part of group means' deviations (..., K) above their share of the variance."""
    if share == 1:
        return torch.zeros_like(deviations)
    between = mean_over_ranks(_mean_square(deviations)).clamp_min(1e-12)
    kept = (share / (1 - share) * within / between).sqrt()
    return (1 - kept.clamp(max=1.0)) * deviations


def _mean_square(values: Tensor) -> Tensor:
    """Mean squared length of vectors (..., K)."""
    return values.square().sum(dim=-1).mean()
