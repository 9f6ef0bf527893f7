"""Real processes: groups that Detectron2's comm knows, and failures that show their cause."""

import os
import socket
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from forked import FORK, run_elastic, run_forked, start_forked
from torch import nn
from torch.multiprocessing.spawn import start_processes

from flsl_d2.engine import launch as launch_module
from flsl_d2.engine.launch import WorkerError, launch, wrap_ddp
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError

# Seconds that end a test which would wait for ever. A process imports PyTorch in 5 seconds on an
# idle core, and in over a minute on a machine with ten times as much work as cores.
PATIENCE = 240


def record(folder: str) -> None:
    torch.manual_seed(0)
    model = wrap_ddp(nn.Linear(2, 1, bias=False))
    rank, size = comm.get_rank(), comm.get_world_size()
    model(torch.full((1, 2), float(rank))).sum().backward()
    gradient = next(model.parameters()).grad
    line = [rank, size, comm.get_local_rank(), comm.get_local_size(), gradient[0, 0].item()]
    gathered = comm.all_gather(rank)
    Path(folder, f"rank{rank}").write_text(" ".join(map(str, [*line, *gathered])))


def fail(kind: str) -> None:
    if comm.get_rank() == 1:
        if kind == "killed":
            os.kill(os.getpid(), 9)
        raise ZeroDivisionError("rank one divided")
    comm.synchronize()
    time.sleep(3 * PATIENCE)


def test_one_process_runs_here(tmp_path):
    launch(record, 1, args=(str(tmp_path),), device="cpu")
    assert (tmp_path / "rank0").read_text() == "0 1 0 1 0.0 0"


def record_while_threads_compute(folder: str) -> None:
    record(folder)
    keep_threads_busy()


def keep_threads_busy() -> None:
    # These stand for gloo's threads: PyTorch's code wants the interpreter again while it is torn
    # down, which aborts the process.
    operand = torch.randn(256, 256)
    for _ in range(2):
        threading.Thread(target=lambda: [operand @ operand for _ in count()], daemon=True).start()
    time.sleep(0.2)


def test_two_machines_of_one_process(tmp_path):
    """The worker of the first is a fresh process, in which threads compute at its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"

    def machine(rank: int) -> None:
        if rank:
            launch_module.start_processes = start_forked
        launch(record_while_threads_compute, 1, 2, rank, url, (str(tmp_path),), "cpu")

    started = [FORK.Process(target=machine, args=(rank,)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    assert [process.exitcode for process in started] == [0, 0]
    # The mean over ranks of d/dw sum(w * rank) is (0 + 1) / 2.
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [
        f"{rank} 2 0 1 0.5 0 1" for rank in (0, 1)
    ]


def record_after_a_death(folder: str) -> None:
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        comm.synchronize()
        if comm.get_rank() == 1:
            os.kill(os.getpid(), 9)
        comm.synchronize()
    record(folder)


def test_torchrun_brings_back_ranks_of_which_one_was_killed(tmp_path):
    def rank() -> None:
        launch(record_after_a_death, 1, args=(str(tmp_path),), device="cpu")

    run_elastic(rank, restarts=1)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [
        f"{rank} 2 {rank} 2 0.5 0 1" for rank in (0, 1)
    ]


@pytest.mark.parametrize(
    ("kind", "message"), [("crash", "rank one divided"), ("killed", "SIGKILL")]
)
def test_a_dying_rank_ends_the_others_and_shows_its_own_error(kind, message, forked_workers):
    with pytest.raises(WorkerError, match=message):
        launch(fail, 2, args=(kind,), device="cpu")


def start_slowly(function, args, *more, start_method, **options):
    return start_processes(work_late, (function, args), *more, start_method="fork", **options)


def work_late(rank: int, function, args) -> None:
    folder = Path(*args[-1])
    (folder / f"starting{os.getpid()}").touch()
    wait_for(lambda: (folder / "orphaned").exists())
    function(rank, *args)


def touch(folder: str) -> None:
    (Path(folder) / "trained").touch()


def test_a_worker_ends_with_a_parent_that_is_killed_while_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(launch_module, "start_processes", start_slowly)
    # One of two machines: a single worker of its own is started.
    machine = (touch, 1, 2, 0, "tcp://127.0.0.1:1", (str(tmp_path),), "cpu")
    parent = FORK.Process(target=launch, args=machine)
    parent.start()
    (starting,) = wait_for(lambda: [*tmp_path.glob("starting*")])
    parent.kill()
    parent.join()
    (tmp_path / "orphaned").touch()
    worker = Path("/proc", starting.name.removeprefix("starting"))
    wait_for(lambda: not runs(worker))
    assert not (tmp_path / "trained").exists()


def runs(process: Path) -> bool:
    try:  # in a container nobody may collect it: it stays, as a zombie
        return "State:\tZ" not in (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_a_tool_under_torchrun_ends_without_tearing_the_interpreter_down(tmp_path):
    """Functions registered for its end run; the end itself is that of the workers above."""
    (tmp_path / "tool.py").write_text(
        "import atexit; from flsl_d2.engine.command_line import run_tool\n"
        "atexit.register(print, 'registered')\n"
        "run_tool(print, 'works')"
    )
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    done = run_forked([sys.executable, tmp_path / "tool.py"], env=ranks)
    assert (done.returncode, done.stdout) == (0, "works\nregistered\n"), done.stderr


def leave(kind: str) -> None:
    comm.synchronize()
    if kind == "stopped":
        raise SystemExit(STOPPED)
    if comm.get_rank() == 1:
        raise TrainingError("the loss is nan; lower it")
    time.sleep(120)


def test_workers_that_stop_as_asked_are_no_failure(forked_workers):
    with pytest.raises(SystemExit) as left:
        launch(leave, 2, args=("stopped",), device="cpu")
    assert left.value.code == STOPPED


def test_training_that_cannot_go_on_keeps_its_sentence(forked_workers, monkeypatch):
    monkeypatch.setattr(launch_module, "_GRACE_SECONDS", 1)
    with pytest.raises(TrainingError, match=r"^the loss is nan; lower it$"):
        launch(leave, 2, args=("broken",), device="cpu")


@pytest.mark.parametrize(
    "counts",
    [(0, 1, 0, "auto"), (1, 2, 2, "tcp://a:1"), (1, 2, -1, "tcp://a:1"), (1, 2, 0, "auto")],
)
def test_impossible_counts(counts):
    with pytest.raises(InputError):
        launch(fail, *counts, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_no_gpu_is_said_with_the_remedy():
    with pytest.raises(InputError, match=r"train\.device=cpu"):
        launch(fail, 2, device="cuda")
