"""Processes of a run do not wait for one that has failed or is frozen, and all stop together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from flsl_d2.engine import liveness
from flsl_d2.engine.liveness import SignsOfLife
from flsl_d2.engine.stopping import stop_requests

PATIENCE = 60


@pytest.fixture
def two(monkeypatch) -> Callable[[Callable[[int, SignsOfLife], int]], list[int]]:
    """Fork two processes that give signs of life, run a function in each; return their ids."""
    monkeypatch.setattr(liveness, "_PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(liveness, "_GRACE_SECONDS", 0.2)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: list[int] = []

    def start(function: Callable[[int, SignsOfLife], int]) -> list[int]:
        for rank in (0, 1):
            child = os.fork()
            if not child:
                own = TCPStore("127.0.0.1", store.port, timeout=timedelta(seconds=20))
                os._exit(function(rank, SignsOfLife(own, rank, 2, silent_seconds=1.0)))
            children.append(child)
        return children

    yield start
    for child in children:
        with_status = os.waitpid(child, os.WNOHANG) if os.path.exists(f"/proc/{child}") else 1
        if not with_status:
            os.kill(child, signal.SIGKILL)


def status(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the process waits")


def test_a_failure_ends_the_others(two, capfd):
    def function(rank: int, signs: SignsOfLife) -> int:
        if rank == 1:
            signs.fail("a broken disk")
            return 3
        time.sleep(PATIENCE)
        return 0

    first, second = two(function)
    assert (status(second), status(first)) == (3, 1)
    assert "rank 1 failed: a broken disk" in capfd.readouterr().err


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_not_waited_for(two, frozen):
    children = two(lambda rank, signs: time.sleep(PATIENCE) or 0)
    time.sleep(0.5)
    os.kill(children[frozen], signal.SIGSTOP)
    assert status(children[1 - frozen]) == 1
    os.kill(children[frozen], signal.SIGKILL)
    os.waitpid(children[frozen], 0)


def test_a_request_to_stop_reaches_all_and_an_end_is_no_failure(two):
    def function(rank: int, signs: SignsOfLife) -> int:
        with stop_requests() as request:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            deadline = time.monotonic() + PATIENCE
            while not request and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.5)  # the step that is finished
        signs.end()
        time.sleep(0.5 if rank else 2.5)  # longer than the silence that counts as a loss
        return 10 if request else 0

    assert [status(child) for child in two(function)] == [10, 10]
