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
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import BaseMethod, feature_std, full_precision
from pretrain.methods.masking import MaskedNetworks, masks_of_share
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues

_SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


class MaskFeat(BaseMethod):
    """A linear layer predicts the gradients of the masked patches from their tokens.

    The loss is the mean squared error to the histograms of the cells and channels of each masked
    patch.

    Args:
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
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        side = images.shape[-1] // self.student.backbone.patch_size
        mask = masks_of_share(len(images), side, self.mask_share)
        masked = to_device(mask.flatten().nonzero()[:, 0], images.device)
        tokens = self.student.masked_tokens(images, to_device(mask, images.device))
        predicted = self.student.head(tokens.flatten(0, 1)[masked]).float()
        loss = (predicted - self._targets(images)[masked]).pow(2).mean()
        return {"loss": loss}, {"feature_std": feature_std(tokens)}

    def _targets(self, images: Tensor) -> Tensor:
        """Histograms (B * N, F) of the patches."""
        histograms = hog(images, self.num_orientations, self.cell_size)  # (B, 3 * bins, H, W)
        return F.unfold(histograms, self.cells, stride=self.cells).transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def hog(images: Tensor, num_orientations: int = 9, cell_size: int = 8) -> Tensor:
    """Histograms of oriented gradients of each channel, each with norm 1 (L2).

    Gradients are those of Sobel's filter, the border being mirrored; orientations have no
    direction, and a pixel votes with its magnitude for one bin. No window weighs the pixels.

    Args:
        images: (B, C, S, S).
        num_orientations: number of bins between 0 and 180 degrees.
        cell_size: side of a cell in pixels; divides S.

    Returns:
        (B, C * num_orientations, S / cell_size, S / cell_size), the bins of a channel together.
    """
    images = images.float()
    channels = images.shape[1]
    sobel = to_device(_SOBEL.to(images.dtype), images.device).expand(channels, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    with full_precision(images):
        columns = F.conv2d(padded, sobel, groups=channels)
        rows = F.conv2d(padded, sobel.mT, groups=channels)
    # From the authors' axis, which is vertical: atan2 of the horizontal to the vertical gradient.
    bins = (torch.atan2(columns, rows) / math.pi * num_orientations).floor().long()
    bins = bins % num_orientations
    magnitude = torch.hypot(rows, columns)
    votes = torch.zeros(
        *images.shape[:2], num_orientations, *images.shape[2:], device=images.device
    )
    votes.scatter_(2, bins[:, :, None], magnitude[:, :, None])
    cells = F.avg_pool2d(votes.flatten(1, 2), cell_size, divisor_override=1)
    cells = cells.unflatten(1, (-1, num_orientations))
    return F.normalize(cells, dim=2).flatten(1, 2)
