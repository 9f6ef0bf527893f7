"""What a benchmark prints and writes: a table of ratios, and JSON that says on what it ran."""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor
from tqdm import tqdm

from flsl_d2.engine.launch import usable_cores
from flsl_d2.errors import InputError

__all__ = [
    "Timing",
    "machine",
    "print_table",
    "reference_function",
    "seconds_of",
    "stored_for_backward",
    "time_in_turn",
    "write_json",
]


@dataclass
class Timing:
    """Repeated measurements of one thing.

    Attributes:
        function: the thing; None where the GPU is too small for it, and there are no seconds then.
        seconds: of each repetition, in the order of measurement.
        peak_bytes: the most memory that the GPU holds for it alone; None on a CPU.
    """

    function: Callable[[], Any] | None
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Median of the seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def peak_gib(self) -> float | str | None:
        """Peak memory for a table."""
        if self.function is None:
            return "out of memory"
        return self.peak_bytes / 2**30 if self.peak_bytes else None

    def rate(self, count: int) -> float | None:
        """So many things a repetition, as things per second."""
        return count / self.median if self.seconds else None

    def speed_against(self, other: Timing) -> float | None:
        """How many times as fast as another, measured in turn: the median over the rounds.

        What slows the machine for a while slows both of a round, so their ratio stays.
        """
        if not (self.seconds and other.seconds):
            return None
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def time_in_turn(
    makers: Mapping[str, Callable[[], Callable[[], Any]]],
    repeats: int,
    warmup: int,
    device: torch.device,
) -> dict[str, Timing]:
    """Time functions A, B, A, B, ..., so that what the machine does beside them hits all alike.

    On a GPU each is first made and run by itself, for its memory; those that do not fit are left
    out.

    Args:
        makers: what makes each function, by name.
        repeats: measurements of each.
        warmup: runs of each before the first measurement (compilation, caches, clocks).
        device: is waited for before and after each run.
    """
    if device.type == "cuda":
        peaks = {name: _peak_alone(make, device) for name, make in makers.items()}
    else:
        peaks = dict.fromkeys(makers, 0)
    timings = {
        name: Timing(None if peaks[name] is None else make(), peak_bytes=peaks[name] or None)
        for name, make in makers.items()
    }
    timed = [timing for timing in timings.values() if timing.function]
    rounds = tqdm(range(-warmup, repeats), desc="benchmark", unit="round", disable=None)
    for number in rounds:
        for timing in timed:
            seconds = seconds_of(timing.function, 1, device)
            if number >= 0:
                timing.seconds.append(seconds)
    return timings


def _peak_alone(make: Callable[[], Callable[[], Any]], device: torch.device) -> int | None:
    """Peak of making it and running it twice, as optimisers take memory in the first step only."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        function = make()
        seconds_of(function, 2, device)
    except torch.cuda.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(device) - before


def seconds_of(function: Callable[[], Any], times: int, device: torch.device) -> float:
    """How long so many calls take, from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stored_for_backward(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the model's own weights.

    It is the part of a step's memory that grows with the batch, and can be counted on a CPU, too.
    Memory that several saved tensors share counts once.

    Args:
        forward: runs the forward pass; its result is kept alive while counting.
        model: whose parameters and buffers do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # a freed address would be used again and counted once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def reference_function(path: str, name: str) -> Callable[..., Any]:
    """Function ``name`` of the Python file ``path``.

    Raises:
        InputError: no such file, or no such function in it.
    """
    if not Path(path).is_file():
        raise InputError(f"--reference-module is '{path}', which is no file; give a Python file.")
    spec = importlib.util.spec_from_file_location("benchmark_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if function is None:
        raise InputError(
            f"--reference-module '{path}' has no function {name}; see "
            "tools/benchmark.py --help for what it needs."
        )
    return function


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(": ", 1)[1] for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a Markdown table; a value that is None was not measured."""
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    for line in (columns, ["-" * width for width in widths], *cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |")


def write_json(path: str | None, device: torch.device, **content: Any) -> None:
    """Write the figures with the machine; nothing where there is no path."""
    if path:
        text = json.dumps({"machine": machine(device), **content}, indent=1)
        Path(path).write_text(text + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
