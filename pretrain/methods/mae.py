"""MAE: masked autoencoders (arXiv 2111.06377).

Shape suffixes: B images, N tokens, M masked tokens, D width, P side of a patch.
"""

from __future__ import annotations

import torch
from torch import nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import BaseMethod, Networks, feature_std
from pretrain.methods.masking import TokenDecoder, patches_of, random_split
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class MAE(BaseMethod):
    """A decoder predicts the pixels of the masked patches from the tokens of the visible ones.

    The encoder sees the visible patches alone. The loss is the mean squared error to the pixels of
    the masked patches, each patch normalised by its own mean and variance.

    Args:
        mask_share: share of the tokens that is masked.
        normalise_pixels: whether a patch's pixels are normalised by its own mean and variance.
    """

    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        mask_share: float = 0.75,
        normalise_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(Networks(backbone))
        self.patch_size, self.mask_share = backbone.patch_size, mask_share
        self.normalise_pixels = normalise_pixels
        self.decoder = TokenDecoder(
            backbone.embed_dim,
            3 * backbone.patch_size**2,
            decoder_dim,
            decoder_depth,
            decoder_heads,
        )
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        embedded = self.student.backbone.embed(images).flatten(1, 2)
        count, num_tokens, _ = embedded.shape
        visible, masked = random_split(count, num_tokens, self.mask_share, images.device)
        tokens = self.student.backbone.forward_embedded(gather_tokens(embedded, visible))
        predicted = self.decoder.predict_masked(tokens, self.mask_token, visible, masked)
        targets = gather_tokens(patches_of(images, self.patch_size), masked)
        if self.normalise_pixels:
            variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
            targets = (targets - mean) / (variance + 1e-6).sqrt()
        loss = (predicted.float() - targets).pow(2).mean()
        return {"loss": loss}, {"feature_std": feature_std(tokens)}
