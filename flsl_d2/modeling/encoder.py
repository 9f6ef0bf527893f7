"""The protocol of encoders, and the sizes of vision transformers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from flsl_d2.modeling.pixels import InputFormat

# ViT-T, ViT-S and ViT-B of DeiT (arXiv 2012.12877), ViT-L of ViT (arXiv 2010.11929).
VIT_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


class Encoder(Protocol):
    """Images to a grid of tokens: what measures, pictures and pre-training ask of an encoder.

    :class:`flsl_d2.modeling.FLSLViT` and :class:`flsl_d2.modeling.TimmBackbone` follow it. An
    encoder is an ``nn.Module`` as well; a protocol cannot say so, hence the members of
    ``nn.Module`` that callers use are listed.

    Attributes:
        patch_size: side in pixels of the square that a token stands for.
        embed_dim: width D of the tokens.
        training: whether the encoder is in training mode.
        input_format: pixels that :meth:`forward_tokens` takes once they are normalised.
    """

    patch_size: int
    embed_dim: int
    training: bool
    input_format: InputFormat

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to tokens (B, N, D), row-major.

        Images are normalised as ``input_format`` says; sides are multiples of ``patch_size``.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the weights by name."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set training mode."""
        ...

    def to(self, device: Any) -> Any:
        """Move the weights to a device."""
        ...
