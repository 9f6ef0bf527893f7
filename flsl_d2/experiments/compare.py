"""Comparison of encoders by the same evaluations: ``python -m flsl_d2.experiments.compare``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    add_overrides,
    comma_separated,
    described_parser,
    named_weights,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.engine.launch import WorkerError
from flsl_d2.errors import InputError
from flsl_d2.experiments.compare_page import Comparison, write_comparison_page
from flsl_d2.experiments.encoders import ComparedEncoder, read_encoders
from flsl_d2.experiments.evaluations import add_evaluation_options, chosen_evaluations
from flsl_d2.experiments.jobs import Job, Record, make_slots, versions
from flsl_d2.experiments.runner import run_jobs
from flsl_d2.experiments.tables import Subject, results_table

__all__ = ["Comparison", "main", "run_comparison"]

DESCRIPTION = "Evaluate a list of encoders alike, and put the results into one table and one page."
EXAMPLES = """examples:
  two weight files and an untrained encoder, by measures of frozen features:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --weights dino=dino.pth \\
      --measures knn_segmentation,cluster_quality --train pennfudan_train --val pennfudan_val \\
      --output output/comparison
  Mask R-CNN from each as well, three seeds, on eight GPUs:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --seeds 0,1,2 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 --gpus-per-job 8 \\
      --detection-override dataloader.train.total_batch_size=16 --output output/comparison

Interrupted, the same command goes on; encoders and evaluations may be added to it. A weight file
or an evaluation that fails is a failed cell with its reason, and the others go on.
docs/COMPARE.md explains the table."""


def run_comparison(comparison: Comparison) -> None:
    """Run the jobs that are not done yet, and write the tables and the page.

    Writes below ``output``: ``table.csv``, ``table.md``, ``table.tex``, ``index.html``,
    ``plots/*.png``, ``pictures/*.png``, ``jobs/``, ``encoders/``.

    Raises:
        InputError: no encoders or evaluations, or data that no encoder can be evaluated on.
        WorkerError: some cells of the table failed; everything else is done and written.
    """
    if not comparison.evaluations:
        raise InputError(
            "there is nothing to evaluate; give --train and --val, --detection or --davis-root."
        )
    slots = make_slots(comparison.device, comparison.num_gpus, comparison.gpus_per_job)
    for evaluation in comparison.evaluations:
        evaluation.check()
    encoders = read_encoders(comparison.encoders)
    subjects = [_subject(encoder, comparison) for encoder in encoders]
    names = [evaluation.name for evaluation in comparison.evaluations]
    # All encoders pass one evaluation before the next, so that the first columns fill up early.
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


def _subject(encoder: ComparedEncoder, comparison: Comparison) -> Subject:
    """Make the row of an encoder, with the jobs of all evaluations and seeds."""
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


def _print_plan(
    comparison: Comparison, encoders: Sequence[ComparedEncoder], jobs: Sequence[Job]
) -> None:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that a command line describes."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_option(
        parser,
        "--weights",
        ["--encoder"],
        type=named_weights,
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="encoder: file or URL of any known layout, or 'random': untrained, with the "
        "architecture of the first file ('random:NAME': of that one); may be repeated",
    )
    add_evaluation_options(parser)
    parser.add_argument("--eval", action="append", default=[], help=argparse.SUPPRESS)
    add_option(parser, "--seeds", default=[0], help="seeds of all evaluations (default: 0)")
    add_option(parser, "--output", required=True, help="folder of everything that is written")
    for name in ("--device", "--num-gpus", "--gpus-per-job"):
        add_option(parser, name)
    add_defaults(parser, ("--pictures", 3, "images to show the encoders on; 0: none"))
    add_overrides(parser, "changes to the detection configs, like --detection-override")
    run_tool(_run, parse_tool_arguments(parser, arguments))


def _run(args: argparse.Namespace) -> None:
    for text in args.eval:  # the earlier form of --measures, --detection and --davis-root
        kind, equals, value = text.partition("=")
        if equals and kind == "detection":
            args.detection.append(value)
        elif equals and kind == "davis":
            args.davis_root = Path(value)
        else:
            args.measures = [*(args.measures or []), *comma_separated(text)]
    args.detection_override += args.opts
    run_comparison(
        Comparison(
            encoders=args.weights,
            evaluations=chosen_evaluations(args, args.device),
            output=args.output,
            seeds=args.seeds,
            device=args.device,
            num_gpus=args.num_gpus,
            gpus_per_job=args.gpus_per_job,
            num_pictures=args.pictures,
        )
    )


if __name__ == "__main__":
    main()
