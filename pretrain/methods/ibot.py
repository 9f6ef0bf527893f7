"""iBOT: self-distillation of global outputs and of masked patches (arXiv 2111.07832).

Shape suffixes: B images, N tokens, D width, K outputs.
"""

from __future__ import annotations

import math

import torch

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from pretrain.methods.base import (
    BaseMethod,
    encode_views,
    feature_std,
    full_precision,
    global_output,
    import_extra,
)
from pretrain.methods.dino import assignments
from pretrain.methods.masking import MaskedNetworks, block_masks
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class IBOT(BaseMethod):
    """DINO with masked global views, and the teacher's outputs of the masked patches as targets.

    The first term is that of :class:`pretrain.methods.dino.DINO`, the student's global views being
    masked. The second, as nested loops over global views v (s, t the outputs of student and
    teacher for each token, c the running mean of the teacher's)::

        for v in range(num_global):
            for b in range(B):
                for i in masked[v][b]:
                    p_plus = softmax((t[v][b][i] - c) / tau_t)
                    p = softmax(s[v][b][i] / tau_s)
                    patch -= sum_k(p_plus[k] * log(p[k])) / (len(masked[v][b]) * num_global * B)

    One head serves both, as in the original. Half of the global views are masked, in rectangles
    that cover ``mask_share`` of the tokens. The losses and the masks are lightly's.

    Args:
        backbone: encoder of the student.
        head: projection head of the student, for global outputs and patches.
        student_temp: tau_s.
        center_momentum: momentum of the running means.
        mask_share: smallest and largest share of a masked view's tokens that is masked.
        patch_weight: weight of the second term.
    """

    min_global = 2
    masks_tokens = True

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        mask_share: tuple[float, float] = (0.1, 0.5),
        patch_weight: float = 1.0,
    ) -> None:
        super().__init__(MaskedNetworks(backbone, head), has_teacher=True)
        self.num_centroids = len(head.last_layer.weight_v)
        self.mask_share, self.patch_weight = tuple(mask_share), patch_weight
        losses = import_extra("lightly.loss")
        self.loss = losses.DINOLoss(
            self.num_centroids, student_temp=student_temp, center_momentum=center_momentum
        )
        self.patch_loss = losses.IBOTPatchLoss(
            self.num_centroids, student_temp=student_temp, center_momentum=center_momentum
        )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        count = inputs.num_global
        images = torch.cat(views[:count])
        with torch.no_grad():
            teacher_tokens = self.teacher.backbone.forward_tokens(images)
        side = math.isqrt(teacher_tokens.shape[1])
        mask = block_masks(len(images), side, 0.5, *self.mask_share)
        # Indexes are made on the CPU, so that a GPU need not be waited for.
        masked = mask.flatten().nonzero()[:, 0].to(images.device, non_blocking=True)
        student_tokens = self.student.masked_tokens(
            images, mask.to(images.device, non_blocking=True)
        )
        outputs = [global_output([student_tokens])]
        if len(views) > count:
            outputs.append(global_output(encode_views(self.student.backbone, views[count:])))
        student = self.student.head(torch.cat(outputs)).float()
        student_patches = self.student.head(student_tokens.flatten(0, 1)[masked]).float()
        with torch.no_grad():
            teacher = self.teacher.head(global_output([teacher_tokens])).float()
            teacher_patches = self.teacher.head(teacher_tokens.flatten(0, 1)[masked]).float()
        monitored = assignments(teacher - self.loss.center.view(-1), values.teacher_temp)
        with full_precision(student):
            loss_global = self.loss(
                list(teacher.chunk(count)),
                list(student.chunk(len(views))),
                teacher_temp=values.teacher_temp,
            )
            loss_patch = self.patch_loss(
                teacher_patches, student_patches, mask, values.teacher_temp
            )
        losses = {
            "loss": loss_global + self.patch_weight * loss_patch,
            "loss_global": loss_global,
            "loss_patch": loss_patch,
        }
        return losses, {**monitored, "feature_std": feature_std(teacher_tokens)}
