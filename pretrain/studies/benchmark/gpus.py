"""All benchmarks of a machine with GPUs, unattended: ``make gpu-benchmarks``.

Each row is a job of its own (:mod:`flsl_d2.studies.runner`): one that fails or takes too long is a
row that says so, and the same command continues what was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
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
from pretrain.studies.benchmark.measuring import machine, table

BATCHES, PROCESSES = (64, 256), (1, 2, 4, 8)
VARIANTS = "eager,packed,compiled,graphs,eager+compiled,cropped on device"
DESCRIPTION = "Measure speed and memory on the GPUs of this machine."


def benchmark_rows(images: str, num_gpus: int, reference: str = "") -> dict[str, list[str]]:
    """List the rows for a machine: arguments of ``python -m``, by name.

    Without a folder of images, what reads files is left out; a reference is a Python file.
    """
    module = "pretrain.studies.benchmark"
    step, images_option = f"{module} pretrain-step --device cuda --batch-size", ["--images", images]
    compared = ["--reference-module", reference] if reference else []
    rows = {}
    if images:
        rows["data"] = [module, "data", *images_option, *compared]
        text = f"{module} end-to-end --device cuda --batch-size 256 --workers 16 --repeats 50"
        overrides = ["views.on_device=crops", "train.compile=True"]
        rows["end to end"] = [*text.split(), *images_option, *compared, *overrides]
    for batch in BATCHES:
        rows[f"step of {batch}"] = [*f"{step} {batch} --variants".split(), VARIANTS, *compared]
        for count in [count for count in PROCESSES if count <= num_gpus]:
            torchrun = f"torch.distributed.run --standalone --nproc-per-node={count} -m "
            text = f"{module} processes --device cuda --batch-size {batch} --repeats 50"
            rows[f"{count} GPUs, {batch} each"] = (torchrun * (count > 1) + text).split()
    for model in ("base_p16", "small_p8"):
        config = f"--config-file configs/pretrain/flsl_vit_{model}_in1k.py"
        variants = "--variants packed,packed+checkpointed model.backbone.use_act_checkpoint=False"
        rows[f"step of {model}"] = f"{step} 64 {config} {variants}".split()
    detection = f"{module} detection --device cuda --model b --size 1024 --batch-size 2"
    rows["detection"] = detection.split()
    rows["detection, relative positions"] = f"{detection} --rel-pos".split()
    text = f"{module} scaling --device cuda --batch-size 64 --batches 16,32,64,128,256"
    rows["growth"] = text.split()
    return rows


def run_rows(rows: Mapping[str, Sequence[str]], output: Path, seconds: float) -> int:
    """Run rows, write ``results.json`` and ``results.md`` after each, and count failures."""
    hardware = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    del hardware["date"]

    def result_of(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "row.json").read_text())
        return found

    def command(arguments: Sequence[str], folder: Path, _num_processes: int) -> list[str]:
        return ["-m", *arguments, "--json", str(folder / "row.json")]

    def outcome(folder: Path) -> Outcome:
        speeds = enumerate(row.get("images/s") for row in result_of(folder)["rows"])
        return Outcome({f"{i} images/s": speed for i, speed in speeds if speed})

    # Figures of another machine, version or commit are other figures.
    jobs = {
        name: Job(
            "row",
            name,
            {"arguments": list(arguments), "machine": hardware, **versions()},
            partial(command, arguments),
            outcome,
            limit=seconds,
        )
        for name, arguments in rows.items()
    }

    def write(records: Mapping[str, Record]) -> None:
        details: list[dict[str, Any]] = []
        for name, job in jobs.items():
            record = records.get(job.key, Record("not run yet"))
            row = {"row": name, "seconds": record.seconds, "status": record.error or record.status}
            done = record.status == "done"
            details.append(row | {"result": result_of(output / "jobs" / job.key) if done else None})
        write_text(output / "results.json", json.dumps(details, indent=1) + "\n")
        overview = [{k: v for k, v in each.items() if k != "result"} for each in details]
        about = ", ".join(f"{key} {value}" for key, value in hardware.items())
        parts = ["# Benchmarks", about, table(overview)]
        for each in [each for each in details if each["result"]]:
            parts += [f"## {each['row']}", table(each["result"]["rows"])]
        write_text(output / "results.md", "\n\n".join(parts) + "\n")

    records = run_jobs(list(jobs.values()), output, Machine(), write)
    write(records)
    return sum(record.status != "done" for record in records.values())


def _main(images: str, output: str, reference: str, minutes: float) -> None:
    if not torch.cuda.is_available():
        raise InputError("no GPU is visible; tools/benchmark.py measures on a CPU.")
    if images and not Path(images).is_dir():
        raise InputError(f"--images is '{images}', which is no folder; give one of JPEG files.")
    rows = benchmark_rows(images, torch.cuda.device_count(), reference)
    failed = run_rows(rows, writable_folder(output, "--output"), 60 * minutes)
    print(f"{len(rows)} rows, {failed} failed; see {output}/results.md")
    if failed:
        raise WorkerError(f"{failed} of {len(rows)} rows failed; the same command tries again.")


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
