"""Requests to stop, and processes that do not wait for one that has failed or is frozen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.engine import TrainerBase
from forked import ForkedJob, run_forked
from torch import nn
from torch.distributed import TCPStore

from flsl_d2.engine import liveness, run_folder
from flsl_d2.engine.checkpoints import Checkpoints, LeaveWhenAsked, StoppableEval
from flsl_d2.engine.liveness import SignsOfLife
from flsl_d2.engine.stopping import STOPPED, StopRequest, forwarding, signals_held, stop_requests
from flsl_d2.errors import InputError
from flsl_d2.weights import FLSLCheckpointer

TRAINS = """
import time
from flsl_d2.engine.stopping import stop_requests
with stop_requests() as request:
    print("ready", flush=True)
    while not request:
        time.sleep(0.01)
    print(request.signal_name, flush=True)
    time.sleep({more})
"""


def training(folder: Path, more: float) -> ForkedJob:
    script = folder / "train.py"
    script.write_text(TRAINS.format(more=more))
    process = ForkedJob([sys.executable, str(script)], stdout=subprocess.PIPE, env={})
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_noted_and_its_echo_is_not_a_second_one(number, tmp_path):
    process = training(tmp_path, more=0)
    # The second signal is what a scheduler's own to every process looks like. Both wait while the
    # process is stopped, so that no load on the machine comes between them.
    for each in (signal.SIGSTOP, number, signal.SIGTERM, signal.SIGCONT):
        process.send_signal(each)
    lines = process.stdout.read().splitlines()
    assert process.wait(60) == 0
    assert lines[-1] in ("SIGTERM", "SIGUSR1")
    assert sum("saving the first step" in line for line in lines) == 1


def test_an_echo_in_the_middle_of_the_handler_is_not_a_second_request():
    """At every bytecode of the handler, as Python runs handlers between any two of them."""

    def interrupted_at(position: int) -> bool:
        first, second, seen = [], [], 0
        request = StopRequest(first.append, second.append)

        def trace(frame, event, _argument):
            nonlocal seen
            if frame.f_code is not StopRequest.note.__code__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                seen += 1
                if seen == position:
                    request.note(signal.SIGTERM)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            request.note(signal.SIGUSR1)
        finally:
            sys.settrace(before)
        assert (len(first), second, bool(request)) == (1, [], True), f"at bytecode {position}"
        return seen >= position

    position = 1
    while interrupted_at(position):
        position += 1
    assert position > 10


def test_a_second_request_ends_at_once(tmp_path):
    process = training(tmp_path, more=100)
    process.send_signal(signal.SIGUSR1)
    assert "SIGUSR1\n" in (process.stdout.readline() for _ in range(2))  # its message is first
    time.sleep(0.7)  # longer than the time in which a signal counts as the same request
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


def test_forked_workers_obey_their_parent_alone():
    with stop_requests():
        child = os.fork()
        if not child:
            time.sleep(100)
            os._exit(7)
    # A signal from another process than the parent, as a scheduler sends it.
    subprocess.run(["kill", "-TERM", str(child)], check=True)
    subprocess.run(["kill", "-USR1", str(child)], check=True)
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_with_data_workers_ends(workers, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "from torch.utils.data import DataLoader\n"
        "from flsl_d2.engine.stopping import stop_requests\n"
        "with stop_requests():\n"
        f"    loader = DataLoader(list(range(99)), num_workers={workers}, "
        f"persistent_workers={workers > 0})\n"
        "    kept = iter(loader); next(kept)\n"
        "    raise SystemExit(75)\n"
    )
    assert run_forked([sys.executable, script]).returncode == 75


def test_an_evaluation_is_left_at_once_and_caught_up(tmp_path):
    """The checkpoint is that of the step; the resumed run evaluates before its first step."""
    seen = []

    class Steps(TrainerBase):
        def run_step(self):
            seen.append(self.iter)

        def state_dict(self):
            return {"iteration": self.iter}

    def trainer(evaluate, request) -> Steps:
        checkpointer = FLSLCheckpointer(nn.Linear(1, 1), str(tmp_path))
        checkpoints = Checkpoints(checkpointer, 100)
        run = Steps()
        evaluation = StoppableEval(3, evaluate, checkpoints, request)
        run.register_hooks([checkpoints, evaluation, LeaveWhenAsked(checkpoints, request)])
        return run

    def asked() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)

    with stop_requests() as request, pytest.raises(SystemExit) as stop:
        trainer(asked, request).train(0, 9)
    assert (stop.value.code, seen) == (STOPPED, [0, 1, 2])
    assert [file.name for file in tmp_path.glob("*.pth")] == ["model_0000002.pth"]
    with stop_requests() as request:
        trainer(lambda: seen.append("evaluated"), request).train(3, 6)
    assert seen == [0, 1, 2, "evaluated", 3, 4, 5, "evaluated"]


def test_ctrl_c_saves_once_training_has_begun_and_handlers_are_put_back():
    # A shell starts jobs in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with stop_requests(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with stop_requests() as request:
        assert signal.getsignal(signal.SIGTERM) == request.note
        assert not request
        request.step = lambda: 31
        signal.raise_signal(signal.SIGINT)
        assert request.signal_name == "SIGINT"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert [signal.getsignal(number) for number in numbers] == before


def test_two_runs_do_not_share_a_folder(tmp_path):
    lock = partial(run_folder._lock, tmp_path, "train.output_dir")
    read, write = os.pipe()
    child = os.fork()
    if not child:
        lock()
        os.write(write, b"locked")
        time.sleep(60)
    assert os.read(read, 6) == b"locked"
    with pytest.raises(InputError, match=f"process {child} on "):
        lock()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock()
    run_folder.unlock(tmp_path)
    assert (tmp_path / run_folder.LOCK_FILE).read_text() == ""


def test_held_signals_reach_a_child_that_was_not_ready():
    code = (
        "import signal; signal.signal(signal.SIGUSR1, lambda *a: print('got', flush=True))\n"
        "print(signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, []), flush=True)\n"
        "input()\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])"
    )
    with signals_held():
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    assert child.stdout.readline() == "True\n"
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with forwarding([SimpleNamespace(pid=child.pid, exitcode=None)]) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # leaving: an echo changes nothing
    for number, handler in before:
        signal.signal(number, handler)
    said, _ = child.communicate("\n", timeout=60)
    assert said == "got\n"
    assert child.returncode == 0


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
