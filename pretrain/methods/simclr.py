"""SimCLR: contrast of images (arXiv 2002.05709).

Shape suffixes: B images, D width.
"""

from __future__ import annotations

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    import_extra,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues

__all__ = ["SimCLR"]


class SimCLR(BaseMethod):
    """Two views of an image are told from the views of all other images of the batch.

    As nested loops, over all 2 B views (z the normalised outputs, j(i) the other view of the image
    of view i)::

        for i in range(2 * B):
            for k in range(2 * B):
                if k != i:
                    sum[i] += exp(z[i] . z[k] / tau)
            loss -= log(exp(z[i] . z[j(i)] / tau) / sum[i]) / (2 * B)

    The batch is that of all processes. The global output is the mean of the tokens. Head and loss
    are lightly's.

    Args:
        backbone: the encoder.
        hidden_dim: width of the head's hidden layer.
        output_dim: width of the outputs.
        temperature: tau.
    """

    min_global = 2
    min_images = 2

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 2048,
        output_dim: int = 128,
        temperature: float = 0.1,
    ) -> None:
        heads = import_extra("lightly.models.modules.heads")
        head = heads.SimCLRProjectionHead(backbone.embed_dim, hidden_dim, output_dim)
        super().__init__(Networks(backbone, head))
        self.loss = import_extra("lightly.loss").NTXentLoss(temperature, gather_distributed=True)

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views[:2]]
        tokens = encode_views(self.student.backbone, views)
        outputs = self.student.head(global_output(tokens)).float()
        with full_precision(outputs):
            loss = self.loss(*outputs.chunk(2))
        return {"loss": loss}, {"feature_std": feature_std(tokens[0])}
