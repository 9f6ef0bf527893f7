"""MaskFeat: predict histograms of gradients of masked patches (arXiv 2112.09133).

Shape suffixes: B images, N tokens, M masked tokens, S side of a view in pixels, P side of a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import BaseMethod, feature_std
from pretrain.methods.masking import MaskedNetworks, block_masks
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class MaskFeat(BaseMethod):
    """A linear layer predicts the gradients of the masked patches from their tokens.

    As nested loops (h the histograms of the cells and channels of a patch, F of them in all, y the
    prediction)::

        for b in range(B):
            for i in masked[b]:
                for f in range(F):
                    loss += (y[b][i][f] - h[b][i][f]) ** 2 / (F * number of masked tokens)

    Args:
        backbone: the encoder.
        mask_share: share of the tokens that is masked, in rectangles.
        num_orientations: number of bins of a histogram.
        cell_size: side of a cell in pixels; divides the patch.
    """

    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        mask_share: float = 0.4,
        num_orientations: int = 9,
        cell_size: int = 8,
    ) -> None:
        patch = backbone.patch_size
        if patch % cell_size:
            raise InputError(
                f"model.cell_size is {cell_size}, which does not divide patches of {patch} pixels; "
                "use a divisor."
            )
        outputs = 3 * num_orientations * (patch // cell_size) ** 2
        super().__init__(MaskedNetworks(backbone, nn.Linear(backbone.embed_dim, outputs)))
        self.mask_share, self.num_orientations = mask_share, num_orientations
        self.cell_size, self.cells = cell_size, patch // cell_size

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        raw = torch.cat(inputs.views[: inputs.num_global]).float()
        images = self.normalised(raw)
        side = images.shape[-1] // self.student.backbone.patch_size
        mask = block_masks(len(images), side, 1.0, self.mask_share, self.mask_share)
        masked = mask.flatten().nonzero()[:, 0].to(images.device, non_blocking=True)
        tokens = self.student.masked_tokens(images, mask.to(images.device, non_blocking=True))
        predicted = self.student.head(tokens.flatten(0, 1)[masked]).float()
        loss = (predicted - self._targets(raw)[masked]).pow(2).mean()
        return {"loss": loss}, {"feature_std": feature_std(tokens)}

    def _targets(self, images: Tensor) -> Tensor:
        """Histograms (B * N, F) of the patches."""
        histograms = hog(images, self.num_orientations, self.cell_size)  # (B, 3 * bins, H, W)
        return F.unfold(histograms, self.cells, stride=self.cells).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def hog(images: Tensor, num_orientations: int = 9, cell_size: int = 8) -> Tensor:
    """Histograms of oriented gradients of each channel, each with norm 1 (L2).

    Gradients are central differences, 0 at the border; orientations have no direction, and a pixel
    votes with its magnitude for one bin. These are scikit-image's for blocks of one cell.

    Args:
        images: (B, C, S, S).
        num_orientations: number of bins between 0 and 180 degrees.
        cell_size: side of a cell in pixels; divides S.

    Returns:
        (B, C * num_orientations, S / cell_size, S / cell_size), the bins of a channel together.
    """
    images = images.float()
    rows, columns = torch.zeros_like(images), torch.zeros_like(images)
    rows[..., 1:-1, :] = images[..., 2:, :] - images[..., :-2, :]
    columns[..., 1:-1] = images[..., 2:] - images[..., :-2]
    angle = torch.atan2(rows, columns) / math.pi % 1.0
    bins = (angle * num_orientations).long().clamp(max=num_orientations - 1)
    magnitude = torch.hypot(rows, columns)
    votes = torch.zeros(
        *images.shape[:2], num_orientations, *images.shape[2:], device=images.device
    )
    votes.scatter_(2, bins[:, :, None], magnitude[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), cell_size).unflatten(1, (-1, num_orientations))
    norm = (cells.pow(2).sum(dim=2, keepdim=True) + 1e-10).sqrt()
    return (cells / norm).flatten(1, 2)
