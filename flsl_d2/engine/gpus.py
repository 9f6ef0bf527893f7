"""NVIDIA's driver and the GPU of a process."""

from __future__ import annotations

import shutil
import subprocess

import torch


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
    """Version of NVIDIA's driver, or None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip() or None
