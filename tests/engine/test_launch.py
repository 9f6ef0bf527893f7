"""Real processes: groups that Detectron2's comm knows, and failures that show their cause.

Workers are forked, except where a test is about the start or the end of a fresh process.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from forked import FORK, ForkedJob, run_elastic
from torch import nn

from flsl_d2.engine import launch as launch_module
from flsl_d2.engine.launch import WorkerError, launch, wrap_ddp
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent

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


def check_two_ranks(folder: Path) -> None:
    # The mean over ranks of d/dw sum(w * rank) is (0 + 1) / 2.
    for rank in (0, 1):
        assert (folder / f"rank{rank}").read_text().split() == [
            *(str(rank), "2", str(rank), "2", "0.5", "0", "1")
        ]


def test_one_process_runs_here(tmp_path):
    launch(record, 1, args=(str(tmp_path),), device="cpu")
    assert (tmp_path / "rank0").read_text() == "0 1 0 1 0.0 0"


def record_while_threads_compute(folder: str) -> None:
    record(folder)
    keep_threads_busy()


def test_two_fresh_processes(tmp_path):
    launch(record_while_threads_compute, 2, args=(str(tmp_path),), device="cpu")
    check_two_ranks(tmp_path)


def test_two_machines_of_one_process(tmp_path, forked_workers):
    url = f"tcp://127.0.0.1:{free_port()}"
    started = [
        FORK.Process(target=launch, args=(record, 1, 2, rank, url, (str(tmp_path),), "cpu"))
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(PATIENCE)
    assert [process.exitcode for process in started] == [0, 0]
    assert (tmp_path / "rank1").read_text() == "1 2 0 1 0.5 0 1"


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
    check_two_ranks(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"), [("crash", "rank one divided"), ("killed", "SIGKILL")]
)
def test_a_dying_rank_ends_the_others_and_shows_its_own_error(kind, message, forked_workers):
    start = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        launch(fail, 2, args=(kind,), device="cpu")
    assert time.monotonic() - start < PATIENCE


def test_a_worker_ends_with_a_parent_that_is_killed_while_it_starts(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from flsl_d2.engine.launch import launch\n"
        "folder = Path(sys.argv[1])\n"
        "def work():\n"
        "    (folder / 'trained').touch()\n"
        "if __name__ == '__main__':\n"
        # One of two machines: a single worker of its own is started.
        "    launch(work, 1, 2, 0, 'tcp://127.0.0.1:1', device='cpu')\n"
        "else:\n"
        "    (folder / f'starting{os.getpid()}').touch()\n"
        "    while not (folder / 'orphaned').exists():\n"
        "        time.sleep(0.01)\n"
    )
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, str(script), str(tmp_path)]
        parent = ForkedJob(command, cwd=REPOSITORY, stdout=log, env={})
    try:
        (starting,) = wait_for(lambda: [*tmp_path.glob("starting*")])
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        (tmp_path / "orphaned").touch()
    worker = Path("/proc", starting.name.removeprefix("starting"))
    wait_for(lambda: not runs(worker))
    assert not (tmp_path / "trained").exists()


def runs(process):
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


def keep_threads_busy() -> None:
    # These stand for gloo's threads: PyTorch's code wants the interpreter again while it is torn
    # down, which aborts the process.
    operand = torch.randn(256, 256)
    for _ in range(2):
        threading.Thread(target=lambda: [operand @ operand for _ in count()], daemon=True).start()
    time.sleep(0.2)


def test_a_tool_with_busy_threads_ends_with_its_status_under_torchrun():
    code = (
        "import atexit, test_launch as t; from flsl_d2.engine.command_line import run_tool\n"
        "atexit.register(print, 'registered')\n"
        "run_tool(t.keep_threads_busy)"
    )
    environment = {
        **os.environ,
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, TESTS, TESTS / "engine"))),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
    )
    assert (done.returncode, done.stdout) == (0, "registered\n"), done.stderr


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
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"^the loss is nan; lower it$"):
        launch(leave, 2, args=("broken",), device="cpu")
    assert time.monotonic() - start < PATIENCE


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
