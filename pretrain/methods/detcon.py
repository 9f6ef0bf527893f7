"""DetCon: contrast of segments (arXiv 2103.10957).

Shape suffixes: B images, N tokens, D width, M segments drawn from a view.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    by_parts,
    encode_views,
    feature_std,
    full_precision,
    import_extra,
    mlp,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class DetCon(BaseMethod):
    """A segment is contrasted with all other segments: DetCon-B, with a momentum encoder.

    q, k are the normalised outputs of student and teacher for the mean token of each segment. The
    loss of a segment is ``-log softmax`` of ``q.k / tau`` at the segments with its label in the
    other view, averaged over these; the softmax runs over all segments of both views of the batch,
    except those with its label in its own view. A segment that was drawn n times weighs 1 / n.

    The segments are those of the image before it is cut (``views.segments``), Felzenszwalb's by
    scikit-image. M of a view's segments are drawn, with replacement, each as likely as any other.
    Batch norm sees each view by itself. The loss is lightly's.

    Args:
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
        options: Any = {"norm": nn.BatchNorm1d, "last_bias": False}
        head = mlp(backbone.embed_dim, hidden_dim, output_dim, **options)
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.predictor = mlp(output_dim, hidden_dim, output_dim, **options)
        self.num_segments = num_segments
        self.loss = import_extra("lightly.loss").DetConBLoss(temperature, gather_distributed=True)

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
        tokens = encode_views(self.student.backbone, views, apart=True)
        outputs = by_parts(self.student.head, self._means(tokens, drawn, inputs.segments), 2)
        predictions = by_parts(self.predictor, outputs, 2).float()
        with torch.no_grad():
            teacher_tokens = encode_views(self.teacher.backbone, views, apart=True)
            means = self._means(teacher_tokens, drawn, inputs.segments)
            targets = by_parts(self.teacher.head, means, 2).float()
        shape = (2, len(views[0]), self.num_segments, -1)
        with full_precision(predictions):
            loss = self.loss(*predictions.view(shape), *targets.view(shape), *drawn)
        return {"loss": loss}, {"feature_std": feature_std(teacher_tokens[0])}

    def _draw(self, labels: Tensor) -> Tensor:
        """Draw the labels (B, M) of segments from those of the tokens (B, N)."""
        areas = (labels[:, :, None] == labels[:, None, :]).sum(dim=-1)
        edges = (1 / areas).cumsum(dim=-1)  # a segment's tokens have 1 together
        drawn = to_device(torch.rand(len(labels), self.num_segments), labels.device)
        token = torch.searchsorted(edges, drawn * edges[:, -1:]).clamp(max=labels.shape[1] - 1)
        return labels.gather(1, token)

    @staticmethod
    def _means(tokens: list[Tensor], drawn: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Mean tokens of all drawn segments of both views, (2 * B * M, D)."""
        both = zip(tokens, drawn, labels[:2], strict=True)
        return torch.cat([segment_means(*view).flatten(0, 1) for view in both])


def segment_means(tokens: Tensor, drawn: Tensor, labels: Tensor) -> Tensor:
    """Mean of the tokens of segments.

    Tokens are (B, N, D), ``drawn`` (B, M) the segments' labels and ``labels`` (B, N) each token's;
    the means are (B, M, D). Each segment has a token.
    """
    inside = (drawn[:, :, None] == labels[:, None, :]).to(tokens.dtype)
    return inside @ tokens / inside.sum(dim=-1, keepdim=True)
