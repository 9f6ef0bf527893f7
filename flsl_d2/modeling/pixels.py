"""ImageNet's pixel statistics, and the change from a Detectron2 model's pixels to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

# Red, green, blue, on the scale of 0 to 255; torchvision's values.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class InputFormat:
    """The pixels that an encoder was trained on.

    Attributes:
        channels: number of channels; three are red, green and blue.
        bits: number of bits of a stored value, in whose scale ``mean`` and ``std`` are.
        mean: mean of each channel that images are normalised with.
        std: standard deviation of each channel.
        stated: whether a file or a run says so; otherwise it is the default: ImageNet's values for
            three channels, and no normalisation for another number.
    """

    channels: int = 3
    bits: int = 8
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stated: bool = False

    @classmethod
    def default(cls, channels: int) -> InputFormat:
        """Return the format to assume of an encoder whose file does not state it."""
        if channels == 3:
            return cls()
        return cls(channels, 8, (0.0,) * channels, (1.0,) * channels)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputFormat:
        """Read what :meth:`as_dict` wrote.

        Raises:
            ValueError: values are missing, or are not numbers of every channel.
        """
        try:
            mean, std = (tuple(float(x) for x in values[name]) for name in ("mean", "std"))
            channels, bits = int(values["channels"]), int(values["bits"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no input format: {values!r}") from error
        if not len(mean) == len(std) == channels or not all(x > 0 for x in std) or bits < 1:
            raise ValueError(f"no input format: {values!r}")
        return cls(channels, bits, mean, std, True)

    def as_dict(self) -> dict[str, Any] | None:
        """Return plain values, for files; None for the default of other than three channels."""
        if not self.stated and self.channels != 3:
            return None
        values = asdict(self)
        del values["stated"]
        return {**values, "mean": list(self.mean), "std": list(self.std)}


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
