"""The views of an image, of a batch, and of a step: one record from the cutter to the method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.modeling.transfer import beside_computing, to_device
from pretrain.augmentation import Augmentation, stack_augmentations
from pretrain.device_views import augment_views, crop_batch

_TENSORS = ("views", "queries", "crops", "segments")
_ARRAYS = ("regions", "grids")


@dataclass
class StepInputs:
    """The views of B images; a cutter of views fills it for one image, without the axis B.

    Attributes:
        views: (B, 3, S, S) in 0 to 255; of nested views the teacher's first, of others the global
            ones first. Until :meth:`to_device` they lack what is left to the device.
        queries: for each student view of nested views (B, Q) int64, the tokens that are queries.
        regions: (B, 4) float32, top, left, height and width of a view's box as shares: of the
            teacher's view, for each student view of nested views; of the image, for each view of
            others. A mirrored view has its right side as ``left`` and a negative width, so that
            ``left + x * width`` holds for every view.
        crops: the views before augmentation, where the method needs them; else empty.
        num_global: number of views, the first ones, that are global.
        segments: for each view (B, N) int64, the label of the segment at each token, where the
            views have segments; else empty. Labels of an image's views belong together.
        grids: for each view (B, 2) int64 on the CPU, rows and columns of tokens, where images fill
            only the upper left of their view; else empty.
        augmentations: for each view, where they are left to the device; else empty.
        sizes: sides of the student views in pixels, where their crops are left to the device.
        failed: files that could not be read and were replaced; each the name as printable text, a
            tab and the reason.
        next_error: the error that took the place of one of the next two batches of this process.
    """

    views: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    regions: list[Any] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)
    num_global: int = 1
    segments: list[Tensor] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    augmentations: list[Augmentation] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    next_error: TrainingError | None = None

    def pin_memory(self) -> StepInputs:
        """Pin the tensors for PyTorch's loader, so that copies to the GPU need not wait."""
        for tensors in (self.views, self.queries, self.crops):
            tensors[:] = [tensor.pin_memory() for tensor in tensors]
        return self

    def split(self, parts: int) -> list[StepInputs]:
        """Split the batch into equal parts.

        Raises:
            InputError: the number of parts does not divide the images.
        """
        count = len(self.views[0])
        if not 1 <= parts <= count or count % parts:
            raise InputError(
                f"train.accumulation_steps is {parts}, which does not divide the {count} images of "
                "a process's step; use a divisor, or another dataloader.total_batch_size."
            )
        return [self._images(slice(i, i + count // parts)) for i in range(0, count, count // parts)]

    def _images(self, which: slice) -> StepInputs:
        names = (*_TENSORS, *_ARRAYS)
        chosen: dict[str, Any] = {n: [each[which] for each in getattr(self, n)] for n in names}
        drawn = [Augmentation(*(each[which] for each in a)) for a in self.augmentations]
        return replace(self, **chosen, augmentations=drawn)

    def to_device(self, device: torch.device) -> StepInputs:
        """Copy the batch to a device and finish its views there."""
        with beside_computing(device) as send:
            views, crops, queries = (
                [send(each) for each in part] for part in (self.views, self.crops, self.queries)
            )
        if self.sizes:
            pairs = zip(self.regions, self.sizes, strict=True)
            views += [crop_batch(views[0], region, size) for region, size in pairs]
        if self.augmentations:
            crops, views = views, augment_views(views, self.augmentations)
        regions = [to_device(region, device) for region in self.regions]
        segments = [to_device(labels, device) for labels in self.segments]
        return replace(
            self, views=views, queries=queries, regions=regions, crops=crops, segments=segments
        )


def collate(samples: list[tuple[StepInputs, list[str]]]) -> StepInputs:
    """Join images, each with its ``failed``, into a batch."""
    images, failed = zip(*samples, strict=True)

    def per_view(name: str) -> Any:
        return zip(*(getattr(image, name) for image in images), strict=True)

    joined: dict[str, Any] = {
        name: [_to_shared_memory(torch.stack(tensors)) for tensors in per_view(name)]
        for name in _TENSORS
    }
    joined |= {name: [np.stack(arrays) for arrays in per_view(name)] for name in _ARRAYS}
    joined["augmentations"] = [stack_augmentations(drawn) for drawn in per_view("augmentations")]
    return replace(images[0], **joined, failed=[name for names in failed for name in names])


def _to_shared_memory(batch: Tensor) -> Tensor:
    # PyTorch's queue would move the batch in a thread of its own. An error there, where shared
    # memory is full, loses the batch, and the training process waits for it without end.
    return batch.share_memory_() if get_worker_info() else batch
