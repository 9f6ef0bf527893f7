"""Context prediction: predict where a tile lies relative to another one (arXiv 1505.05192).

Shape suffixes: B images, T side of a tile, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import Networks, feature_std
from pretrain.methods.jigsaw import TileMethod
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class Context(TileMethod):
    """A head predicts which of the 8 neighbours of an image's middle tile stands beside it.

    As nested loops (x the 9 tiles of an image, x[4] the middle one, f the encoder, n the neighbour
    drawn for an image, 0 to 7)::

        for b in range(B):
            neighbour = x[b][n[b] if n[b] < 4 else n[b] + 1]
            loss -= log_softmax(head(f(x[b][4]), f(neighbour)))[n[b]] / B

    The original drops two colour channels of each tile against chromatic aberration, which this
    one does not.
    """

    def __init__(self, backbone: FLSLViT, hidden_dim: int = 4096) -> None:
        head = nn.Sequential(
            nn.Linear(2 * backbone.embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, 8)
        )
        super().__init__(Networks(backbone, head))

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        tiles = self.tiles(images)
        drawn = to_device(torch.randint(8, (len(images),)), images.device)
        neighbours = drawn + (drawn >= 4)
        rows = torch.arange(len(tiles), device=tiles.device)
        pairs = torch.stack([tiles[:, 4], tiles[rows, neighbours]], dim=1)
        outputs, tokens = self.encode_tiles(pairs)
        logits = self.student.head(outputs.flatten(1)).float()
        right = (logits.argmax(dim=1) == drawn).float().mean()
        monitored = {"feature_std": feature_std(tokens), "task_accuracy": right}
        return {"loss": F.cross_entropy(logits, drawn)}, monitored
