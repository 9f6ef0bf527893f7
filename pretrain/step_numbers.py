"""The numbers of a step: brought from all processes, checked, and reported where they are bad."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from flsl_d2.errors import TrainingError
from flsl_d2.files import write_text
from flsl_d2.images.opening import printable
from flsl_d2.modeling.transfer import to_device
from pretrain.data import ImageStream
from pretrain.schedules import StepValues

BAD_NUMBERS_FILE = "bad_numbers.json"
_SHOWN_FILES = 3


class StepNumbers:
    """Numbers of a step of all processes, which the device sends while Python goes on.

    They are exchanged as one tensor: ``scalars`` on the training device, the same names on each
    process, and ``counts`` of this process on the CPU.
    """

    def __init__(
        self,
        iteration: int,
        values: StepValues,
        scalars: Mapping[str, Tensor],
        counts: Mapping[str, float],
    ) -> None:
        self.iteration, self.values = iteration, values
        self._names, self._counts = list(scalars), list(counts)
        local = torch.stack([x.float() for x in scalars.values()])
        known = torch.tensor(list(counts.values()), dtype=torch.float32)
        local = torch.cat([local, to_device(known, local.device)])
        numbers = local
        if comm.get_world_size() > 1:
            # Gloo takes one row only.
            numbers = local.new_empty(comm.get_world_size() * len(local))
            dist.all_gather_into_tensor(numbers, local)
        self._arrived = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._numbers = numbers.view(-1, len(local))

    def read(self) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
        """Wait for the numbers: the scalars of each rank, and each count of all ranks."""
        if self._arrived is not None:
            self._arrived.synchronize()
        rows = self._numbers.tolist()
        terms = [dict(zip(self._names, row, strict=False)) for row in rows]
        first = len(self._names)
        return terms, {
            name: [row[first + i] for row in rows] for i, name in enumerate(self._counts)
        }


class BadNumbersError(TrainingError):
    """A number of a step is not finite.

    Attributes:
        terms: for each rank, the values of the step by name.
        bad: ``(rank, name)`` of the values that are not finite.
    """

    def __init__(
        self,
        iteration: int,
        terms: Sequence[Mapping[str, float]],
        bad: Sequence[tuple[int, str]],
    ) -> None:
        self.iteration, self.terms, self.bad = iteration, terms, bad
        values = ", ".join(f"{name} = {terms[rank][name]:g} on rank {rank}" for rank, name in bad)
        super().__init__(f"iteration {iteration} gave numbers that are not finite: {values}")


def check_finite(
    iteration: int, terms: Sequence[Mapping[str, float]], exempt: Sequence[str] = ()
) -> None:
    """Raise the same BadNumbersError on every rank where a value of a step is not finite."""
    bad = [
        (rank, name)
        for rank, values in enumerate(terms)
        for name, value in values.items()
        if name not in exempt and not math.isfinite(value)
    ]
    if bad:
        raise BadNumbersError(iteration, terms, bad)


def write_bad_numbers(
    error: BadNumbersError, names: Sequence[str], total_batch_size: int, seed: int, folder: str
) -> TrainingError:
    """Write ``bad_numbers.json``: the step, its values and its files, rank by rank.

    An image that cannot be read was replaced by another one, and ``unreadable_images.txt`` names
    it. The error to raise, which is returned, names the written file and some of the images.
    """
    world = len(error.terms)
    streams = (
        ImageStream(len(names), total_batch_size, seed, rank, world, error.iteration)
        for rank in range(world)
    )
    files = [[printable(names[index]) for _, index in next(iter(each))] for each in streams]
    ranks = [
        {
            "not_finite": [name for bad_rank, name in error.bad if bad_rank == rank],
            # JSON has no name for infinity.
            "values": {name: repr(value) for name, value in values.items()},
            "files": rank_files,
        }
        for rank, (values, rank_files) in enumerate(zip(error.terms, files, strict=True))
    ]
    path = Path(folder, BAD_NUMBERS_FILE)
    try:
        write_text(path, json.dumps({"iteration": error.iteration, "ranks": ranks}, indent=1))
        written = f"all values and files are in {path}"
    except OSError as failure:
        written = f"{path}, for all values and files, cannot be written ({failure.strerror})"
    first = files[error.bad[0][0]]
    shown = ", ".join(first[:_SHOWN_FILES]) + (", ..." if len(first) > _SHOWN_FILES else "")
    return TrainingError(
        f"{error}; its images are {shown}; {written}, and the checkpoints before are untouched. "
        " Lower schedules.base_lr or use another train.precision, then "
        "continue with --resume --allow-changes."
    )
