"""Batches for pre-training: the images of each step, their views, and unreadable files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flsl_d2.errors import InputError, TrainingError
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import MAX_PIXELS, ImageFile, read_channels
from flsl_d2.images.store import ImageStore, as_store
from pretrain.step_inputs import StepInputs, collate
from pretrain.views import CutViews

MAX_REPLACEMENTS = 20
LOOK_AHEAD = 2  # batches
ENOUGH_IMAGES = 1000  # a share of fewer images is too uncertain


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return the images of an epoch in their order, (num_images,) uint32; 56 MB for 14 million."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(num_images, dtype=np.uint32))


class ImageStream(Sampler[list[tuple[int, int]]]):
    """Endless stream of shuffled epochs, divided among ranks, from step ``start_iter`` on.

    Step ``i`` of the run takes positions ``i * B`` to ``(i + 1) * B`` of the stream, B being the
    images of a step of all ranks, so the images of a step do not depend on the number of ranks.

    Raises:
        InputError: the processes do not divide the images of a step.
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
        iteration, known_epoch = self.start_iter, -1
        while True:
            first = iteration * self.total_batch_size + self.rank * self.batch_size
            epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.num_images)
            batch: list[tuple[int, int]] = []
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
                if epoch != known_epoch:
                    order, known_epoch = epoch_order(self.num_images, self.seed, epoch), epoch
                batch += [(epoch, int(index)) for index in order[places[epochs == epoch]]]
            yield batch
            iteration += 1


class PretrainDataset(Dataset[tuple[StepInputs, list[str]]]):
    """Views of images, a function of (seed, epoch, index) alone.

    Args:
        files: the images; a list of paths is a store of files.
        views: function from a file and a generator to views.
        on_error: ``skip`` replaces an image that cannot be read by another one, drawn from the same
            seed, and reports the file; ``raise`` stops.
        max_pixels: largest number of pixels of an image; a larger one counts as unreadable.
        channels: number of channels whose stored values are used; 0 for RGB of 8 bits.
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

    def __getitem__(self, key: tuple[int, int]) -> tuple[StepInputs, list[str]]:
        """Return the views of sample ``(epoch, index)``, and the ``failed`` of :class:`StepInputs`.

        Raises:
            InputError: the image cannot be read and ``on_error`` is ``raise``, or many images in a
                row cannot be read.
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
    ) -> list[tuple[StepInputs, list[str]]] | InputError | TrainingError:
        """Return the samples of a batch, or the error that stops the run.

        PyTorch's loader calls this. An error that a worker raises would arrive with the worker's
        traceback in front of its sentence.
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
        num_failed: number of attempts so far that failed; ``num_used`` succeeded.
        limit: largest share of attempts that may fail, 0 to 1.
        log_file: path of the file that names the unreadable images.
    """
    tried = num_failed + num_used
    if tried >= min(num_images, ENOUGH_IMAGES) and num_failed > limit * tried:
        raise InputError(
            f"{num_failed} of {tried} images cannot be used ({num_failed / tried:.1%}), more than "
            f"dataset.max_failed_share={limit:g} allows; see {log_file} for the files and the "
            "reasons, and repair the data set or raise the limit."
        )


class PretrainLoader:
    """Batches of a PyTorch loader, which raise the errors of the data set as they are."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[StepInputs]:
        waiting: deque[StepInputs] = deque()
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
    """Build an endless loader of batches from step ``start_iter`` on.

    ``num_workers`` processes decode, 0 for the training process itself; each prepares
    ``prefetch_factor`` batches ahead. Memory is pinned where the training device is a GPU.
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


def _collate_or_pass(
    samples: list[tuple[StepInputs, list[str]]] | InputError | TrainingError,
) -> StepInputs | InputError | TrainingError:
    return samples if isinstance(samples, InputError | TrainingError) else collate(samples)


def _prepare_worker(_worker: int) -> None:
    # The workers run in parallel; threads of each would compete for the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
