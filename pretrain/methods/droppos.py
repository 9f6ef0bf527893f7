"""DropPos: reconstruct the positions that were dropped (arXiv 2309.03576).

Shape suffixes: B images, N tokens of a view and so places, M visible tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.vit import gather_tokens
from pretrain.methods.base import BaseMethod, Networks, feature_std
from pretrain.methods.masking import TokenDecoder, random_split
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class DropPos(BaseMethod):
    """A decoder predicts the places of visible patches whose positions were dropped.

    The encoder sees some patches of the image, and positions of a part of them; a learned vector
    takes the place of a dropped position. The loss is the cross-entropy of the outputs over all
    places to ``exp(-d^2 / sigma^2)``, normalised, d being the distance from a token's place. Tokens
    are weighed by A, the softmax over visible tokens of their cosine to the mean token of the whole
    image, over tau.

    The targets are position smoothing, whose sigma falls from its start to 0 over the run; A is
    attentive reconstruction, by which patches without a telling place weigh less. The original
    compares patches with its class token, whose place the mean of the tokens takes here; as in the
    authors' code (github.com/Haochen-Wang409/DropPos), A weighs tokens and not places.

    Args:
        mask_share: share of the patches that the encoder does not see.
        drop_share: share of the visible patches whose position is dropped.
        smoothing: sigma at the start, in tokens.
        attention_temp: tau; 0 for the same weight everywhere.
    """

    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        mask_share: float = 0.75,
        drop_share: float = 0.75,
        smoothing: float = 1.0,
        attention_temp: float = 0.1,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__(Networks(backbone))
        self.mask_share, self.drop_share = mask_share, drop_share
        self.smoothing, self.attention_temp = smoothing, attention_temp
        self.num_places = backbone.pos_embed.shape[1]
        self.decoder = TokenDecoder(
            backbone.embed_dim, self.num_places, decoder_dim, decoder_depth, decoder_heads
        )
        self.dropped_position = nn.Parameter(torch.empty(backbone.embed_dim))
        nn.init.normal_(self.dropped_position, std=0.02)

    def check_run(self, views: object, images: int) -> None:
        """Check that a view has as many tokens as the encoder has positions, besides the rest."""
        super().check_run(views, images)
        size, patch = getattr(views, "global_size", 0), self.student.backbone.patch_size
        if (size // patch) ** 2 != self.num_places:
            raise InputError(
                f"views.global_size is {size}, {(size // patch) ** 2} tokens, and DropPos tells "
                f"one of the {self.num_places} positions of model.backbone.img_size; set both to "
                "the same size."
            )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        backbone = self.student.backbone
        patches = backbone.embed(images, "none")
        positions = backbone.positions_of((patches.shape[1], patches.shape[2])).flatten(1, 2)
        patches = patches.flatten(1, 2)
        count, num_tokens, _ = patches.shape
        visible, _ = random_split(count, num_tokens, self.mask_share, images.device)
        # Visible tokens are in random order, so that any part of them is a random part.
        _, dropped = random_split(count, visible.shape[1], self.drop_share, images.device)
        positions = gather_tokens(positions.expand(len(images), -1, -1), visible)
        is_dropped = torch.zeros_like(visible, dtype=torch.bool).scatter(1, dropped, True)
        positions = torch.where(is_dropped[..., None], self.dropped_position, positions)
        tokens = backbone.forward_embedded(gather_tokens(patches, visible) + positions)
        outputs = gather_tokens(self.decoder(self.decoder.embed(tokens)), dropped).float()
        with torch.no_grad():
            sigma = self.smoothing * (1 - values.progress)
            places = visible.gather(1, dropped)
            targets = smoothed_places(places, self.num_places, sigma)
            weights = self._weights(images, visible).gather(1, dropped)
        costs = -(targets * outputs.log_softmax(dim=-1)).sum(dim=-1)
        loss = (weights * costs).sum() / weights.sum()
        right = (outputs.argmax(dim=-1) == places).float().mean()
        return {"loss": loss}, {"feature_std": feature_std(tokens), "position_accuracy": right}

    def _weights(self, images: Tensor, visible: Tensor) -> Tensor:
        """Weights (B, M) of the visible tokens by their likeness to the whole image."""
        if not self.attention_temp:
            return torch.ones_like(visible, dtype=torch.float32)
        tokens = self.student.backbone.forward_tokens(images).float()
        cosines = F.cosine_similarity(tokens.mean(dim=1, keepdim=True), tokens, dim=-1)
        return (cosines.gather(1, visible) / self.attention_temp).softmax(dim=-1)


def smoothed_places(places: Tensor, num_places: int, sigma: float) -> Tensor:
    """Distribution over places around each place, ``exp(-distance ** 2 / sigma ** 2)`` normalised.

    Places (B, M) are indexes in a square grid of N, and targets (B, M, N) float32. ``sigma`` is in
    steps of the grid; 0 gives all weight to the place itself.
    """
    if sigma <= 0:
        return F.one_hot(places, num_places).float()
    side = math.isqrt(num_places)
    every = torch.arange(num_places, device=places.device)
    rows = places.div(side, rounding_mode="floor")[..., None] - every.div(
        side, rounding_mode="floor"
    )
    columns = (places % side)[..., None] - every % side
    return (-(rows**2 + columns**2) / sigma**2).softmax(dim=-1)
