"""Jigsaw puzzles: predict how the tiles of an image were shuffled (arXiv 1603.09246).

Shape suffixes: B images, S side of a view in pixels, T side of a tile, D width, R permutations.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import BaseMethod, Networks, feature_std
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues

_GRID = 3


class TileMethod(BaseMethod):
    """A method whose encoder sees tiles of an image, cut from a grid of 3 x 3 cells.

    Each tile lies at a random place in its cell, so that edges of neighbours do not continue each
    other. Its side is the largest multiple of the patch that fits into a cell.
    """

    def check_run(self, views: object, images: int) -> None:
        """Check that a cell holds a patch, besides what every method checks."""
        super().check_run(views, images)
        size, patch = getattr(views, "global_size", 0), self.student.backbone.patch_size
        if size // _GRID < patch:
            raise InputError(
                f"views.global_size is {size}, and a third of it is less than a patch of {patch} "
                f"pixels; use at least {_GRID * patch}."
            )

    def tiles(self, images: Tensor) -> Tensor:
        """Cut images (B, 3, S, S) into tiles (B, 9, 3, T, T), row-major."""
        cell, patch = images.shape[-1] // _GRID, self.student.backbone.patch_size
        side = cell // patch * patch
        margins = torch.randint(cell - side + 1, (len(images), _GRID**2, 2)).tolist()
        cut = []
        for image, shifts in zip(images, margins, strict=True):
            for place, (down, right) in enumerate(shifts):
                top, left = place // _GRID * cell + down, place % _GRID * cell + right
                cut.append(image[:, top : top + side, left : left + side])
        return torch.stack(cut).unflatten(0, (len(images), -1))

    def encode_tiles(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tiles (B, n, 3, T, T) to global outputs (B, n, D) and tokens (B * n, N, D)."""
        tokens = self.student.backbone.forward_tokens(tiles.flatten(0, 1))
        return tokens.mean(dim=1).unflatten(0, tiles.shape[:2]), tokens


class Jigsaw(TileMethod):
    """A head predicts the permutation from the outputs of the shuffled tiles, side by side.

    As nested loops (perms the R permutations, x the tiles, f the encoder, r the permutation drawn
    for an image)::

        for b in range(B):
            z = concatenation of f(x[b][perms[r[b]][0]]) to f(x[b][perms[r[b]][8]])
            loss -= log_softmax(head(z))[r[b]] / B

    Args:
        num_permutations: R.
    """

    def __init__(
        self, backbone: FLSLViT, num_permutations: int = 1000, hidden_dim: int = 4096
    ) -> None:
        width = _GRID**2 * backbone.embed_dim
        head = nn.Sequential(
            nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, num_permutations)
        )
        super().__init__(Networks(backbone, head))
        self.permutations: Tensor
        self.register_buffer("permutations", distant_permutations(_GRID**2, num_permutations))

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        tiles = self.tiles(images)
        # Each tile by its own statistics, so that brightness and colour tell no neighbours.
        variance, mean = torch.var_mean(tiles, dim=(2, 3, 4), keepdim=True)
        tiles = (tiles - mean) / (variance + 1e-6).sqrt()
        drawn = to_device(torch.randint(len(self.permutations), (len(images),)), images.device)
        order = self.permutations[drawn]
        shuffled = tiles.gather(1, order.view(*order.shape, 1, 1, 1).expand_as(tiles))
        outputs, tokens = self.encode_tiles(shuffled)
        logits = self.student.head(outputs.flatten(1)).float()
        right = (logits.argmax(dim=1) == drawn).float().mean()
        monitored = {"feature_std": feature_std(tokens), "task_accuracy": right}
        return {"loss": F.cross_entropy(logits, drawn)}, monitored


def distant_permutations(length: int, count: int) -> Tensor:
    """Permutations far from one another, each the farthest of some random tries.

    The paper takes the farthest of all permutations by Hamming distance; here each is the one of
    10 random permutations with the largest smallest distance.

    Returns:
        (count, length) int64, the same for the same arguments.
    """
    rng = np.random.default_rng(0)
    chosen = rng.permutation(length)[None]
    while len(chosen) < count:
        tries = rng.random((10, length)).argsort(axis=1)
        distance = (tries[:, None] != chosen).sum(axis=-1).min(axis=1)
        chosen = np.concatenate([chosen, tries[distance.argmax()][None]])
    return torch.from_numpy(chosen)
