"""DINO: self-distillation of global outputs (arXiv 2104.14294).

Shape suffixes: B images, N tokens, D width, K outputs, V views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
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


class DINO(BaseMethod):
    """The student's output for each view is pulled to the teacher's for every other global view.

    As nested loops, over the teacher's global views t and the student's views s (g_s, g_t encoder
    and head, c the running mean of the teacher's outputs)::

        for t in range(num_global):
            for s in range(num_views):
                if s != t:
                    for b in range(B):
                        p_plus = softmax((g_t(x[t][b]) - c) / tau_t)
                        p = softmax(g_s(x[s][b]) / tau_s)
                        loss -= sum_k(p_plus[k] * log(p[k])) / (num_pairs * B)

    The global output is the mean of the tokens, where the original takes a class token. The head
    is the original's, which FLSL shares; the loss is lightly's. tau_t, the teacher's momentum and
    the frozen last layer are in the schedules.

    Args:
        backbone: encoder of the student.
        head: projection head of the student.
        student_temp: tau_s.
        center_momentum: momentum of the running mean c.
    """

    min_global = 2

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__(Networks(backbone, head), has_teacher=True)
        self.num_centroids = len(head.last_layer.weight_v)
        self.loss = import_extra("lightly.loss").DINOLoss(
            self.num_centroids, student_temp=student_temp, center_momentum=center_momentum
        )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        student = self.student.head(global_output(encode_views(self.student.backbone, views)))
        with torch.no_grad():
            tokens = encode_views(self.teacher.backbone, views[: inputs.num_global])
            teacher = self.teacher.head(global_output(tokens))
        monitored = assignments(teacher - self.loss.center.view(-1), values.teacher_temp)
        with full_precision(student):
            loss = self.loss(
                list(teacher.float().chunk(inputs.num_global)),
                list(student.float().chunk(len(views))),
                teacher_temp=values.teacher_temp,
            )
        return {"loss": loss}, {**monitored, "feature_std": feature_std(tokens[0])}


@torch.no_grad()
def assignments(logits: Tensor, temperature: float) -> Monitored:
    """Summarise assignments for the indicators of collapse.

    Args:
        logits: (..., K) of the teacher.
        temperature: temperature of their softmax.

    Returns:
        ``assigned`` and ``mean_assignment`` of :class:`pretrain.methods.protocol.Method`.
    """
    logits = logits.float().flatten(0, -2)
    labels = logits.argmax(dim=-1)
    counts = labels.new_zeros(logits.shape[-1])
    return {
        "assigned": counts.index_add_(0, labels, torch.ones_like(labels)),
        "mean_assignment": (logits / temperature).softmax(dim=-1).mean(dim=0),
    }
