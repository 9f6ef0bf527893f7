"""Real processes and their failures, and what launchers say of a process."""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from forked import FORK, run_elastic, run_forked, start_forked
from torch import nn
from torch.multiprocessing.spawn import start_processes

from flsl_d2.engine import gpus
from flsl_d2.engine import launch as launch_module
from flsl_d2.engine.launch import WorkerError, launch, wrap_ddp
from flsl_d2.engine.launchers import restart_store, slurm_variables, started_by_torchrun
from flsl_d2.engine.stopping import STOPPED
from flsl_d2.errors import InputError, TrainingError
from pretrain.trainer import resolve_precision

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


WAIT = timedelta(seconds=20)
TASK = """
    SLURM_STEP_NUM_TASKS=16 SLURM_PROCID=11 SLURM_LOCALID=3 SLURM_STEP_TASKS_PER_NODE=8(x2)
    SLURM_STEP_NODELIST=node[07-09,12],other SLURM_JOB_ID=123456 SLURM_STEP_ID=2
"""
TASK = dict(pair.split("=") for pair in TASK.split())


def test_a_restarted_rank_reads_no_address_of_the_dead_attempt():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=WAIT)
    variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(server.port)
    first, second = (
        restart_store({**variables, "TORCHELASTIC_RESTART_COUNT": count}, WAIT) for count in "01"
    )
    first.set("rank0", "address of a dead process")
    assert first.check(["rank0"])
    assert not second.check(["rank0"])
    assert restart_store({**variables, "TORCHELASTIC_USE_AGENT_STORE": "False"}, WAIT) is None
    several = {**variables, "GROUP_WORLD_SIZE": "2"}
    assert restart_store(several, WAIT) is None
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        restart_store({**several, "TORCHELASTIC_MAX_RESTARTS": "3"}, WAIT)


def test_tasks_of_slurm_are_ranks():
    ranks = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    port = str(20000 + 123458 % 20000)
    assert slurm_variables(TASK) == {**ranks, "MASTER_ADDR": "node07", "MASTER_PORT": port}
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    assert own.items() <= slurm_variables({**TASK, **own}).items()
    assert slurm_variables({**TASK, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    batch_script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}  # of which srun starts the tasks
    assert slurm_variables(batch_script) == {}
    with pytest.raises(InputError, match="ntasks-per-node"):
        slurm_variables({**TASK, "SLURM_STEP_TASKS_PER_NODE": "8,4"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1,a2", "a1"), ("gpu-3", "gpu-3"), ("r[1-2]n[5,6]x,b", "r1n5x"), ("c[2,4]", "c2")],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert slurm_variables({**TASK, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


def test_a_pod_of_kubernetes_is_a_rank(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert started_by_torchrun()


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (8, 3)])
def test_one_visible_gpu_for_each_process_is_taken(visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert launch_module._visible_gpu(3, 8, "cuda") == expected


def test_processes_that_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(launch_module.comm, "all_gather", lambda gpu: ["a", "b", gpu])
    launch_module._check_one_gpu_each("c")
    with pytest.raises(InputError, match="ranks 1 and 2 have the same GPU"):
        launch_module._check_one_gpu_each("b")


def test_ddp_takes_the_gpu_of_the_model_not_the_local_rank(monkeypatch):
    taken = {}
    monkeypatch.setattr(
        launch_module, "create_ddp_model", lambda _, **options: taken.update(options)
    )

    class OnGPU(nn.Module):
        def parameters(self):
            return iter([type("Parameter", (), {"device": torch.device("cuda", 0)})])

    launch_module.wrap_ddp(OnGPU())
    assert taken == {"device_ids": [0]}


@pytest.mark.parametrize(
    ("driver", "cuda", "expected"),
    [
        ("535.183", "13.0", "driver 535.183 is there, .* CUDA 13 needs driver 580 or newer"),
        ("580.65", None, "driver 580.65 is there, but this PyTorch is for CPUs"),
        (None, "13.0", "PyTorch sees no GPU here; use the CPU"),
    ],
)
def test_a_driver_that_pytorch_cannot_use_is_named(driver, cuda, expected, monkeypatch):
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=expected):
        launch(print, 1, device="cuda")


@pytest.mark.parametrize(("native", "expected"), [(False, "fp16"), (True, "bf16")])
def test_emulated_bfloat16_is_not_chosen(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    supported = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", "cuda") == expected
