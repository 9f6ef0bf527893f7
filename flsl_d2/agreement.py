"""Decisions that all processes of a run share, and errors that all of them raise."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

from flsl_d2.errors import InputError, TrainingError

T = TypeVar("T")


def decided_by_main(function: Callable[[], T]) -> T:
    """Run a function on the main process alone; return its result, or raise its error, on all."""
    is_main = comm.is_main_process()
    result, error = _outcome(function) if is_main else (None, None)
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result


def checked_by_all(function: Callable[[], T]) -> T:
    """Run a function on every process; an error of one is raised on all.

    A process that raises an error alone would leave the others waiting for it. Of several errors
    that of the first process is raised.
    """
    result, error = _outcome(function)
    error = next((e for e in comm.all_gather(error) if e is not None), None)
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result


class SlowAgreement:
    """Whether any process says yes, exchanged while the processes go on.

    Every process must ask equally often, and all get the same answer. With one process the answer
    is its own; with several it is that of the question before.
    """

    def __init__(self) -> None:
        self._answer: Tensor | None = None
        self._work: dist.Work | None = None

    def agreed_before(self, yes: bool) -> bool:
        """Answer the question before, and ask again."""
        if comm.get_world_size() == 1:
            return yes
        before = False
        if self._work is not None and self._answer is not None:
            self._work.wait()
            before = bool(self._answer)
        self._answer = torch.tensor(int(yes))
        group = comm._get_global_gloo_group()
        self._work = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group, async_op=True)
        return before


def check_equal(value: str, what: str, remedy: str) -> None:
    """Raise an InputError on all processes, ``what`` ... ``remedy``, where their values differ."""
    all_values = comm.all_gather((platform.node(), value))
    for rank, (machine, other) in enumerate(all_values):
        first_machine, first = all_values[0]
        if other != first:
            raise InputError(
                f"{what} differ between processes: {first} on rank 0 ({first_machine}), {other} on "
                f"rank {rank} ({machine}); {remedy}."
            )


def _outcome(function: Callable[[], T]) -> tuple[T | None, InputError | TrainingError | None]:
    try:
        return function(), None
    except (InputError, TrainingError) as error:
        return None, error
