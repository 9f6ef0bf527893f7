"""Rotation: predict by how much an image was turned (arXiv 1803.07728).

Shape suffixes: B images, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import BaseMethod, Networks, feature_std, global_output
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class Rotation(BaseMethod):
    """A linear layer predicts a turn of 0, 90, 180 or 270 degrees; each image is seen in all four.

    As nested loops (f the encoder's global output)::

        for b in range(B):
            for turns in range(4):
                loss -= log_softmax(head(f(rotate(x[b], 90 * turns))))[turns] / (4 * B)
    """

    def __init__(self, backbone: FLSLViT) -> None:
        super().__init__(Networks(backbone, nn.Linear(backbone.embed_dim, 4)))

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        images = self.normalised(torch.cat(inputs.views[: inputs.num_global]))
        turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        labels = torch.arange(4, device=images.device).repeat_interleave(len(images))
        tokens = self.student.backbone.forward_tokens(turned)
        logits = self.student.head(global_output([tokens])).float()
        right = (logits.argmax(dim=1) == labels).float().mean()
        monitored = {"feature_std": feature_std(tokens), "task_accuracy": right}
        return {"loss": F.cross_entropy(logits, labels)}, monitored
