"""What torchrun, SLURM and Kubernetes tell a process about the others of its run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from flsl_d2.errors import InputError


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher with the same variables, started this process.

    Kubernetes' training operator gives no LOCAL_RANK to a pod, which has one process.
    """
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def started_processes() -> int:
    """Count the processes of this run that torchrun or ``srun`` has started; 1 where none has."""
    return int({**slurm_variables(os.environ), **os.environ}.get("WORLD_SIZE", "1"))


def restart_store(variables: Mapping[str, str], timeout: timedelta) -> Store | None:
    """Rendezvous store, one for each restart attempt; None where PyTorch makes a store by itself.

    torchrun's own store outlives a restart, with the addresses of the ranks that died.

    Raises:
        InputError: restarts on several machines, whose counts of restarts may differ.
    """
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if int(variables.get("GROUP_WORLD_SIZE", "1")) > 1:
        if int(variables.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            raise InputError(
                "torchrun --max-restarts on several machines keeps the addresses of processes that "
                "died; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all machines."
            )
        return None
    store = TCPStore(
        variables["MASTER_ADDR"], int(variables["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    return PrefixStore(f"attempt_{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def slurm_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of torchrun for a task of ``srun``; none where the step has a single task.

    MASTER_ADDR and MASTER_PORT of the environment are kept.

    Raises:
        InputError: machines have different numbers of tasks.
    """
    if int(variables.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "SLURM_PROCID" not in variables:
        return {}
    per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", "")
    same = re.fullmatch(r"(\d+)(\(x\d+\))?", per_node)
    if not same:
        raise InputError(
            f"SLURM started '{per_node}' tasks on its machines; start the same number on each, by "
            "srun --ntasks-per-node."
        )
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", variables["SLURM_STEP_NODELIST"])
    assert first is not None, "a list of machines names one"
    port = 20000 + (int(variables["SLURM_JOB_ID"]) + int(variables["SLURM_STEP_ID"])) % 20000
    return {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": same[1],
        # node[07-09,12],other: the first is node07.
        "MASTER_ADDR": variables.get("MASTER_ADDR", re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])),
        "MASTER_PORT": variables.get("MASTER_PORT", str(port)),
    }
