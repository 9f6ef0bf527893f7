"""iBOT: self-distillation of global outputs and of masked patches (arXiv 2111.07832).

Shape suffixes: B images, N tokens, D width, K outputs.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import (
    BaseMethod,
    encode_views,
    feature_std,
    full_precision,
    global_output,
)
from pretrain.methods.dino import CentredCrossEntropy, assignments
from pretrain.methods.masking import MaskedNetworks, block_mask
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.schedules import StepValues


class IBOT(BaseMethod):
    """DINO with masked global views, and the teacher's outputs of the masked patches as targets.

    The first term is that of :class:`pretrain.methods.dino.DINO`, the student's global views being
    masked. The second is the same cross-entropy between the outputs of teacher and student for each
    masked token, averaged over the masked tokens of a view and then over views.

    One head serves both, as in the original. The running mean is that of all tokens, masked or
    not. Each global view is masked with a probability of a half, in rectangles.

    Args:
        head: projection head of the student, for global outputs and patches.
        student_temp: tau_s.
        center_momentum: momentum of the running means.
        mask_share: smallest and largest share of a masked view's tokens that rectangles may cover.
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
        self.loss, self.patch_loss = (
            CentredCrossEntropy(self.num_centroids, student_temp, center_momentum) for _ in range(2)
        )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views]
        count = inputs.num_global
        images = torch.cat(views[:count])
        with torch.no_grad():
            teacher_tokens = self.teacher.backbone.forward_tokens(images)
        mask = self._draw_masks(*teacher_tokens.shape[:2])
        covered = mask.flatten(1).sum(dim=1).clamp(min=1) * len(mask)
        weights = (1 / covered)[:, None].expand(-1, teacher_tokens.shape[1])[mask.flatten(1)]
        # Indexes are made on the CPU, so that a GPU need not be waited for.
        masked = mask.flatten().nonzero()[:, 0]
        mask, masked, weights = (to_device(each, images.device) for each in (mask, masked, weights))
        student_tokens = self.student.masked_tokens(images, mask)
        outputs = [global_output([student_tokens])]
        if len(views) > count:
            outputs.append(global_output(encode_views(self.student.backbone, views[count:])))
        student = self.student.head(torch.cat(outputs))
        student_patches = self.student.head(student_tokens.flatten(0, 1)[masked])
        with torch.no_grad():
            teacher = self.teacher.head(global_output([teacher_tokens]))
            teacher_patches = self.teacher.head(teacher_tokens).flatten(0, 1)
        monitored = assignments(teacher - self.loss.center, values.teacher_temp)
        with full_precision(student):
            loss_global = self.loss.between_views(
                teacher.chunk(count), student.chunk(len(views)), values.teacher_temp
            )
            costs = self.patch_loss(teacher_patches[masked], student_patches, values.teacher_temp)
            loss_patch = (weights * costs).sum()
            self.loss.update(teacher)
            self.patch_loss.update(teacher_patches)
        losses = {
            "loss": loss_global + self.patch_weight * loss_patch,
            "loss_global": loss_global,
            "loss_patch": loss_patch,
        }
        return losses, {**monitored, "feature_std": feature_std(teacher_tokens)}

    def _draw_masks(self, num_views: int, num_tokens: int) -> Tensor:
        """Draw which tokens of each view are masked: (V * B, rows, columns) bool on the CPU."""
        side, masks = math.isqrt(num_tokens), []
        for _ in range(num_views):
            share = random.choice([0.0, random.uniform(*self.mask_share)])
            masks.append(block_mask(side, share * num_tokens, (side // 3) ** 2))
        return torch.stack(masks)
