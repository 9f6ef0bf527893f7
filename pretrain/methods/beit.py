"""BEiT: predict discrete tokens of masked patches (arXiv 2106.08254).

Shape suffixes: B images, N tokens, T patches of a batch, K codes, P side of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import frozen_encoder
from flsl_d2.modeling import Encoder, FLSLViT
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import BaseMethod, feature_std
from pretrain.methods.masking import MaskedNetworks, masks_of_share, patches_of
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class PatchTokens(nn.Module):
    """Tokens of patches by k-means of their pixels or features, learned from batch to batch.

    The first batch gives the centres. Afterwards each batch moves each centre to the mean of all
    patches that it was given so far (mini-batch k-means, Sculley, WWW 2010), so the centres settle.
    The original's tokeniser is a variational autoencoder trained on other data.

    Args:
        num_codes: K.
    """

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.codes: Tensor
        self.counts: Tensor
        self.register_buffer("codes", torch.zeros(num_codes, width))
        self.register_buffer("counts", torch.zeros(num_codes))
        self._begun = False  # known to Python, so that a step need not ask the device

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state, prefix, *others)
        self._begun = bool(self.counts.any())

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """Patches (T, width) to codes (T,) int64; in training the centres learn.

        The codes are those before the centres move.
        """
        patches = patches.float()
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.training and not self._begun:
            self._begun = True
            chosen = to_device(torch.randperm(len(patches))[: len(self.codes)], patches.device)
            self.codes.copy_(patches[chosen])
            if together:
                dist.broadcast(self.codes, 0)
        labels = torch.cat(
            [torch.cdist(part, self.codes).argmin(1) for part in patches.split(8192)]
        )
        if self.training:
            sums = torch.zeros_like(self.codes).index_add_(0, labels, patches)
            counts = torch.zeros_like(self.counts).index_add_(
                0, labels, torch.ones(len(labels), device=labels.device)
            )
            if together:
                dist.all_reduce(sums)
                dist.all_reduce(counts)
            self.counts += counts
            self.codes += (sums - counts[:, None] * self.codes) / self.counts.clamp(min=1)[:, None]
        return labels


class BEiT(BaseMethod):
    """A linear layer predicts the codes of the masked patches from their tokens.

    The loss is the cross-entropy, averaged over the masked patches of the batch.

    The codes are k-means of the pixels of patches, or of the features of a given encoder: each
    image is resized until the encoder gives a token for each patch, and k-means runs on the unit
    sphere. That encoder is frozen. Its weights stay in their file and are in no checkpoint.

    Args:
        num_codes: K.
        mask_share: share of the tokens that is masked, in rectangles.
        tokenizer: file or URL of an encoder's weights, or ``timm:NAME``; empty for pixels.

    Raises:
        InputError: the tokeniser's weights cannot be used.
    """

    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        num_codes: int = 8192,
        mask_share: float = 0.4,
        tokenizer: str = "",
    ) -> None:
        super().__init__(MaskedNetworks(backbone, nn.Linear(backbone.embed_dim, num_codes)))
        self.num_centroids, self.mask_share = num_codes, mask_share
        # A tuple, because a module would become a part of this one.
        self._tokenizer: tuple[Encoder, ...] = (frozen_encoder(tokenizer),) if tokenizer else ()
        pixels = 3 * backbone.patch_size**2
        width = self._tokenizer[0].embed_dim if self._tokenizer else pixels
        self.tokens = PatchTokens(num_codes, width)

    def check_run(self, views: object, images: int) -> None:
        """Check that a batch has a patch for each code, besides what every method checks."""
        super().check_run(views, images)
        side = getattr(views, "global_size", 0) // self.student.backbone.patch_size
        patches = images * side**2 * getattr(views, "num_global", 1)
        if patches < self.num_centroids:
            raise InputError(
                f"model.num_codes is {self.num_centroids}, and the first batch, from which the "
                f"codes start, has {patches} patches; use fewer codes or more images."
            )

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        patch = self.student.backbone.patch_size
        codes = self.tokens(self._described(images).flatten(0, 1))
        mask = masks_of_share(len(images), images.shape[-1] // patch, self.mask_share)
        masked = to_device(mask.flatten().nonzero()[:, 0], images.device)
        tokens = self.student.masked_tokens(images, to_device(mask, images.device))
        predicted = self.student.head(tokens.flatten(0, 1)[masked]).float()
        loss = F.cross_entropy(predicted, codes[masked])
        counts = torch.zeros(self.num_centroids, dtype=torch.int64, device=codes.device)
        counts.index_add_(0, codes, torch.ones_like(codes))
        monitored = {"assigned": counts, "mean_assignment": counts / len(codes)}
        return {"loss": loss}, {**monitored, "feature_std": feature_std(tokens)}

    @torch.no_grad()
    def _described(self, images: Tensor) -> Tensor:
        """Pixels or features (B, N, width) of the patches of normalised images."""
        patch = self.student.backbone.patch_size
        if not self._tokenizer:
            return patches_of(images, patch)
        (encoder,) = self._tokenizer
        encoder.to(images.device)
        height, width = (side // patch * encoder.patch_size for side in images.shape[-2:])
        if (height, width) != tuple(images.shape[-2:]):
            images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        return F.normalize(encoder.forward_tokens(images).float(), dim=-1)
