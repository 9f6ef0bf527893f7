"""Images for pre-training: any tree of image files, or a data set registered in Detectron2."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flsl_d2.data.annotations import check_registered_dataset
from flsl_d2.errors import InputError
from pretrain.views import NestedViews, Views

__all__ = [
    "Batch",
    "ImageStream",
    "PretrainDataset",
    "build_pretrain_loader",
    "find_images",
    "image_files",
    "read_rgb",
]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".gif"}
MAX_REPLACEMENTS = 20
logger = logging.getLogger("pretrain")


@dataclass
class Batch:
    """One rank's share of a step.

    Attributes:
        views: uint8 (B, 3, S, S), the teacher's first.
        queries: for every student view (B, N) bool, True = query.
        failed: files that could not be read, and were replaced by other images.
        crops: the views before augmentation, where they are kept; else empty.
    """

    views: list[Tensor]
    queries: list[Tensor]
    failed: list[str]
    crops: list[Tensor] = field(default_factory=list)


def find_images(root: str | Path) -> list[str]:
    """All image files below a folder, sorted: ImageNet's layout or any other tree.

    Raises:
        InputError: no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(
            f"dataset.root is '{root}', which is not a folder; set it to a folder of images, or "
            "set dataset.name to a registered data set."
        )
    found = [
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise InputError(
            f"dataset.root is '{root}', which holds no image file "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}); set it to a folder of images."
        )
    return sorted(found)


def image_files(root: str = "", name: str = "") -> list[str]:
    """Files of the data set: of the registered ``name`` where given, else below ``root``.

    Labels of a registered data set are not looked at.
    """
    if name:
        from detectron2.data import DatasetCatalog

        check_registered_dataset(name)
        return [record["file_name"] for record in DatasetCatalog.get(name)]
    return find_images(root)


def read_rgb(path: str) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned upright as its EXIF data say.

    Raises:
        OSError: not readable, or not an image.
    """
    encoded = np.fromfile(path, dtype=np.uint8)
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if len(encoded) else None
    if image is None:
        raise OSError(f"'{path}' is not an image that can be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


class PretrainDataset(Dataset):
    """Views of images, a function of (seed, epoch, index) alone.

    Args:
        files: image files.
        views: makes views of a decoded image.
        seed: of all randomness.
        on_error: ``skip`` puts another image of the set, drawn from the same seed, in the place
            of one that cannot be read, and reports the file; ``raise`` stops.
    """

    def __init__(
        self, files: list[str], views: NestedViews, seed: int = 0, on_error: str = "skip"
    ) -> None:
        if on_error not in ("skip", "raise"):
            raise InputError(f"dataset.on_error is '{on_error}'; use 'skip' or 'raise'.")
        self.files, self.views, self.seed, self.on_error = files, views, seed, on_error

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Views, list[str]]:
        """Views and unreadable files of sample ``(epoch, index)``."""
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        failed: list[str] = []
        for _ in range(MAX_REPLACEMENTS):
            try:
                image = read_rgb(self.files[index])
            except OSError:
                if self.on_error == "raise":
                    raise
                failed.append(self.files[index])
                index = int(rng.integers(len(self.files)))
                continue
            return self.views(image, rng), failed
        raise InputError(
            f"{MAX_REPLACEMENTS} images in a row cannot be read, the last is '{failed[-1]}'; "
            "check the files, or the mount they lie on."
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
) -> DataLoader:
    """Endless loader of :class:`Batch`.

    Args:
        dataset: the views.
        total_batch_size: images a step, of all ranks together.
        num_workers: decoding processes of this rank; 0 decodes in the training process.
        rank: of this process.
        world_size: number of processes.
        start_iter: first step of the stream.
    """
    stream = ImageStream(len(dataset), total_batch_size, dataset.seed, rank, world_size, start_iter)
    return DataLoader(
        dataset,
        batch_sampler=stream,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _collate(samples: list[tuple[Views, list[str]]]) -> Batch:
    views, failed = zip(*samples, strict=True)

    def stacked(tensors: Iterable[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(of_one_view) for of_one_view in zip(*tensors, strict=True)]

    return Batch(
        stacked(sample.images for sample in views),
        stacked(sample.queries for sample in views),
        [name for names in failed for name in names],
        stacked(sample.crops for sample in views),
    )


def _one_thread(_worker: int) -> None:
    # Workers are the parallelism; threads of their own would fight over the same cores.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
