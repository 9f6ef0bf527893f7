"""DINO: self-distillation of global outputs (arXiv 2104.14294).

Shape suffixes: B images, N tokens, D width, K outputs, V views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.base import (
    BaseMethod,
    Networks,
    encode_views,
    feature_std,
    full_precision,
    global_output,
)
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class CentredCrossEntropy(nn.Module):
    """Cross-entropy of a student's outputs to the centred and sharpened outputs of a teacher.

    Args:
        num_outputs: K.
        student_temp: tau_s.
        center_momentum: momentum of the running mean c of the teacher's outputs.
    """

    def __init__(self, num_outputs: int, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.center: Tensor
        self.register_buffer("center", torch.zeros(num_outputs))

    def forward(self, teacher: Tensor, student: Tensor, teacher_temp: float) -> Tensor:
        """Compute the cross-entropy of each of the outputs (..., K)."""
        targets = ((teacher.float() - self.center) / teacher_temp).softmax(dim=-1)
        return -(targets * (student.float() / self.student_temp).log_softmax(dim=-1)).sum(dim=-1)

    def between_views(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], teacher_temp: float
    ) -> Tensor:
        """Compute the mean over pairs of the teacher's and other views; outputs (B, K) of each."""
        pairs = [(t, s) for t in range(len(teacher)) for s in range(len(student)) if s != t]
        costs = [self(teacher[t], student[s], teacher_temp).mean() for t, s in pairs]
        return torch.stack(costs).mean()

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Move the centre to the mean of outputs (..., K) of all processes, each having as many."""
        mean = teacher.float().flatten(0, -2).mean(dim=0)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)


class DINO(BaseMethod):
    """The student's output for each view is pulled to the teacher's for every other global view.

    The loss is the mean over pairs of views t != s of ``-sum_k p+_tk log p_sk``, with ``p+ =
    softmax((g_t(x) - c) / tau_t)`` of the teacher and ``p = softmax(g_s(x) / tau_s)`` of the
    student; c is the running mean of the teacher's outputs.

    The global output is the mean of the tokens, where the original takes a class token. The head
    is the original's, which FLSL shares. tau_t, the teacher's momentum and the frozen last layer
    are in the schedules.

    Args:
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
        self.loss = CentredCrossEntropy(self.num_centroids, student_temp, center_momentum)

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        student = self.student.head(global_output(encode_views(self.student.backbone, views)))
        with torch.no_grad():
            tokens = encode_views(self.teacher.backbone, views[: inputs.num_global])
            teacher = self.teacher.head(global_output(tokens))
        monitored = assignments(teacher - self.loss.center, values.teacher_temp)
        with full_precision(student):
            loss = self.loss.between_views(
                teacher.chunk(inputs.num_global), student.chunk(len(views)), values.teacher_temp
            )
            self.loss.update(teacher)
        return {"loss": loss}, {**monitored, "feature_std": feature_std(tokens[0])}


@torch.no_grad()
def assignments(logits: Tensor, temperature: float) -> Monitored:
    """Summarise assignments for the indicators of collapse.

    Logits are the teacher's (..., K); the values are ``assigned`` and ``mean_assignment`` of
    :class:`pretrain.methods.protocol.Method`.
    """
    logits = logits.float().flatten(0, -2)
    labels = logits.argmax(dim=-1)
    counts = labels.new_zeros(logits.shape[-1])
    return {
        "assigned": counts.index_add_(0, labels, torch.ones_like(labels)),
        "mean_assignment": (logits / temperature).softmax(dim=-1).mean(dim=0),
    }
