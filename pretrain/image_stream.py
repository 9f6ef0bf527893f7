"""The images of each step: shuffled epochs, a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from flsl_d2.errors import InputError

# The order of so many images is kept as a table, at most 16 MB; that of more is computed.
MAX_TABLE = 2**21
_ROUNDS = 6


def epoch_order(num_images: int, seed: int, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the order of the images of an epoch, a function from positions to images.

    Args:
        num_images: number of images.
        seed: seed of the shuffling.
        epoch: number of the epoch, from 0.
    """
    if num_images <= MAX_TABLE:
        table = np.random.default_rng([seed, epoch]).permutation(num_images)
        return lambda positions: table[positions]
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
    return lambda positions: permuted(positions, num_images, keys)


def permuted(positions: np.ndarray, num_images: int, keys: np.ndarray) -> np.ndarray:
    """Permute numbers without a table: a Feistel network whose values walk along their cycles.

    A round exchanges the upper and the lower bits, after mixing a function of one half into the
    other, so it is a permutation of all numbers of that many bits (Luby and Rackoff, 1988). A
    result that is too large is permuted again until it is not (Black and Rogaway, 2002).

    Args:
        positions: (N,) numbers from 0 to ``num_images - 1``.
        num_images: number of images.
        keys: uint64, one for each round; an even number, so that the halves keep their sizes.
    """
    bits = max((num_images - 1).bit_length(), 2)
    low_bits = np.uint64(bits - bits // 2)
    masks = [np.uint64((1 << size) - 1) for size in (bits // 2, bits - bits // 2)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        high, low = values[outside] >> low_bits, values[outside] & masks[1]
        for number, key in enumerate(keys):
            high, low = low, high ^ (_mixed(low ^ key) & masks[number % 2])
        values[outside] = high << low_bits | low
        outside = values >= num_images
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix all bits of 64-bit numbers: the last part of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class ImageStream(Sampler[list[tuple[int, int]]]):
    """Endless stream of shuffled epochs, divided among ranks, from any step on.

    Step ``i`` of the run takes positions ``i * B`` to ``(i + 1) * B`` of the stream, B being the
    images of a step of all ranks, so the images of a step do not depend on the number of ranks.

    Args:
        num_images: number of images of the data set.
        total_batch_size: B.
        seed: seed of the shuffling.
        rank: rank of this process.
        world_size: number of processes; divides B.
        start_iter: first step, for a run that is resumed.

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
                batch += [(epoch, int(index)) for index in order(places[epochs == epoch])]
            yield batch
            iteration += 1
