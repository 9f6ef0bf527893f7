"""ImageNet's pixel statistics, and the change from a Detectron2 model's pixels to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

# Red, green, blue, on the scale of 0 to 255; torchvision's values.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class PixelAdapter(nn.Module):
    """Change from one channel order and normalisation to RGB with ImageNet's statistics.

    Detectron2's YAML defaults are BGR with a standard deviation of 1, made for its ResNets. An
    encoder pre-trained on normalised RGB would see noise, and nothing would fail. With this adapter
    a project keeps its ``INPUT.FORMAT`` and ``MODEL.PIXEL_MEAN/STD``. The change is exact.

    Args:
        mean: pixel mean of the model, in its channel order.
        std: pixel standard deviation of the model, in its channel order.
        flip_channels: whether the model's order is BGR.
        own_mean: pixel mean that the encoder was trained with, RGB.
        own_std: pixel standard deviation that the encoder was trained with, RGB.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip_channels: bool,
        own_mean: Sequence[float] = IMAGENET_MEAN,
        own_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.flip_channels = flip_channels
        order = slice(None, None, -1) if flip_channels else slice(None)
        fed_mean, fed_std = torch.tensor(mean[order]), torch.tensor(std[order])
        self.gain: Tensor
        self.shift: Tensor
        gain = fed_std / torch.tensor(own_std)
        shift = (fed_mean - torch.tensor(own_mean)) / torch.tensor(own_std)
        self.register_buffer("gain", gain.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PixelAdapter | None:
        """Return the adapter that a YAML config needs; None where none is needed."""
        mean, std = list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
        if len(mean) != 3 or cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            return None
        flip = cfg.INPUT.FORMAT == "BGR"
        adapter = cls(mean, std, flip)
        return None if adapter.is_identity else adapter

    @property
    def is_identity(self) -> bool:
        """Whether pixels are unchanged."""
        same_gain = torch.allclose(self.gain, torch.ones(3, 1, 1))
        # Within a hundredth of a grey level, so that 0.485 and 123.675 / 255 are the same.
        same_shift = torch.allclose(self.shift, torch.zeros(3, 1, 1), atol=2e-4)
        return not self.flip_channels and same_gain and same_shift

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, H, W)."""
        if self.flip_channels:
            images = images.flip(1)
        return images * self.gain + self.shift
