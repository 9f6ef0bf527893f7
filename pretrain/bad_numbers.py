"""A step whose numbers are not finite: which, from which images, written to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flsl_d2.errors import TrainingError
from flsl_d2.files import write_text
from pretrain.data import ImageStream
from pretrain.images import printable

__all__ = ["BAD_NUMBERS_FILE", "BadNumbersError", "check_finite", "step_files", "write_bad_numbers"]

BAD_NUMBERS_FILE = "bad_numbers.json"
_SHOWN_FILES = 3


class BadNumbersError(TrainingError):
    """Some number of a step is not finite.

    Attributes:
        iteration: of the step, from 0.
        terms: of every rank, the values of the step by name.
        bad: ``(rank, name)`` of those that are not finite.
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
    """Compare every rank's values of a step with infinity.

    Args:
        iteration: of the step, from 0.
        terms: of every rank, values by name.
        exempt: names that may be anything.

    Raises:
        BadNumbersError: at a value that is not finite, the same on every rank.
    """
    bad = [
        (rank, name)
        for rank, values in enumerate(terms)
        for name, value in values.items()
        if name not in exempt and not math.isfinite(value)
    ]
    if bad:
        raise BadNumbersError(iteration, terms, bad)


def step_files(
    files: Sequence[str], total_batch_size: int, seed: int, iteration: int, world_size: int
) -> list[list[str]]:
    """Files of a step's images, for every rank, in the order of its batch."""
    streams = (
        ImageStream(len(files), total_batch_size, seed, rank, world_size, iteration)
        for rank in range(world_size)
    )
    return [[files[index] for _, index in next(iter(stream))] for stream in streams]


def write_bad_numbers(
    error: BadNumbersError, files: Sequence[Sequence[str]], folder: str | Path
) -> TrainingError:
    """Write ``bad_numbers.json``: the step, its values and its files, rank by rank.

    Args:
        error: what was found.
        files: of the step, as of :func:`step_files`. An image that could not be read was replaced
            by another, which ``unreadable_images.txt`` tells.
        folder: of the output.

    Returns:
        The error to raise, whose sentence names the file and some of the images.
    """
    ranks = [
        {
            "not_finite": [name for bad_rank, name in error.bad if bad_rank == rank],
            # JSON has no name for infinity.
            "values": {name: repr(value) for name, value in values.items()},
            "files": [printable(file) for file in of_rank],
        }
        for rank, (values, of_rank) in enumerate(zip(error.terms, files, strict=True))
    ]
    path = Path(folder, BAD_NUMBERS_FILE)
    write_text(path, json.dumps({"iteration": error.iteration, "ranks": ranks}, indent=1))
    first = [printable(file) for file in files[error.bad[0][0]]]
    names = ", ".join(first[:_SHOWN_FILES]) + (", ..." if len(first) > _SHOWN_FILES else "")
    return TrainingError(
        f"{error}; its images are {names}; all values and files are in {path}, and the checkpoints "
        "before are untouched. Lower schedules.base_lr or use another train.precision, then "
        "continue with --resume --allow-changes."
    )
