"""From the command line of ``tools/compare.py`` to a comparison."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from flsl_d2.engine.launch import WorkerError
from flsl_d2.errors import InputError
from flsl_d2.experiments.compare_page import Comparison, write_comparison_page
from flsl_d2.experiments.encoders import Encoder, read_encoders
from flsl_d2.experiments.evaluations import (
    DavisEvaluation,
    DetectionEvaluation,
    Evaluation,
    FeatureEvaluation,
    check_measures,
)
from flsl_d2.experiments.jobs import Job, Record, make_slots, versions
from flsl_d2.experiments.runner import run_jobs
from flsl_d2.experiments.tables import Subject, results_table

__all__ = [
    "Comparison",
    "comma_separated",
    "compare_command",
    "run_comparison",
    "seeds_of",
]


def comma_separated(text: str) -> list[str]:
    """``a,b`` as a list, without what is there twice."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def seeds_of(text: str) -> list[int]:
    """``0,1`` as a list of seeds, each once.

    Raises:
        InputError: something else than whole numbers from 0 on.
    """
    parts = comma_separated(text)
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--seeds {text!r} is not a list of whole numbers; write --seeds 0,1.")
    return [int(part) for part in parts]


def run_comparison(comparison: Comparison) -> None:
    """Run what is missing, and write the tables and the page.

    Writes below ``output``: ``table.csv``, ``table.md``, ``table.tex``, ``index.html``,
    ``plots/*.png``, ``pictures/*.png``, ``jobs/``, ``encoders/``.

    Raises:
        InputError: no encoders or evaluations, or data that no encoder can be evaluated on.
        WorkerError: some cells of the table failed; everything else is done and written.
    """
    if not comparison.evaluations:
        raise InputError("there is nothing to evaluate; give --eval knn_segmentation, for example.")
    slots = make_slots(comparison.device, comparison.num_gpus, comparison.gpus_per_job)
    for evaluation in comparison.evaluations:
        evaluation.check()
    encoders = read_encoders(comparison.encoders)
    subjects = [_subject(encoder, comparison) for encoder in encoders]
    names = [evaluation.name for evaluation in comparison.evaluations]
    # One evaluation of all encoders after the other: the first columns are complete early.
    jobs = [job for name in names for subject in subjects for job in subject.jobs.get(name, ())]
    _print_plan(comparison, encoders, jobs)

    def write_tables(records: dict[str, Record]) -> None:
        results_table(subjects, records, stages=names).write(comparison.output, "table", latex=True)

    records = run_jobs(jobs, comparison.output, slots, write_tables)
    write_tables(records)
    table = results_table(subjects, records, stages=names)
    write_comparison_page(comparison, encoders, subjects, records, table)
    print(f"\n{table.markdown()}\ntables and index.html: {comparison.output}")
    cells = [row.cell(measure) for row in table.rows for measure in table.measures]
    failed = sum(bool(cell.failures) for cell in cells)
    if failed:
        raise WorkerError(
            f"{failed} of {len(cells)} cells of the table failed; the same command tries again."
        )


def _subject(encoder: Encoder, comparison: Comparison) -> Subject:
    folder = comparison.output / "encoders"
    jobs: dict[str, list[Job]] = {}
    if not encoder.failure:
        files = [encoder.file(seed, folder) for seed in comparison.seeds]
        jobs = {e.name: [e.job(file) for file in files] for e in comparison.evaluations}
    about = {
        "source": encoder.source,
        "sha256": encoder.sha256,
        "architecture": json.dumps(encoder.architecture),
        "seeds": ",".join(map(str, comparison.seeds)),
        "folders": " ".join(dict.fromkeys(job.key for stage in jobs.values() for job in stage)),
        **versions(),
    }
    return Subject({"encoder": encoder.name}, jobs, about, encoder.failure)


def _print_plan(comparison: Comparison, encoders: Sequence[Encoder], jobs: Sequence[Job]) -> None:
    evaluations = ", ".join(evaluation.name for evaluation in comparison.evaluations)
    count = len({job.key for job in jobs})
    print(
        f"{len(encoders)} encoders x ({evaluations}) x {len(comparison.seeds)} seed(s): "
        f"{count} jobs in {comparison.output}",
        flush=True,
    )
    for encoder in encoders:
        if encoder.failure:
            print(f"{encoder.name} is left out: {encoder.failure}", flush=True)


def compare_command(args: argparse.Namespace, tools: Path) -> None:
    """Run the comparison that a command line asks for.

    Args:
        args: see ``tools/compare.py --help``.
        tools: folder of the command lines.

    Raises:
        InputError, WorkerError: see :func:`flsl_d2.experiments.compare.run_comparison`.
    """
    evaluations: list[Evaluation] = []
    for text in args.eval:
        evaluations += _evaluations(text, args, tools)
    names = [evaluation.name for evaluation in evaluations]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise InputError(f"--eval has {twice[0]} twice; name each evaluation once.")
    if args.overrides and not any(isinstance(e, DetectionEvaluation) for e in evaluations):
        raise InputError(
            f"override {args.overrides[0]!r} is for a detection config, and there is none; "
            "add --eval detection=CONFIG.py."
        )
    run_comparison(
        Comparison(
            encoders=args.encoder,
            evaluations=evaluations,
            output=args.output,
            seeds=seeds_of(args.seeds) or [0],
            device=args.device,
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
            num_pictures=args.pictures,
        )
    )


def _evaluations(text: str, args: argparse.Namespace, tools: Path) -> list[Evaluation]:
    kind, equals, value = text.partition("=")
    if equals and kind == "detection":
        several = sum(other.startswith("detection=") for other in args.eval) > 1
        name = f"detection {Path(value).stem}" if several else "detection"
        return [DetectionEvaluation(tools, value, args.overrides, args.device, name)]
    if equals and kind == "davis":
        return [DavisEvaluation(tools, value, args.device)]
    names = comma_separated(text)
    check_measures(names)
    if not args.train or not args.val:
        raise InputError(f"--eval {text} needs data; give --train NAME and --val NAME.")
    return [
        FeatureEvaluation(
            tools, name, args.train, args.val, args.device, args.max_images, args.short_side
        )
        for name in names
    ]
