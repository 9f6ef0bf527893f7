"""All benchmarks of a machine with GPUs, unattended: ``make gpu-benchmarks``.

Each row is a command in a process of its own. A row that fails or takes too long is a row that says
so, and the others follow. The results are up to date after every row.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from flsl_d2.engine.command_line import add_defaults, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder, write_text
from flsl_d2.visualization.figures import new_figure, save_figure

BENCHMARK = "pretrain.studies.benchmark"
BATCHES = (64, 256)
PROCESSES = (1, 2, 4, 8)
VARIANTS = "eager,packed,compiled,graphs,eager+compiled,cropped on device"
DESCRIPTION = "Measure speed and memory on the GPUs of this machine."


@dataclass(frozen=True)
class Row:
    """A benchmark of its own.

    Attributes:
        name: name in the table, and of the files of the row.
        command: command line, to which ``--json FILE`` is added.
    """

    name: str
    command: tuple[str, ...]


def benchmark_rows(images: str, num_gpus: int, reference: str = "") -> list[Row]:
    """List the rows for a machine.

    Args:
        images: folder of JPEG files, or of shards; empty leaves out what reads files.
        num_gpus: number of GPUs.
        reference: Python file with a reference to compare with; empty for none.
    """
    compared = ("--reference-module", reference) if reference else ()
    cuda = ("--device", "cuda")

    def row(name: str, *arguments: str, processes: int = 1) -> Row:
        start: tuple[str, ...] = (sys.executable, "-m")
        if processes > 1:
            torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
            start = (*start, *torchrun, "-m")
        return Row(name, (*start, BENCHMARK, *arguments))

    rows = []
    if images:
        rows.append(row("data", "data", "--images", images, *compared))
    for batch in BATCHES:
        arguments = ("--batch-size", str(batch), "--variants", VARIANTS, *compared)
        rows.append(row(f"step of {batch}", "pretrain-step", *cuda, *arguments))
    for model in ("base_p16", "small_p8"):
        arguments = (
            *("--batch-size", "64", "--variants", "packed,packed+checkpointed"),
            *("--config-file", f"configs/pretrain/flsl_vit_{model}_in1k.py"),
            "model.backbone.use_act_checkpoint=False",
        )
        rows.append(row(f"step of {model}", "pretrain-step", *cuda, *arguments))
    for processes in PROCESSES:
        if processes <= num_gpus:
            for batch in BATCHES:
                rows.append(
                    row(
                        f"{processes} GPUs, {batch} each",
                        *("processes", *cuda, "--batch-size", str(batch), "--repeats", "50"),
                        processes=processes,
                    )
                )
    if images:
        arguments = ("--batch-size", "256", "--workers", "16", "--repeats", "50", *compared)
        overrides = ("views.on_device=crops", "train.compile=True")
        files = ("--images", images)
        rows.append(row("end to end", "end-to-end", *files, *cuda, *arguments, *overrides))
    for positions in ((), ("--rel-pos",)):
        arguments = ("--model", "b", "--size", "1024", "--batch-size", "2", *positions)
        rows.append(row(f"detection{''.join(positions)}", "detection", *cuda, *arguments))
    growth = ("--batch-size", "64", "--batches", "16,32,64,128,256")
    rows.append(row("growth", "scaling", *cuda, *growth, "--plot", "{output}/growth.png"))
    return rows


def run_rows(rows: Sequence[Row], output: Path, seconds: float) -> list[dict[str, Any]]:
    """Run rows and write ``results.json``, ``results.md`` and ``speed.png`` after each.

    Args:
        rows: the rows.
        output: folder to write to.
        seconds: time limit of a row.

    Returns:
        For each row its ``name``, ``command``, ``seconds``, ``status`` (``ok`` or what went wrong),
        and ``result``, the content of its JSON file; None where it failed.
    """
    results: list[dict[str, Any]] = []
    for row in rows:
        print(f"{row.name} ...", flush=True)
        results.append(_run(row, output, seconds))
        print(f"{row.name}: {results[-1]['status']}", flush=True)
        write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(output / "results.md", _tables(results))
        _draw(results, output / "speed.png")
    return results


def _run(row: Row, output: Path, seconds: float) -> dict[str, Any]:
    base = output / row.name.replace(" ", "_").replace(",", "")
    result_file, log_file = base.with_suffix(".json"), base.with_suffix(".log")
    result_file.unlink(missing_ok=True)
    command = [part.replace("{output}", str(output)) for part in row.command]
    start = time.monotonic()
    with log_file.open("wb") as log:
        # In a session of its own, so that all processes of a row end with it.
        process = subprocess.Popen(
            [*command, "--json", str(result_file)], stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result, status = None, "ok"
    if code is None:
        status = f"ended after {seconds:g} s"
    elif code or not result_file.is_file():
        lines = log_file.read_text(errors="replace").split("\n")
        errors = [line for line in lines if "error" in line.lower()]
        last = next((line for line in reversed(errors or lines) if line.strip()), "no output")
        status = f"status {code}: {last.strip()[:200]}"
    else:
        result = json.loads(result_file.read_text())
    return {
        "name": row.name,
        "command": command,
        "seconds": round(time.monotonic() - start, 1),
        "status": status,
        "result": result,
    }


def _tables(results: Sequence[dict[str, Any]]) -> str:
    """Write one table of all rows, and the table of each."""
    overview = [{"row": r["name"], "seconds": r["seconds"], "status": r["status"]} for r in results]
    machines = [r["result"]["machine"] for r in results if r["result"]]
    parts = ["# Benchmarks", ""]
    if machines:
        parts += [", ".join(f"{key} {value}" for key, value in machines[0].items()), ""]
    parts += [tabulate(overview, headers="keys", tablefmt="github"), ""]
    several = [r["result"]["rows"][0] for r in results if r["result"] and _is_of_processes(r)]
    if several:
        parts += ["## Processes", "", _table(several), ""]
    for each in results:
        if each["result"] and not _is_of_processes(each):
            parts += [f"## {each['name']}", "", _table(each["result"]["rows"]), ""]
    return "\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g", missingval="-")


def _is_of_processes(result: dict[str, Any]) -> bool:
    return "processes" in result["command"]


def _draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw images a second over the number of processes, and where all would be as fast as one."""
    by_batch: dict[int, dict[int, float]] = {}
    for each in results:
        if each["result"] and _is_of_processes(each):
            row = each["result"]["rows"][0]
            speeds = by_batch.setdefault(each["result"]["batch_size"], {})
            speeds[row["processes"]] = row["images/s"]
    if not by_batch:
        return
    figure = new_figure(6, 4)
    axis = figure.subplots()
    for batch, speeds in sorted(by_batch.items()):
        (line,) = axis.plot(*zip(*sorted(speeds.items()), strict=True), "o-", label=f"{batch} each")
        if 1 in speeds:
            ideal = [speeds[1] * count for count in sorted(speeds)]
            axis.plot(sorted(speeds), ideal, ":", color=line.get_color())
    axis.set_xlabel("GPUs")
    axis.set_ylabel("images/s")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, str(path))


def _main(images: str, output: str, reference: str, minutes: float) -> None:
    if not torch.cuda.is_available():
        raise InputError("no GPU is visible; tools/benchmark.py measures on a CPU.")
    if images and not Path(images).is_dir():
        raise InputError(f"--images is '{images}', which is no folder; give one of JPEG files.")
    rows = benchmark_rows(images, torch.cuda.device_count(), reference)
    results = run_rows(rows, writable_folder(output, "--output"), 60 * minutes)
    failed = sum(result["status"] != "ok" for result in results)
    print(f"{len(results)} rows, {failed} failed; see {output}/results.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks as a command line describes."""
    parser = described_parser(DESCRIPTION)
    add_defaults(
        parser,
        ("--images", "", "folder of JPEG files; without it, nothing that reads files is measured"),
        ("--output", "output/benchmarks", "folder to write to"),
        ("--reference-module", "", "Python file to compare with, see tools/benchmark.py"),
        ("--minutes", 20.0, "time limit of a row"),
    )
    given = parser.parse_args(arguments)
    run_tool(_main, given.images, given.output, given.reference_module, given.minutes)


if __name__ == "__main__":
    main()
