"""What a benchmark prints and writes: a table of ratios, and JSON that says on what it ran."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from flsl_d2.engine.launch import usable_cores

__all__ = ["machine", "print_table", "write_json"]


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
