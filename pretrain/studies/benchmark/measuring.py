"""Timing and memory of several functions in turn, and the table and JSON of the results."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import runpy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils.benchmark.utils.timer import timer
from tqdm import tqdm

from flsl_d2.engine.gpus import usable_cores
from flsl_d2.errors import InputError
from flsl_d2.files import write_text


@dataclass
class Timing:
    """Seconds of each repetition of a function, and its largest GPU memory alone.

    The function is None where it does not fit into the GPU's memory; the memory is None on a CPU.
    """

    function: Callable[[], Any] | None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Median duration; None without measurements."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def peak_gib(self) -> float | str | None:
        """Peak memory in GiB as a table shows it."""
        if self.function is None:
            return "out of memory"
        return self.peak_bytes / 2**30 if self.peak_bytes else None

    def rate(self, count: int) -> float | None:
        """Return the throughput in items a second, for ``count`` items a repetition."""
        return count / self.median if self.median else None

    def speed_against(self, other: Timing) -> float | None:
        """Return the speed as a multiple of another's: the median ratio over the rounds.

        A load that slows the machine for a while slows both functions of a round.
        """
        pairs = zip(other.seconds, self.seconds, strict=False)
        return statistics.median([a / b for a, b in pairs] or [0.0]) or None


def time_in_turn(
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    repeats: int,
    warmup: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Time functions in turn (A, B, A, B), so that other load on the machine affects all alike.

    On a GPU each function is first made and run alone, to measure its memory; functions that do
    not fit are left out. Each is run ``warmup`` times before its first measurement.
    """
    peaks = {name: _peak_alone(make, device) for name, make in makers.items()}
    timings = {
        name: Timing(None if peaks[name] is None else make(), [], peaks[name] or None)
        for name, make in makers.items()
    }
    for number in tqdm(range(-warmup, repeats), desc="benchmark", unit="round", disable=None):
        for timing in timings.values():
            seconds = seconds_of(timing.function) if timing.function else 0.0
            if timing.function and number >= 0:
                timing.seconds.append(seconds)
    return timings


def _peak_alone(make: Callable[[], Callable[[], Any]], device: torch.device) -> int | None:
    """Return the GPU memory of making and running a function; None if it does not fit, 0 on a CPU.

    It is run twice, because optimisers take their memory in the first step.
    """
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        seconds_of(make(), 2)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(function: Callable[[], Any], times: int = 1) -> float:
    """Return the duration of some calls, from an idle device to an idle device."""
    start = timer()  # waits for the device
    for _ in range(times):
        function()
    return timer() - start


def stored_for_backward(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Count the bytes that a forward pass keeps for its backward pass, without the weights.

    They are the part of a step's memory that grows with the batch, and can be counted on a CPU as
    well. Memory that several saved tensors share counts once.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # otherwise its address could be used again and counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def reference_function(path: str, name: str) -> Callable[..., Any]:
    """Return a function of a Python file, which is run; InputError if there is none."""
    content = runpy.run_path(path) if Path(path).is_file() else {}
    if name not in content:
        raise InputError(
            f"--reference-module is '{path}', which is no Python file with a function {name}; see "
            "tools/benchmark.py --help for what it needs."
        )
    function: Callable[..., Any] = content[name]
    return function


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the software that the figures were measured on."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n") if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": (names or [platform.machine()])[0],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows, values by column, as a GitHub table."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g", missingval="-")


def report(
    title: str, rows: Sequence[dict[str, Any]], args: argparse.Namespace, **more: Any
) -> None:
    """Print rows under a title, and write them with machine and arguments to ``args.json``."""
    print(f"{title}\n{table(rows)}")
    if args.json:
        given = {key: str(value) for key, value in vars(args).items() if key != "function"}
        about = {"machine": machine(torch.device(getattr(args, "device", "cpu")))}
        content = about | {"rows": rows, "arguments": given} | more
        write_text(args.json, json.dumps(content, indent=1) + "\n")
