"""Comparison of encoders by the same evaluations: ``python -m flsl_d2.studies.compare``.

A sweep (``pretrain.studies.sweep``) is a comparison whose encoders are pre-trained first, and has
options, jobs, table and page from here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from flsl_d2.engine.command_line import (
    add_option,
    add_overrides,
    described_parser,
    named_weights,
    number,
    parse_tool_arguments,
    run_tool,
)
from flsl_d2.engine.launch import WorkerError
from flsl_d2.errors import InputError
from flsl_d2.evaluation import extract_tokens
from flsl_d2.evaluation.features import frozen_encoder, read_for
from flsl_d2.files import writable_folder, write_text
from flsl_d2.studies.cluster import CLUSTERS, Cluster
from flsl_d2.studies.encoders import ComparedEncoder, read_encoders
from flsl_d2.studies.evaluations import (
    DetectionEvaluation,
    Evaluation,
    add_evaluation_options,
    chosen_evaluations,
)
from flsl_d2.studies.identity import versions
from flsl_d2.studies.jobs import Record
from flsl_d2.studies.machine import Machine
from flsl_d2.studies.plots import draw_measures, label_curves, overlaid_curves, plot_file
from flsl_d2.studies.runner import run_jobs
from flsl_d2.studies.table import Subject, Table, csv_text, results_table
from flsl_d2.visualization import comparison_figure, describe_encoder
from flsl_d2.visualization.detections import choose_records, detections_beside_ground_truth
from flsl_d2.visualization.html import render

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
ENCODERS = (
    "encoder: file or URL of any known layout, 'timm:NAME?key=value', or 'random': untrained, with "
    "the architecture of the first file ('random:NAME': of that one); may be repeated"
)
# Scale of the mean-shift that makes the clusters, times sqrt(D): wide kernels merge everything.
_SCALE = 1.0
# Tokens on the shorter side: fine enough to look at, and clustered within seconds.
_TOKENS, _MAX_SHORT_SIDE = 32, 512
_CURVES = {"total_loss": "loss of fine-tuning", "bbox/AP": "box AP", "segm/AP": "mask AP"}


def add_study_options(parser: argparse.ArgumentParser, weights: str = ENCODERS) -> None:
    """Add the options of encoders, evaluations, results and the place of the jobs."""
    add_option(
        parser,
        "--weights",
        type=named_weights,
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help=weights,
    )
    add_evaluation_options(parser)
    add_option(parser, "--output", required=True, help="folder of everything that is written")
    for name in ("--num-gpus", "--gpus-per-job"):
        add_option(parser, name)
    parser.add_argument(
        "--cluster", choices=CLUSTERS, help="hand the jobs to submitit: Slurm, or this machine"
    )
    parser.add_argument(
        "--cluster-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of submitit, such as slurm_partition=gpu or timeout_min=600; may be "
        "repeated",
    )
    text = "images to show encoders on; 0: none (default: 3)"
    parser.add_argument("--pictures", type=number(int, 0), default=3, help=text)


def place_of(args: argparse.Namespace, device: str) -> Machine | Cluster:
    """Return where the jobs of a command line run; InputError where that cannot be used."""
    if args.cluster_option and not args.cluster:
        raise InputError("--cluster-option is for --cluster; add --cluster slurm.")
    if args.cluster:
        given = (args.cluster_option, device, args.num_gpus, args.gpus_per_job)
        return Cluster(args.cluster, args.output, *given)
    return Machine(device, args.num_gpus, args.gpus_per_job)


def run_study(
    output: Path,
    place: Machine | Cluster,
    subjects: Sequence[Subject],
    stages: Sequence[str],
    make_table: Callable[[dict[str, Record]], Table],
    by_row: bool = False,
) -> tuple[dict[str, Record], Table]:
    """Run the jobs that are not done yet; the table is written anew whenever one has ended.

    All rows pass one stage before the next, so that the first columns fill up early; ``by_row``,
    one row passes all stages before the next.
    """

    def write(records: dict[str, Record]) -> Table:
        table = make_table(records)
        table.write(output)
        return table

    by_stage = [[subject.jobs.get(stage, ()) for stage in stages] for subject in subjects]
    ordered = by_stage if by_row else zip(*by_stage, strict=True)
    jobs = [job for group in ordered for own in group for job in own]
    count = len({job.key for job in jobs})
    print(f"{len(subjects)} rows x ({', '.join(stages)}): {count} jobs in {output}", flush=True)
    for subject in subjects:
        if subject.failure:
            name = next(iter(subject.labels.values()))
            print(f"{name} is left out: {subject.failure}", flush=True)
    records = run_jobs(jobs, output, place, write)
    return records, write(records)


def write_draws(evaluations: Sequence[Evaluation], seeds: Sequence[int], output: Path) -> None:
    """Write and print which labelled images the detectors of a share of them see."""
    writable_folder(output)
    few = [e for e in evaluations if isinstance(e, DetectionEvaluation) and e.share is not None]
    draws = [each.write_draw(output / "subsets", seed) for each in few for seed in seeds]
    for draw in dict.fromkeys(draws):
        print(draw, flush=True)


def sections_of(
    output: Path,
    num_pictures: int,
    evaluations: Sequence[Evaluation],
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
    table: Table,
) -> list[dict[str, Any]]:
    """Draw what the page shows of the detectors: AP by labelled images, curves, detections."""
    detectors = [e for e in evaluations if isinstance(e, DetectionEvaluation)]
    sections = []
    few = [each for each in detectors if each.share is not None]
    if few:
        names = [(each.detector, each.name, each.count) for each in few]
        rows, pictures = label_curves(table, names, output / "plots")
        heading = ["encoder", "detector", "images", "measure", "mean", "std", "seeds"]
        write_text(output / "label_curves.csv", csv_text([heading, *rows]))
        sections.append(section("AP by number of labelled images", pictures, 1150))
    for evaluation in [e for e in detectors if e.share is None] or few[-1:]:
        folders: dict[str, Path] = {}
        pictures = {}
        for subject in subjects:
            jobs = subject.jobs.get(evaluation.name, ())
            done = [job for job in jobs if records[job.key].status == "done"]
            folders |= {job.label: output / "jobs" / job.key for job in done}
            for job in done[: min(1, num_pictures)]:
                found = folders[job.label] / "inference" / "coco_instances_results.json"
                if found.is_file():
                    path = pictures[job.label] = output / "pictures" / f"{job.key}.png"
                    dataset = evaluation.shown_dataset
                    detections_beside_ground_truth(dataset, str(found), path, num_pictures)
        curves = plot_file(output / "plots", f"{evaluation.name}_curves")
        files = {label: folder / "metrics.json" for label, folder in folders.items()}
        overlaid_curves(files, _CURVES, curves, "Fine-tuning")
        title = f"{evaluation.name}: {evaluation.task.config_file}"
        sections += [
            section(title, {"curves": curves}, 1150),
            section("Detections", pictures, captions=True),
        ]
    return sections


def section(
    title: str,
    pictures: Mapping[str, Path],
    width: int = 560,
    texts: Sequence[str] = (),
    captions: bool = False,
) -> dict[str, Any]:
    """Make a section of a page: pictures by name, each up to a width in pixels."""
    given = {"title": title, "pictures": pictures, "width": width}
    return given | {"texts": texts, "captions": captions}


def token_section(
    encoders: Sequence[ComparedEncoder], evaluations: Sequence[Evaluation], args: Any
) -> list[dict[str, Any]]:
    """Draw a row for each image: the image, then components and clusters of each encoder."""
    dataset = next((e.shown_dataset for e in evaluations if e.shown_dataset), "")
    usable = [encoder for encoder in encoders if not encoder.failure]
    if not (dataset and args.pictures and usable):
        return []
    records = choose_records(DatasetCatalog.get(dataset), args.pictures)
    described = []
    for each in usable:
        file = each.file(args.seeds[0], args.output / "encoders")
        encoder = frozen_encoder(file.path, file.seed)
        side = max(min(_TOKENS * encoder.patch_size, _MAX_SHORT_SIDE), encoder.patch_size)
        images = (read_for(encoder.input_format, record["file_name"]) for record in records)
        features = [extract_tokens(encoder, image, side) for image in images]
        described.append(describe_encoder(each.name, features, (_SCALE,)))
    path = args.output / "pictures" / "tokens.png"
    points = [(i, 0.5, 0.5) for i in range(len(records))]
    comparison_figure(described, points, path, _SCALE, maps=("pca", "clusters"))
    text = "Principal components as colours, and mean-shift clusters."
    return [section(f"Tokens on {dataset}", {text: path}, 1150, [text])]


def finish(
    output: Path,
    table: Table,
    records: Mapping[str, Record],
    subjects: Sequence[Subject],
    **values: Any,
) -> None:
    """Write the page, with further values of ``study.html.j2``, and print the table.

    Raises:
        WorkerError: some cells of the table failed; everything else is done and written.
    """
    details = {}
    for job in (job for subject in subjects for stage in subject.jobs.values() for job in stage):
        record = records[job.key]
        heading = f"{job.kind}: {job.label} ({record.status}, {record.seconds:.0f} s)"
        details[job.key] = (heading, json.dumps(dict(job.settings), indent=1))
    page = render(
        "study.html.j2", table=table, versions=versions(), details=[*details.values()], **values
    )
    write_text(output / "index.html", page)
    print(f"\n{table.markdown()}\ntables and index.html: {output}")
    cells = [row.cell(measure) for row in table.rows for measure in table.measures]
    failed = [cell for cell in cells if cell.failures]
    if failed:
        raise WorkerError(
            f"{len(failed)} of {len(cells)} cells of the table failed "
            f"({failed[0].failures[0]}); the same command tries again."
        )


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

    ``intro`` are sentences of the page above those on seeds, ``first`` and ``last`` sections
    (:func:`section`) around the others. docs/COMPARE.md lists what is written below ``output``.

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
            f"All encoders had the same data, budget and seeds ({','.join(map(str, args.seeds))}). "
            "With several seeds: mean ± standard deviation of the sample.",
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
