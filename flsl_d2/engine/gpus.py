"""Devices that this machine has, and NVIDIA's driver."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from flsl_d2.errors import InputError


def usable_cores() -> int:
    """Count the CPU cores this process may use; a job may have fewer than the machine."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(min(cores, math.ceil(quota)), 1) if quota else cores


def _cpu_quota(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> float:
    """Cores that the control groups of this process grant it (versions 1 and 2); 0 for no limit."""
    quotas = []
    with suppress(OSError, ValueError):
        for line in Path(own).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            # Inside a container the files of its own group lie at the root.
            top = Path(root, "cpu") if controllers else Path(root)
            folder = top / group.strip("/")
            for each in (folder, *folder.parents):
                if each.is_relative_to(top):
                    quotas.append(_quota_of(each))
    return min((quota for quota in quotas if quota), default=0.0)


def _quota_of(folder: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period) if quota != "max" else 0.0
    with suppress(OSError, ValueError):
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        return max(int(quota), 0) / int(period)
    return 0.0


def check_device(device: str, num_processes: int = 1) -> None:
    """Check that this machine has a device, and enough of it for some processes.

    Raises:
        InputError: an unknown device, no or too few GPUs, or many more processes than cores.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise InputError(f"the device {device!r} is unknown; give cuda, cuda:0 or cpu.")
    if device == "cpu":
        if num_processes > max(usable_cores(), 2):
            raise InputError(
                f"--num-gpus is {num_processes}, and on the CPU that is the number of processes, "
                f"for which there are {usable_cores()} cores; leave it out, or give at most as "
                "many."
            )
        return
    if not torch.cuda.is_available():
        reason = unusable_driver()
        raise InputError(
            f"the device is {device!r}, but PyTorch sees no GPU here"
            f"{f' ({reason})' if reason else ''}; use the CPU: --device cpu, train.device=cpu, or "
            "MODEL.DEVICE cpu in a YAML config."
        )
    if num_processes > torch.cuda.device_count():
        raise InputError(
            f"--num-gpus is {num_processes}, but PyTorch sees {torch.cuda.device_count()} here; "
            "ask for fewer, or check CUDA_VISIBLE_DEVICES."
        )


def unusable_driver() -> str:
    """Say why PyTorch sees no GPU although a driver is there; empty where there is no driver."""
    driver = _driver()
    if driver is None:
        return ""
    if torch.version.cuda is None:
        return f"driver {driver} is there, but this PyTorch is for CPUs; install one for CUDA"
    return (
        f"driver {driver} is there, but PyTorch for CUDA {torch.version.cuda} cannot use it; CUDA "
        "13 needs driver 580 or newer and a card of compute capability 7.5 or newer, CUDA 12 needs "
        "525 or newer: update the driver, or install a PyTorch for an older CUDA"
    )


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip() or None
