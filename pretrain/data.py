"""Batches for pre-training: the images of each step, their views, and unreadable files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import MAX_PIXELS, ImageFile, read_channels
from flsl_d2.images.store import ImageStore, as_store
from flsl_d2.modeling.transfer import beside_computing, to_device
from pretrain.device_views import (
    AugmentationBatch,
    augment_views,
    crop_batch,
    stack_augmentations,
)
from pretrain.image_stream import ImageStream
from pretrain.methods.flsl_objective import query_indexes
from pretrain.methods.protocol import StepInputs
from pretrain.views import CutViews, Views

MAX_REPLACEMENTS = 20
LOOK_AHEAD = 2  # batches
ENOUGH_IMAGES = 1000  # a share of fewer images is too uncertain


@dataclass
class Batch:
    """The images of a step on one rank, as the workers send them.

    Attributes:
        views: uint8 (B, 3, S, S), the teacher's view first; as far as the workers made them, see
            :class:`pretrain.views.Views`.
        queries: for each student view (B, Q) int64, the tokens that are queries.
        failed: files that could not be read and were replaced by other images; each the name as
            printable text, a tab and the reason.
        boxes: for each student view (B, 4) int64, its box in the teacher's view in pixels (top,
            left, height, width).
        flips: for each student view (B,) bool, whether it is mirrored.
        sizes: side in pixels of each student view.
        crops: the views before augmentation, where they are kept; else empty.
        augmentations: for each view, where they are left to the device; else empty.
        regions: for each view (B, 4) float32, where they do not follow from the boxes; else empty.
        num_global: number of views, the first ones, that are global.
        segments: for each view (B, N) int64, the label of the segment at each token; or empty.
        grids: for each view (B, 2), rows and columns of tokens, where sizes differ; or empty.
        next_error: the error that took the place of one of the next two batches of this process;
            None for none.
    """

    views: list[Tensor]
    queries: list[Tensor]
    failed: list[str]
    boxes: list[np.ndarray] = field(default_factory=list)
    flips: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    crops: list[Tensor] = field(default_factory=list)
    augmentations: list[AugmentationBatch] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    num_global: int = 1
    segments: list[Tensor] = field(default_factory=list)
    grids: list[np.ndarray] = field(default_factory=list)
    next_error: TrainingError | None = None

    def pin_memory(self) -> Batch:
        """Pin the tensors for PyTorch's loader, so that copies to the GPU need not wait."""
        for tensors in (self.views, self.queries, self.crops):
            tensors[:] = [tensor.pin_memory() for tensor in tensors]
        return self

    def split(self, parts: int) -> list[Batch]:
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

    def _images(self, which: slice) -> Batch:
        def select(arrays: list[Any]) -> list[Any]:
            return [array[which] for array in arrays]

        return replace(
            self,
            views=select(self.views),
            queries=select(self.queries),
            boxes=select(self.boxes),
            flips=select(self.flips),
            regions=select(self.regions),
            segments=select(self.segments),
            grids=select(self.grids),
            crops=select(self.crops),
            augmentations=[AugmentationBatch(*select(list(a))) for a in self.augmentations],
        )

    def to_device(self, device: torch.device) -> StepInputs:
        """Copy the batch to a device and finish its views there.

        Returns:
            All views, and the views before augmentation if they were kept or are made here.
        """
        with beside_computing(device) as send:
            views, crops, queries = (
                [send(each) for each in part] for part in (self.views, self.crops, self.queries)
            )
        if len(views) == 1:
            for box, flip, size in zip(self.boxes, self.flips, self.sizes, strict=True):
                boxes = to_device(box, device)
                view = crop_batch(views[0], boxes, size)
                if flip.any():
                    mirrored = to_device(flip, device)
                    view = torch.where(mirrored.view(-1, 1, 1, 1), view.flip(-1), view)
                views.append(view)
        if self.augmentations:
            crops, views = views, augment_views(views, self.augmentations)
        arrays = self.regions or self._regions()
        regions = [to_device(region, device) for region in arrays]
        segments = [to_device(labels, device) for labels in self.segments]
        return StepInputs(views, queries, regions, crops, self.num_global, segments, self.grids)

    def _regions(self) -> list[np.ndarray]:
        """Compute ``StepInputs.regions`` of each student view, float32."""
        regions = []
        for box, flip in zip(self.boxes, self.flips, strict=True):
            top, left, height, width = (box / self.views[0].shape[-1]).T
            left, width = np.where(flip, left + width, left), np.where(flip, -width, width)
            regions.append(np.stack([top, left, height, width], axis=1).astype(np.float32))
        return regions


