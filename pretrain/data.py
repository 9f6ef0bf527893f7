"""Batches for pre-training: which images, in which order, and what becomes of bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from flsl_d2.data.images import (
    MAX_PIXELS,
    MAX_PIXELS_LIMIT,
    ImageFile,
    printable,
)
from flsl_d2.errors import InputError
from pretrain.device_views import (
    AugmentationBatch,
    augment_views,
    crop_batch,
    stack_augmentations,
)
from pretrain.methods.flsl_objective import query_indexes
from pretrain.views import NestedViews, Views
from pretrain.workers import WorkerLoader, keep_quiet_about_lost_trainer

__all__ = [
    "Batch",
    "ImageStream",
    "PretrainDataset",
    "build_pretrain_loader",
    "check_failed_share",
    "collate",
]

MAX_REPLACEMENTS = 20
ENOUGH_IMAGES = 1000  # a share of fewer says little


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        views: uint8 (B, 3, S, S), the teacher's first; as far as the workers made them, see
            :class:`pretrain.views.Views`.
        queries: for every student view (B, Q) int64, which of its tokens are queries.
        failed: files that could not be read and were replaced by other images; each the name as
            printable text, a tab and the reason.
        crops: the views before augmentation, where they are kept; else empty.
        augmentations: of each view, where they are left to the device; else empty.
        boxes: (B, 4) of each student view, where the crops are left to the device; else empty.
        sizes: side in pixels of each student view.
    """

    views: list[Tensor]
    queries: list[Tensor]
    failed: list[str]
    crops: list[Tensor] = field(default_factory=list)
    augmentations: list[AugmentationBatch] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def pin_memory(self) -> Batch:
        """What PyTorch's loader calls so that copies to the GPU need not wait."""
        for tensors in (self.views, self.queries, self.crops):
            tensors[:] = [tensor.pin_memory() for tensor in tensors]
        return self

    def split(self, parts: int) -> list[Batch]:
        """The batch in so many equal parts.

        Raises:
            InputError: the number does not divide the images.
        """
        count = len(self.views[0])
        if not 1 <= parts <= count or count % parts:
            raise InputError(
                f"train.accumulation_steps is {parts}, which does not divide the {count} images of "
                "a process's step; use a divisor, or another dataloader.total_batch_size."
            )
        return [self._images(slice(i, i + count // parts)) for i in range(0, count, count // parts)]

    def _images(self, which: slice) -> Batch:
        def of(arrays: list[Any]) -> list[Any]:
            return [array[which] for array in arrays]

        augmentations = [AugmentationBatch(*of(list(view))) for view in self.augmentations]
        return Batch(
            of(self.views),
            of(self.queries),
            self.failed,
            of(self.crops),
            augmentations,
            of(self.boxes),
            self.sizes,
        )

    def views_on(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """All views on a device, finished there, and the crops, if kept or made there.

        Returns:
            Views (B, 3, S, S) in 0 to 255, the teacher's first; and the same before augmentation.
        """
        views = [view.to(device, non_blocking=True) for view in self.views]
        crops = [crop.to(device, non_blocking=True) for crop in self.crops]
        if self.boxes:
            boxes = [torch.from_numpy(box).to(device, non_blocking=True) for box in self.boxes]
            cut = zip(boxes, self.sizes, strict=True)
            views += [crop_batch(views[0], box, size) for box, size in cut]
        if self.augmentations:
            crops, views = views, augment_views(views, self.augmentations)
        return views, crops


class PretrainDataset(Dataset):
    """Views of images, a function of (seed, epoch, index) alone.

    Args:
        files: image files.
        views: makes views of a decoded image.
        seed: of all randomness.
        on_error: ``skip`` puts another image of the set, drawn from the same seed, in the place
            of one that cannot be read, and reports the file; ``raise`` stops.
        max_pixels: an image of more counts as one that cannot be read.

    Raises:
        InputError: at a key, when ``on_error`` is ``raise``, or nothing can be read any more.
    """

    def __init__(
        self,
        files: list[str],
        views: NestedViews,
        seed: int = 0,
        on_error: str = "skip",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if on_error not in ("skip", "raise"):
            raise InputError(f"dataset.on_error is '{on_error}'; use 'skip' or 'raise'.")
        if not 1 <= max_pixels <= MAX_PIXELS_LIMIT:
            raise InputError(f"dataset.max_pixels is {max_pixels}; use 1 to {MAX_PIXELS_LIMIT}.")
        self.files, self.views, self.seed = files, views, seed
        self.on_error, self.max_pixels = on_error, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Views, list[str]]:
        """Views of sample ``(epoch, index)``, and the ``failed`` of :class:`Batch`."""
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        failed: list[str] = []
        for _ in range(MAX_REPLACEMENTS):
            file = self.files[index]
            try:
                return self.views(ImageFile(file, self.max_pixels), rng), failed
            except OSError as error:
                if self.on_error == "raise":
                    raise InputError(
                        f"image '{printable(file)}' cannot be used ({error}); remove it, or set "
                        "dataset.on_error=skip."
                    ) from None
                failed.append(f"{printable(file)}\t{error}")
                index = int(rng.integers(len(self.files)))
        name, reason = failed[-1].split("\t", 1)
        raise InputError(
            f"{MAX_REPLACEMENTS} images in a row cannot be used, the last is '{name}' ({reason}); "
            "check the files, or the mount they lie on."
        )


def check_failed_share(
    num_failed: int, num_used: int, num_images: int, limit: float, log_file: str | Path
) -> None:
    """Stop a run on a data set that is largely broken.

    Nothing is judged before one epoch or :data:`ENOUGH_IMAGES`, whichever is shorter.

    Args:
        num_failed: files that could not be used so far, counted each time.
        num_used: images that could.
        num_images: of the data set.
        limit: share of all attempts that may fail, 0 to 1.
        log_file: where the files are named.

    Raises:
        InputError: the share is larger than ``limit``.
    """
    tried = num_failed + num_used
    if tried >= min(num_images, ENOUGH_IMAGES) and num_failed > limit * tried:
        raise InputError(
            f"{num_failed} of {tried} images cannot be used ({num_failed / tried:.1%}), more than "
            f"dataset.max_failed_share={limit:g} allows; see {log_file} for the files and the "
            "reasons, and repair the data set or raise the limit."
        )


class ImageStream(Sampler):
    """Endless stream of shuffled epochs, dealt out to ranks; any position can be started from.

    Step ``i`` of the run takes positions ``i * B`` to ``(i + 1) * B`` of the stream, B being the
    images of a step of all ranks, so the images of a step do not depend on the number of ranks.

    Args:
        num_images: images of the set.
        total_batch_size: B.
        seed: of the shuffling.
        rank: of this process.
        world_size: number of processes; divides B.
        start_iter: first step, for a run that is resumed.
    """

    def __init__(
        self,
        num_images: int,
        total_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
    ) -> None:
        if total_batch_size % world_size:
            raise InputError(
                f"dataloader.total_batch_size is {total_batch_size}, which {world_size} processes "
                "do not divide; use a multiple."
            )
        self.num_images, self.total_batch_size, self.seed = num_images, total_batch_size, seed
        self.rank, self.batch_size = rank, total_batch_size // world_size
        self.start_iter = start_iter

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration, known_epoch, order = self.start_iter, -1, np.empty(0)
        while True:
            first = iteration * self.total_batch_size + self.rank * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.num_images)
                if epoch != known_epoch:
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
                    known_epoch = epoch
                batch.append((epoch, int(order[place])))
            yield batch
            iteration += 1


def build_pretrain_loader(
    dataset: PretrainDataset,
    total_batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    start_iter: int = 0,
) -> WorkerLoader:
    """Endless loader of :class:`Batch`; a worker that dies is an :class:`InputError`.

    Args:
        dataset: the views.
        total_batch_size: images a step, of all ranks together.
        num_workers: decoding processes of this rank; 0 decodes in the training process.
        rank: of this process.
        world_size: number of processes.
        start_iter: first step of the stream.
    """
    stream = ImageStream(len(dataset), total_batch_size, dataset.seed, rank, world_size, start_iter)
    return WorkerLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_prepare_worker,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def collate(samples: list[tuple[Views, list[str]]]) -> Batch:
    """A batch of what :class:`PretrainDataset` gives for each image."""
    views, failed = zip(*samples, strict=True)

    def by_view(samples: Iterable[list[Any]]) -> Iterator[tuple[Any, ...]]:
        return zip(*samples, strict=True)

    def stacked(tensors: Iterable[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(of_one) for of_one in by_view(tensors)]

    def handed_over(batch: Tensor) -> Tensor:
        # Left to the queue's own thread, a shared memory that is full would lose the batch with a
        # message that nobody waits for, and the training process would wait for ever.
        return batch.share_memory_() if get_worker_info() else batch

    return Batch(
        [handed_over(images) for images in stacked(sample.images for sample in views)],
        [handed_over(query_indexes(mask)) for mask in stacked(sample.queries for sample in views)],
        [name for names in failed for name in names],
        [handed_over(crops) for crops in stacked(sample.crops for sample in views)],
        [stack_augmentations(of_one) for of_one in by_view(v.augmentations for v in views)],
        [np.array(of_one) for of_one in by_view(v.boxes for v in views)],
        views[0].sizes,
    )


def _prepare_worker(_worker: int) -> None:
    # Workers are the parallelism; threads of their own would fight over the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_quiet_about_lost_trainer()
