"""DetCon: contrast of segments (arXiv 2103.10957).

Shape suffixes: B images, N tokens, D width, M segments drawn from a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
    import_extra,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class DetCon(BaseMethod):
    """A segment is contrasted with all other segments: DetCon-B, with a momentum encoder.

    As nested loops (q, k the normalised outputs of student and teacher for the mean token of each
    segment, m the label of the segment)::

        for a, other in ((0, 1), (1, 0)):
            for b in range(B):
                for i in range(M):
                    for c in range(B):
                        for j in range(M):
                            sum += exp(q[a][b][i] . k[other][c][j] / tau)
                            if not (c == b and m[a][b][j] == m[a][b][i]):
                                sum += exp(q[a][b][i] . k[a][c][j] / tau)
                    pairs = the j with m[other][b][j] == m[a][b][i]
                    for j in pairs:
                        term = -log(exp(q[a][b][i] . k[other][b][j] / tau) / sum) / len(pairs)
                        loss += term / (number of j with m[a][b][j] == m[a][b][i]) / (B * M)

    The segments are those of the image before it is cut (``views.segments``), Felzenszwalb's by
    scikit-image. M segments are drawn for each view with the frequency of their tokens; the
    original draws them evenly. Heads and loss are lightly's; teacher's batch norm as the student's.

    Args:
        backbone: encoder of the student.
        hidden_dim: width of the heads' hidden layer.
        output_dim: width of the outputs.
        num_segments: M.
        temperature: tau.
    """

    min_global = 2
    min_images = 2

    def __init__(
        self,
        backbone: FLSLViT,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        num_segments: int = 16,
        temperature: float = 0.1,
    ) -> None:
        heads = import_extra("lightly.models.modules.heads")
        head = heads.BYOLProjectionHead(backbone.embed_dim, hidden_dim, output_dim)
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.predictor = heads.BYOLPredictionHead(output_dim, hidden_dim, output_dim)
        self.num_segments = num_segments
        self.loss = import_extra("lightly.loss").DetConBLoss(temperature, gather_distributed=True)

    def train(self, mode: bool = True) -> DetCon:
        """Set the mode; the batch norm of the teacher's head is that of the student's."""
        super().train(mode)
        self.teacher.head.train(mode)
        return self

    def check_run(self, views: object, images: int) -> None:
        """Check that the views have segments, besides what every method checks."""
        super().check_run(views, images)
        if getattr(views, "segments", "none") == "none":
            raise InputError(
                "views.segments is 'none', and DetCon compares segments; set "
                "views.segments=felzenszwalb or views.segments=grid."
            )

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views[:2]]
        drawn = [self._draw(labels) for labels in inputs.segments[:2]]
        tokens = encode_views(self.student.backbone, views)
        means = self._means(tokens, drawn, inputs.segments)
        predictions = self.predictor(self.student.head(means)).float()
        with torch.no_grad():
            teacher_tokens = encode_views(self.teacher.backbone, views)
            targets = self.teacher.head(self._means(teacher_tokens, drawn, inputs.segments)).float()
        shape = (2, len(views[0]), self.num_segments, -1)
        with full_precision(predictions):
            loss = self.loss(*predictions.view(shape), *targets.view(shape), *drawn)
        return {"loss": loss}, {"feature_std": feature_std(teacher_tokens[0])}

    def _draw(self, labels: Tensor) -> Tensor:
        """Draw the labels (B, M) of segments from those of the tokens (B, N)."""
        places = torch.randint(labels.shape[1], (len(labels), self.num_segments))
        return labels.gather(1, places.to(labels.device, non_blocking=True))

    @staticmethod
    def _means(tokens: list[Tensor], drawn: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Mean tokens of all drawn segments of both views, (2 * B * M, D)."""
        both = zip(tokens, drawn, labels[:2], strict=True)
        return torch.cat([segment_means(*view).flatten(0, 1) for view in both])


def segment_means(tokens: Tensor, drawn: Tensor, labels: Tensor) -> Tensor:
    """Mean of the tokens of segments.

    Args:
        tokens: (B, N, D).
        drawn: (B, M), labels of the segments.
        labels: (B, N), label of each token.

    Returns:
        (B, M, D); each segment has a token.
    """
    inside = (drawn[:, :, None] == labels[:, None, :]).to(tokens.dtype)
    return inside @ tokens / inside.sum(dim=-1, keepdim=True)