class PretrainDataset(Dataset[tuple[Views, list[str]]]):
    """Views of images, a function of (seed, epoch, index) alone.

    Args:
        files: the images; a list of paths is a store of files.
        views: function from a file and a generator to views.
        seed: seed of all randomness.
        on_error: ``skip`` replaces an image that cannot be read by another image of the data set,
            drawn from the same seed, and reports the file; ``raise`` stops.
        max_pixels: largest number of pixels of an image; a larger one counts as unreadable.
        channels: number of channels whose stored values are used; 0 for RGB of 8 bits.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        files: ImageStore | Sequence[str],
        views: CutViews,
        seed: int = 0,
        on_error: str = "skip",
        max_pixels: int = MAX_PIXELS,
        channels: int = 0,
    ) -> None:
        if on_error not in ("skip", "raise"):
            raise InputError(f"dataset.on_error is '{on_error}'; use 'skip' or 'raise'.")
        if max_pixels < 1:
            raise InputError(f"dataset.max_pixels is {max_pixels}; use 1 or more.")
        self.files = as_store(files)
        self.views, self.seed = views, seed
        self.on_error, self.max_pixels, self.channels = on_error, max_pixels, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Views, list[str]]:
        """Return the views of sample ``(epoch, index)``, and the ``failed`` of :class:`Batch`.

        Raises:
            InputError: the image cannot be read and ``on_error`` is ``raise``, or many images in
                a row cannot be read.
            TrainingError: the server of the images stays away.
        """
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        failed: list[str] = []
        for _ in range(MAX_REPLACEMENTS):
            try:
                return self.views(self._image(index), rng), failed
            except OSError as error:
                file = self.files[index]
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

    def _image(self, index: int) -> ImageFile | np.ndarray:
        if self.channels:
            return read_channels(self.files[index], self.channels, self.max_pixels)
        return ImageFile(self.files.source(index), self.max_pixels)

    def __getitems__(
        self, keys: list[tuple[int, int]]
    ) -> list[tuple[Views, list[str]]] | InputError | TrainingError:
        """Return the samples of a batch, or the error that stops the run.

        PyTorch's loader calls this where it exists. An error that a worker raises would arrive
        with the worker's traceback in front of its sentence.
        """
        try:
            self.files.prefetch([index for _, index in keys])
            return [self[key] for key in keys]
        except (InputError, TrainingError) as error:
            return error


def check_failed_share(
    num_failed: int, num_used: int, num_images: int, limit: float, log_file: str | Path
) -> None:
    """Stop a run on a data set of which too many files cannot be read.

    The check starts after one epoch or :data:`ENOUGH_IMAGES`, whichever is shorter.

    Args:
        num_failed: number of attempts so far that failed.
        num_used: number of attempts that succeeded.
        num_images: number of images of the data set.
        limit: largest share of attempts that may fail, 0 to 1.
        log_file: path of the file that names the unreadable images.

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


class PretrainLoader:
    """Batches of a PyTorch loader, which raise the errors of the data set as they are.

    Args:
        loader: loader whose batches are a :class:`Batch` or an error.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[Batch] = deque()
        # A process that had no images for a step would leave the others waiting in the middle of
        # it. So a batch says whether an error comes soon: within two steps, because a step's
        # numbers, by which processes agree to stop, may be read in the next one.
        for following in self.loader:
            if isinstance(following, TrainingError):
                for batch in waiting:
                    batch.next_error = following
            if isinstance(following, InputError | TrainingError):
                yield from waiting
                raise following
            waiting.append(following)
            if len(waiting) > LOOK_AHEAD:
                yield waiting.popleft()


def build_pretrain_loader(
    dataset: PretrainDataset,
    total_batch_size: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    start_iter: int = 0,
    prefetch_factor: int = 2,
    device: str = "cpu",
) -> PretrainLoader:
    """Build an endless loader of batches.

    Args:
        dataset: the data set of views.
        total_batch_size: number of images in a step, of all ranks together.
        num_workers: number of decoding processes of this rank; 0 decodes in the training process.
        rank: rank of this process.
        world_size: number of processes.
        start_iter: first step of the stream.
        prefetch_factor: number of batches that each decoding process prepares ahead.
        device: training device; memory is pinned for a GPU.
    """
    stream = ImageStream(len(dataset), total_batch_size, dataset.seed, rank, world_size, start_iter)
    return PretrainLoader(
        DataLoader(
            dataset,
            batch_sampler=stream,
            num_workers=num_workers,
            collate_fn=_collate_or_pass,
            worker_init_fn=_prepare_worker,
            # Pinning on a machine with GPUs would give a CPU run a CUDA context.
            pin_memory=device.startswith("cuda"),
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
        )
    )


def collate(samples: list[tuple[Views, list[str]]]) -> Batch:
    """Join the samples of :class:`PretrainDataset` into a batch."""
    views, failed = zip(*samples, strict=True)

    def per_view(name: str) -> Iterator[tuple[Any, ...]]:
        return zip(*(getattr(sample, name) for sample in views), strict=True)

    def stack(name: str) -> list[Tensor]:
        return [torch.stack(tensors) for tensors in per_view(name)]

    return Batch(
        views=[_to_shared_memory(images) for images in stack("images")],
        queries=[_to_shared_memory(query_indexes(mask)) for mask in stack("queries")],
        failed=[name for names in failed for name in names],
        boxes=[np.array(boxes) for boxes in per_view("boxes")],
        flips=[np.array(flips) for flips in per_view("flips")],
        sizes=views[0].sizes,
        crops=[_to_shared_memory(crops) for crops in stack("crops")],
        augmentations=[stack_augmentations(drawn) for drawn in per_view("augmentations")],
        regions=[np.stack(regions) for regions in per_view("regions")],
        num_global=views[0].num_global,
        segments=[_to_shared_memory(labels) for labels in stack("segments")],
        grids=[np.stack(grids) for grids in per_view("grids")],
    )


def _collate_or_pass(
    samples: list[tuple[Views, list[str]]] | InputError | TrainingError,
) -> Batch | InputError | TrainingError:
    return samples if isinstance(samples, InputError | TrainingError) else collate(samples)


def _to_shared_memory(batch: Tensor) -> Tensor:
    # PyTorch's queue would move the batch in a thread of its own. An error there, where shared
    # memory is full, loses the batch, and the training process waits for it without end.
    return batch.share_memory_() if get_worker_info() else batch


def _prepare_worker(_worker: int) -> None:
    # The workers run in parallel; threads of each would compete for the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
