"""Comparison of encoders by the same evaluations: ``python -m flsl_d2.studies.compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from flsl_d2.engine.command_line import (
    add_option,
    add_overrides,
    described_parser,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.errors import InputError
from flsl_d2.studies.encoders import read_encoders
from flsl_d2.studies.evaluations import chosen_evaluations
from flsl_d2.studies.plots import draw_measures
from flsl_d2.studies.study import (
    add_study_options,
    finish,
    place_of,
    run_study,
    section,
    sections_of,
    token_section,
    write_draws,
)
from flsl_d2.studies.table import results_table

DESCRIPTION = "Evaluate a list of encoders alike, and put the results into one table and one page."
EXAMPLES = """examples:
  two weight files, a model of timm and an untrained encoder, by measures of frozen features:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --weights dino=dino.pth \\
      --weights timm:vit_small_patch16_dinov3 --measures knn_segmentation,cluster_quality \\
      --train pennfudan_train --val pennfudan_val --seeds 0,1,2 --output output/comparison
  Mask R-CNN from each as well, three seeds, on eight GPUs:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --seeds 0,1,2 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 --gpus-per-job 8 \\
      --detection-override dataloader.train.total_batch_size=16 --output output/comparison
  the same with 1, 5 and 10 percent of the labels, as jobs of a Slurm cluster:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --seeds 0,1,2 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --label-fraction 0.01,0.05,0.1 \\
      --cluster slurm --cluster-option slurm_partition=gpu --gpus-per-job 8 --num-gpus 8 \\
      --device cuda --output output/few_labels

Interrupted, the same command goes on; encoders and evaluations may be added to it. A weight file
or an evaluation that fails is a failed cell with its reason, and the others go on.
docs/COMPARE.md explains the table."""


def comparison_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add_study_options(parser)
    add_option(parser, "--seeds", default=[0], help="seeds of all evaluations (default: 0)")
    add_option(parser, "--device", type=str)  # a cluster's nodes may have what is not here
    add_overrides(parser, "changes to the detection configs, like --detection-override")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison that a command line describes."""
    run_tool(run_comparison, parse_tool_arguments(comparison_parser(), arguments))


def run_comparison(
    args: argparse.Namespace,
    title: str = "Comparison of encoders",
    intro: Sequence[str] = (),
    first: Sequence[dict[str, Any]] = (),
    last: Sequence[dict[str, Any]] = (),
) -> None:
    """Run the jobs that are not done yet, and write the tables and the page.

    Writes below ``output``: ``table.csv``, ``table.md``, ``table.tex``, ``index.html``,
    ``plots/*.png``, ``pictures/*.png``, ``jobs/``, ``encoders/``, and with ``--label-fraction``
    ``label_curves.csv`` and ``subsets/``.

    Args:
        title: title of the page.
        intro: sentences above those on seeds.
        first: sections of the page before the others (:func:`section`).
        last: sections after them.

    Raises:
        InputError: no encoders or evaluations, or data that no encoder can be evaluated on.
        WorkerError: some cells of the table failed; everything else is done and written.
    """
    args.detection_override += args.opts
    evaluations = chosen_evaluations(args, args.device)
    if not evaluations:
        raise InputError(
            "there is nothing to evaluate; give --train and --val, --detection or --davis-root."
        )
    place = place_of(args, args.device)
    encoders = read_encoders(args.weights)
    subjects = [
        e.subject({"encoder": e.name}, evaluations, args.seeds, args.output) for e in encoders
    ]
    write_draws(evaluations, args.seeds, args.output)
    stages = [evaluation.name for evaluation in evaluations]
    records, table = run_study(
        args.output, place, subjects, stages, lambda found: results_table(subjects, found, stages)
    )
    columns = ["encoder", "source", "sha256", "architecture"]
    finish(
        args.output,
        table,
        records,
        subjects,
        title=title,
        intro=[
            *intro,
            "All encoders had the same data, budget and seeds "
            f"({', '.join(map(str, args.seeds))}). With several seeds: mean ± standard deviation "
            "of the sample.",
        ],
        sections=[
            *first,
            section("Measures", draw_measures(table, args.output / "plots")),
            *sections_of(args.output, args.pictures, evaluations, subjects, records, table),
            *token_section(encoders, evaluations, args),
            *last,
        ],
        columns=columns,
        rows=[[*s.labels.values(), *(s.about[c] for c in columns[1:])] for s in subjects],
    )


if __name__ == "__main__":
    main()
