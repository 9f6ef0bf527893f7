"""SwAV: views predict each other's balanced assignments to prototypes (arXiv 2006.09882).

Shape suffixes: B images, D width, F width of the outputs, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    import_extra,
    mlp,
)
from pretrain.methods.dino import assignments
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class SwAV(BaseMethod):
    """Each view predicts the assignments of the global views, which Sinkhorn-Knopp balances.

    For each global view v and each other view s the loss is the cross-entropy of ``softmax(z_s /
    tau)`` to the assignments Q_v, averaged over pairs and images; z are cosines to the prototypes.
    ``Q = exp(z / epsilon)`` is normalised three times in turn, so that each prototype and then each
    image has an equal share.

    The batch is that of all processes. Prototypes are normalised after each step. The loss is
    lightly's. There is no queue of earlier outputs, which the original adds after 15 epochs for
    small batches.

    Args:
        num_prototypes: K.
        output_dim: F.
        temperature: tau.
        epsilon: temperature of the assignments.
    """

    min_global = 2
    min_images = 2

    def __init__(
        self,
        backbone: FLSLViT,
        num_prototypes: int = 3000,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        temperature: float = 0.1,
        epsilon: float = 0.05,
    ) -> None:
        head = mlp(backbone.embed_dim, hidden_dim, output_dim, norm=nn.BatchNorm1d)
        super().__init__(Networks(backbone, head))
        self.num_centroids = num_prototypes
        self.prototypes = nn.Linear(output_dim, num_prototypes, bias=False)
        self.update_teacher(0.0)
        self.loss = import_extra("lightly.loss").SwaVLoss(
            temperature, sinkhorn_epsilon=epsilon, sinkhorn_gather_distributed=True
        )

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        tokens = encode_views(self.student.backbone, views)
        outputs = F.normalize(self.student.head(global_output(tokens)).float(), dim=-1)
        with full_precision(outputs):
            cosines = self.prototypes(outputs).chunk(len(views))
        count = inputs.num_global
        loss = self.loss(list(cosines[:count]), list(cosines[count:])).squeeze()
        monitored = assignments(torch.cat(cosines[:count]).detach(), self.loss.temperature)
        return {"loss": loss}, {**monitored, "feature_std": feature_std(tokens[0])}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Normalise the prototypes; there is no teacher."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the prototypes."""
        return [self.prototypes]
