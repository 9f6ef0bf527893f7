"""Multi-stage training: the attention of an earlier run's teacher as a prior.

Shape suffixes: B images, N tokens, D width (of the earlier teacher), Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.mean_shift import attention, sharpened_prior
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.vit import gather_tokens
from flsl_d2.weights import build_encoder


class PreviousStage:
    """A frozen teacher of an earlier run and the attention that its features give.

    It is not an ``nn.Module``, so that its weights are neither trained, nor shared between
    processes, nor written into this run's checkpoints: they are in the file they came from.

    Args:
        num_blocks: number of blocks after which its features are taken, without the final norm;
            None is all blocks but the last.
        scale: s_prev times sqrt(D).
        sharpness: slope of the sigmoid that makes its attention nearly binary.

    Raises:
        InputError: ``num_blocks`` exceeds the blocks of the encoder.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        num_blocks: int | None = None,
        scale: float = 0.2,
        sharpness: float = 1e4,
    ) -> None:
        self.num_blocks = encoder.depth - 1 if num_blocks is None else num_blocks
        if not 1 <= self.num_blocks <= encoder.depth:
            raise InputError(
                f"model.previous_stage.num_blocks is {num_blocks}, but that encoder has "
                f"{encoder.depth} blocks; use 1 to {encoder.depth}."
            )
        self.encoder = encoder.requires_grad_(False).eval()
        self.patch_size = encoder.patch_size
        self.scale = scale * encoder.embed_dim**-0.5
        self.sharpness = sharpness

    @torch.no_grad()
    def tokens(self, crops: Tensor) -> Tensor:
        """Normalised, un-augmented crops (B, 3, H, W) to features (B, N, D)."""
        self.encoder.to(crops.device)
        return self.encoder.forward_tokens(crops, num_blocks=self.num_blocks)

    @torch.no_grad()
    def prior(self, student_crops: Tensor, indexes: Tensor, teacher_tokens: Tensor) -> Tensor:
        """Attention of student queries to the teacher's view of their image.

        ``A = softmax(s_prev q.k)``, sharpened: ``A' = sigmoid(sharpness (A - mean_j A))``, rows
        normalised.

        Args:
            student_crops: (B, 3, H, W), normalised.
            indexes: (B, Q), the queries among the tokens of a crop.
            teacher_tokens: (B, M, D), :meth:`tokens` of the teacher's crops of the images.

        Returns:
            (B, Q, M) float32, rows sum to 1.
        """
        queries = gather_tokens(self.tokens(student_crops), indexes)
        # The sigmoid's slope makes the rounding errors of half precision visible.
        with torch.autocast(queries.device.type, enabled=False):
            weights = attention(queries.float(), teacher_tokens.float(), self.scale)
            return sharpened_prior(weights, self.sharpness)


def load_previous_stage(
    weights: str = "",
    num_blocks: int | None = None,
    scale: float = 0.2,
    sharpness: float = 1e4,
) -> PreviousStage | None:
    """Load the teacher of a weight file; None where no file is named.

    Args:
        weights: path of a file that :func:`flsl_d2.weights.build_encoder` reads, most often the
            ``teacher_backbone.pth`` of the earlier run; empty for training in one stage.
    """
    if not weights:
        return None
    return PreviousStage(build_encoder(weights), num_blocks, scale, sharpness)
