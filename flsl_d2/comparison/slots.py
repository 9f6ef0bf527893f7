"""Where jobs run at the same time: on GPUs of their own, or on the cores of a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from flsl_d2.errors import InputError

__all__ = ["Slot", "make_slots"]


@dataclass(frozen=True)
class Slot:
    """Room for one job.

    Attributes:
        environment: variables that keep the job to its share of the machine.
        num_processes: what the job's tool gets as ``--num-gpus``.
    """

    environment: dict[str, str]
    num_processes: int = 1


def make_slots(device: str, num_gpus: int = 1, gpus_per_job: int = 1) -> list[Slot]:
    """Share the machine among jobs.

    Args:
        device: ``cuda`` or ``cpu``, what the jobs compute on.
        num_gpus: GPUs to use, of those that CUDA_VISIBLE_DEVICES leaves; on the CPU, processes.
        gpus_per_job: how many of them each job gets.

    Raises:
        InputError: counts or a device that this machine does not have.
    """
    if gpus_per_job < 1 or num_gpus < gpus_per_job:
        raise InputError(
            f"{num_gpus} GPUs with {gpus_per_job} for each job leave no job any; "
            "give --num-gpus of at least --gpus-per-job."
        )
    count = num_gpus // gpus_per_job
    if not device.startswith("cuda"):
        environment = {}
        if num_gpus > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Every process would otherwise take all cores, and they would wait for one another.
            environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // num_gpus, 1))
        return [Slot(environment, gpus_per_job)] * count
    available = torch.cuda.device_count()
    if available < num_gpus:
        raise InputError(
            f"the jobs are for {num_gpus} GPU(s), but PyTorch sees {available} here; ask for "
            "fewer, check CUDA_VISIBLE_DEVICES, or compute on the CPU (sweep: train.device=cpu, "
            "compare: --device cpu)."
        )
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",") if listed else [str(i) for i in range(available)]
    shares = [names[i * gpus_per_job : (i + 1) * gpus_per_job] for i in range(count)]
    return [Slot({"CUDA_VISIBLE_DEVICES": ",".join(share)}, gpus_per_job) for share in shares]
