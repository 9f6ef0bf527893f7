"""All benchmarks of a machine with GPUs, unattended: ``make gpu-benchmarks``.

Each row is a job of its own (:mod:`flsl_d2.studies.runner`): one that fails or takes too long is a
row that says so, the others follow, the results are up to date after every row, and the same
command continues what was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flsl_d2.engine.command_line import add_defaults, described_parser, run_tool
from flsl_d2.engine.launch import WorkerError
from flsl_d2.errors import InputError
from flsl_d2.files import writable_folder, write_text
from flsl_d2.studies.identity import versions
from flsl_d2.studies.jobs import Job, Outcome, Record
from flsl_d2.studies.machine import Machine
from flsl_d2.studies.runner import run_jobs
from flsl_d2.visualization.figures import new_figure, save_figure
from pretrain.studies.benchmark.measuring import machine, table

BATCHES = (64, 256)
PROCESSES = (1, 2, 4, 8)
VARIANTS = "eager,packed,compiled,graphs,eager+compiled,cropped on device"
DESCRIPTION = "Measure speed and memory on the GPUs of this machine."
_RESULT = "row.json"


def benchmark_rows(images: str, num_gpus: int, reference: str = "") -> dict[str, list[str]]:
    """List the rows for a machine: arguments after ``python``, by name.

    Args:
        images: folder of JPEG files, or of shards; empty leaves out what reads files.
        num_gpus: number of GPUs.
        reference: Python file with a reference to compare with; empty for none.
    """
    compared = ("--reference-module", reference) if reference else ()
    cuda, files = ("--device", "cuda"), ("--images", images)
    rows: dict[str, list[str]] = {}

    def add(name: str, *arguments: str, processes: int = 1) -> None:
        torchrun = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
        start = torchrun if processes > 1 else ()
        rows[name] = ["-m", *start, "pretrain.studies.benchmark", *arguments]

    if images:
        add("data", "data", *files, *compared)
    for batch in BATCHES:
        options = ("--batch-size", str(batch), "--variants", VARIANTS, *compared)
        add(f"step of {batch}", "pretrain-step", *cuda, *options)
    for model in ("base_p16", "small_p8"):
        add(
            f"step of {model}",
            *("pretrain-step", *cuda, "--batch-size", "64"),
            *("--variants", "packed,packed+checkpointed"),
            *("--config-file", f"configs/pretrain/flsl_vit_{model}_in1k.py"),
            "model.backbone.use_act_checkpoint=False",
        )
    for count in [count for count in PROCESSES if count <= num_gpus]:
        for batch in BATCHES:
            options = ("--batch-size", str(batch), "--repeats", "50")
            add(f"{count} GPUs, {batch} each", "processes", *cuda, *options, processes=count)
    if images:
        options = ("--batch-size", "256", "--workers", "16", "--repeats", "50", *compared)
        overrides = ("views.on_device=crops", "train.compile=True")
        add("end to end", "end-to-end", *files, *cuda, *options, *overrides)
    for positions in ((), ("--rel-pos",)):
        options = ("--model", "b", "--size", "1024", "--batch-size", "2", *positions)
        add(f"detection{''.join(positions)}", "detection", *cuda, *options)
    growth = (
        "--batch-size",
        "64",
        "--batches",
        "16,32,64,128,256",
        "--plot",
        "{folder}/growth.png",
    )
    add("growth", "scaling", *cuda, *growth)
    return rows


def run_rows(rows: Mapping[str, Sequence[str]], output: Path, seconds: float) -> int:
    """Run rows and write ``results.json``, ``results.md`` and ``speed.png`` after each.

    Args:
        rows: arguments after ``python`` by name; ``{folder}`` is the row's own folder.
        output: folder to write to.
        seconds: time limit of a row.

    Returns:
        Number of rows that failed.
    """

    def job_of(name: str, arguments: Sequence[str]) -> Job:
        def command(folder: Path, _: int) -> list[str]:
            own = [argument.replace("{folder}", str(folder)) for argument in arguments]
            return [*own, "--json", str(folder / _RESULT)]

        # Figures of another machine, version or commit are other figures.
        settings = {"arguments": list(arguments), "machine": hardware, **versions()}
        return Job("row", name, settings, command, _read_speed, limit=seconds)

    hardware = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    del hardware["date"]
    jobs = {name: job_of(name, arguments) for name, arguments in rows.items()}

    def write(records: Mapping[str, Record]) -> None:
        results = []
        for name, job in jobs.items():
            record = records.get(job.key)
            done = record is not None and record.status == "done"
            content = (
                json.loads((output / "jobs" / job.key / _RESULT).read_text()) if done else None
            )
            status = "not run yet" if record is None else record.error or "ok"
            took = record.seconds if record else None
            results.append({"row": name, "seconds": took, "status": status, "result": content})
        write_text(output / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(output / "results.md", _tables(results, hardware))
        _draw(results, output / "speed.png")

    records = run_jobs(list(jobs.values()), output, Machine(), write)
    write(records)
    return sum(record.status != "done" for record in records.values())


def _read_speed(folder: Path) -> Outcome:
    rows = json.loads((folder / _RESULT).read_text())["rows"]
    return Outcome(
        {f"{i} images/s": row["images/s"] for i, row in enumerate(rows) if "images/s" in row}
    )


def _tables(results: Sequence[dict[str, Any]], hardware: Mapping[str, Any]) -> str:
    """Write one table of all rows, and the table of each."""
    overview = [{key: r[key] for key in ("row", "seconds", "status")} for r in results]
    parts = ["# Benchmarks", ", ".join(f"{k} {v}" for k, v in hardware.items()), table(overview)]
    several = [r["result"]["rows"][0] for r in results if _is_of_processes(r)]
    parts += ["## Processes", table(several)] if several else []
    for each in results:
        if each["result"] and not _is_of_processes(each):
            parts += [f"## {each['row']}", table(each["result"]["rows"])]
    return "\n\n".join(parts) + "\n"


def _is_of_processes(result: dict[str, Any]) -> bool:
    return bool(result["result"]) and "processes" in result["result"]["rows"][0]


def _draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw images a second over the number of processes, and where all would be as fast as one."""
    by_batch: dict[int, dict[int, float]] = {}
    for each in filter(_is_of_processes, results):
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
    save_figure(figure, path)


def _main(images: str, output: str, reference: str, minutes: float) -> None:
    if not torch.cuda.is_available():
        raise InputError("no GPU is visible; tools/benchmark.py measures on a CPU.")
    if images and not Path(images).is_dir():
        raise InputError(f"--images is '{images}', which is no folder; give one of JPEG files.")
    rows = benchmark_rows(images, torch.cuda.device_count(), reference)
    failed = run_rows(rows, writable_folder(output, "--output"), 60 * minutes)
    print(f"{len(rows)} rows, {failed} failed; see {output}/results.md")
    if failed:
        raise WorkerError(
            f"{failed} of {len(rows)} rows failed; the same command tries them again."
        )


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
