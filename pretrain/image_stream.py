"""The images of each step: shuffled epochs, a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from flsl_d2.errors import InputError


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
