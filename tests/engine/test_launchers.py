"""What launchers say of a process: restarts, tasks of SLURM, one visible GPU for each."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flsl_d2.engine import gpus, launch
from flsl_d2.engine.launchers import restart_store, slurm_variables, started_by_torchrun
from flsl_d2.errors import InputError
from pretrain.trainer import resolve_precision

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
    assert launch._visible_gpu(3, 8, "cuda") == expected


def test_processes_that_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(launch.comm, "all_gather", lambda gpu: ["a", "b", gpu])
    launch._check_one_gpu_each("c")
    with pytest.raises(InputError, match="ranks 1 and 2 have the same GPU"):
        launch._check_one_gpu_each("b")


def test_ddp_takes_the_gpu_of_the_model_not_the_local_rank(monkeypatch):
    taken = {}
    monkeypatch.setattr(launch, "create_ddp_model", lambda _, **options: taken.update(options))

    class OnGPU(nn.Module):
        def parameters(self):
            return iter([type("Parameter", (), {"device": torch.device("cuda", 0)})])

    launch.wrap_ddp(OnGPU())
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
        launch.launch(print, 1, device="cuda")


@pytest.mark.parametrize(("native", "expected"), [(False, "fp16"), (True, "bf16")])
def test_emulated_bfloat16_is_not_chosen(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    supported = lambda including_emulation=True: including_emulation or native  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", "cuda") == expected
