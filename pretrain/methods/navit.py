"""FLSL on views of native aspect ratio, packed as NaViT packs them (arXiv 2307.06304).

Shape suffixes: N tokens of a view, D width, Q queries of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.mean_shift import mean_shift
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.transfer import to_device
from pretrain.methods.base import feature_std
from pretrain.methods.flsl import FLSL, EncoderWithHead
from pretrain.methods.flsl_objective import FLSLLoss
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.native_views import NativeViews
from pretrain.schedules import StepValues


class NaViT(FLSL):
    """FLSL whose views keep the aspect ratio of the image, each with its own grid of tokens.

    The objective is :class:`pretrain.methods.flsl_objective.FLSLLoss`. As nested loops over images
    and student views (Z+ the tokens of the teacher's view of the image)::

        for b in range(B):
            for v in range(number of student views):
                Z = f_s(x[v][b])                            # as many tokens as its grid has
                for i in one token of each pooling window:
                    m[i] = sum_j(softmax_j(s_sa * Z[i] . Z[j]) * Z[j])
                    m_plus[i] = sum_j(softmax_j(s_ca * Z[i] . Z_plus[j]) * Z_plus[j])
        loss = FLSLLoss over the tokens Z[i], modes m[i] and m_plus[i] of all images and views

    Images are encoded in passes of at most ``pack_tokens`` tokens, in which linear layers see one
    list of tokens and attention each image by itself. Positions are FLSL's table, resampled to the
    grid; the original's are factorised and learned.

    Args:
        pack_tokens: largest number of tokens that are encoded in one pass.
        global_window: number of tokens along each side of a pooling window in the global view.
        local_window: the same in local views.
    """

    views_type: ClassVar[type] = NativeViews
    changes_shapes = True
    masks_tokens = True  # packing needs what masking needs: a plain ViT

    def __init__(
        self,
        backbone: FLSLViT,
        head: FLSLHead,
        loss: FLSLLoss,
        pack_tokens: int = 50176,
        global_window: int = 3,
        local_window: int = 2,
    ) -> None:
        super().__init__(backbone, head, loss)
        self.pack_tokens = pack_tokens
        self.windows = (global_window, local_window)

    def check_run(self, views: object, images: int) -> None:
        """Check that a pass holds an image, besides what every method checks."""
        super().check_run(views, images)
        assert isinstance(views, NativeViews)
        if views.patch_size != self.student.backbone.patch_size:
            raise InputError(
                f"views.patch_size is {views.patch_size} and that of the encoder "
                f"{self.student.backbone.patch_size}; set both to the same."
            )
        if self.pack_tokens < views.most_tokens:
            raise InputError(
                f"model.pack_tokens is {self.pack_tokens}, less than the {views.most_tokens} "
                "tokens that one view may have; use at least as many."
            )

    def forward(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [
            self._images(view, grids)
            for view, grids in zip(inputs.views, inputs.grids, strict=True)
        ]
        student_images = [image for view in views[1:] for image in view]
        student_tokens = encode_packed(self.student, student_images, self.pack_tokens)
        with torch.no_grad():
            teacher_tokens = encode_packed(self.teacher, views[0], self.pack_tokens)
        scale = self.student.backbone.embed_dim**-0.5
        # The trainer seeds NumPy's generator for each step.
        rng = np.random.default_rng(np.random.randint(2**31))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, tokens in enumerate(student_tokens):
            view, image = divmod(number, len(views[0]))
            window = self.windows[min(view, 1)]
            indexes = pooled_indexes(rng, inputs.grids[view + 1][image], window)
            points = tokens[to_device(indexes, tokens.device)][None]
            modes = mean_shift(points, tokens[None], values.self_scale * scale)
            with torch.no_grad():
                keys = teacher_tokens[image][None]
                cross_modes = mean_shift(points, keys, values.cross_scale * scale)
            parts.append((points[0], modes[0], cross_modes[0]))
        points, modes, cross_modes = (torch.cat(part) for part in zip(*parts, strict=True))
        with torch.no_grad():
            teacher_logits = self.teacher.head(cross_modes)
        losses, monitored = self.loss(
            points,
            modes,
            self.student.head(modes),
            teacher_logits,
            intra_weight=values.intra_weight,
            teacher_temp=values.teacher_temp,
        )
        spread = feature_std(torch.cat(teacher_tokens)[None])
        return losses, {**monitored, "feature_std": spread}

    def _images(self, view: Tensor, grids: np.ndarray) -> list[Tensor]:
        """Cut the images (3, H, W) of a view out of their canvases."""
        patch = self.student.backbone.patch_size
        return [
            image[:, : rows * patch, : columns * patch]
            for image, (rows, columns) in zip(self.normalised(view), grids.tolist(), strict=True)
        ]


def encode_packed(networks: EncoderWithHead, images: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Encode images of any sizes in passes of at most ``budget`` tokens.

    Images (3, H, W) are normalised, and their sides are multiples of the patch. A pass has at most
    ``budget`` tokens, and so has each image. Each image's tokens (N, D) are row-major.
    """
    patch = networks.backbone.patch_size
    packs: list[list[int]] = []
    left = 0
    for index, image in enumerate(images):
        tokens = image.shape[1] * image.shape[2] // patch**2
        if tokens > left:
            packs.append([])
            left = budget
        packs[-1].append(index)
        left -= tokens
    encoded: dict[int, Tensor] = {}
    for pack in packs:
        sizes: dict[Any, list[int]] = {}
        for index in pack:
            sizes.setdefault(images[index].shape, []).append(index)
        batches = [torch.stack([images[index] for index in same]) for same in sizes.values()]
        parts = networks.packed_tokens(batches)
        for same, part in zip(sizes.values(), parts, strict=True):
            encoded.update(zip(same, part, strict=True))
    return [encoded[index] for index in range(len(images))]


def pooled_indexes(rng: np.random.Generator, grid: np.ndarray, window: int) -> Tensor:
    """Random pooling of a grid that is not square: one token of each window.

    Windows that do not fill the grid leave a strip, on a random side along each axis; a window is
    never larger than the grid.

    ``grid`` is rows and columns of tokens, ``window`` a window's side in tokens; the indexes are
    (Q,) int64.
    """
    rows, columns = grid.tolist()
    high, wide = min(window, rows), min(window, columns)
    counts = rows // high, columns // wide
    top = rng.integers(0, 2) * (rows % high) + np.arange(counts[0])[:, None] * high
    left = rng.integers(0, 2) * (columns % wide) + np.arange(counts[1]) * wide
    y = top + rng.integers(0, high, counts)
    x = left + rng.integers(0, wide, counts)
    return torch.from_numpy((y * columns + x).ravel())
