"""Colourisation: predict the colours of a grey image (arXiv 1603.08511).

Shape suffixes: B images, N tokens, P side of a patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import BaseMethod, Networks, feature_std
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues

_BIN = 10  # width of a bin of a and b, as in the paper
_REACH = 11  # bins on each side of grey; a and b of sRGB lie between -110 and 110


class Colorization(BaseMethod):
    """A linear layer predicts the colour of each patch from the tokens of the grey image.

    As nested loops (c the bin of the mean a and b of a patch in CIE Lab, in steps of 10)::

        for b in range(B):
            for i in range(N):
                loss -= log_softmax(head(f(grey(x[b]))[i]))[c[b][i]] / (B * N)

    The original predicts a quarter of the resolution, spreads a colour over near bins and gives
    rare colours more weight; here a patch has one bin and all have the same weight.
    """

    def __init__(self, backbone: FLSLViT) -> None:
        super().__init__(Networks(backbone, nn.Linear(backbone.embed_dim, (2 * _REACH) ** 2)))

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = torch.cat(inputs.views[: inputs.num_global]).float()
        lab = rgb_to_lab(images / 255)
        grey = (lab[:, :1] * 2.55).expand_as(images)  # L lies in 0 to 100
        tokens = self.student.backbone.forward_tokens(self.normalised(grey))
        colours = F.avg_pool2d(lab[:, 1:], self.student.backbone.patch_size)
        bins = (colours / _BIN).floor().long().clamp(-_REACH, _REACH - 1) + _REACH
        labels = (bins[:, 0] * 2 * _REACH + bins[:, 1]).flatten()
        logits = self.student.head(tokens).float().flatten(0, 1)
        right = (logits.argmax(dim=1) == labels).float().mean()
        monitored = {"feature_std": feature_std(tokens), "task_accuracy": right}
        return {"loss": F.cross_entropy(logits, labels)}, monitored


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert sRGB (B, 3, H, W) in 0 to 1 to CIE Lab of the same shape (white D65, 2 degrees)."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055).pow(2.4), images / 12.92)
    matrix = torch.tensor(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ],
        dtype=images.dtype,
    )
    white = torch.tensor([0.95047, 1.0, 1.08883], dtype=images.dtype)
    to_xyz = to_device(matrix / white[:, None], images.device)
    xyz = torch.einsum("ij,bjhw->bihw", to_xyz, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6).pow(1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)
