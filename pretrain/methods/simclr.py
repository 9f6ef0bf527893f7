"""SimCLR: contrast of images (arXiv 2002.05709).

Shape suffixes: B images, D width.
"""

from __future__ import annotations

from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import Networks, TwoViewMethod, import_extra


class SimCLR(TwoViewMethod):
    """Two views of an image are contrasted with the views of all other images of the batch.

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
