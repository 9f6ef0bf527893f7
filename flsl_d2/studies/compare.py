"""Comparison of encoders by the same evaluations: ``python -m flsl_d2.studies.compare``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

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
from flsl_d2.evaluation import extract_tokens
from flsl_d2.evaluation.features import frozen_encoder
from flsl_d2.files import write_text
from flsl_d2.images.reader import read_image
from flsl_d2.studies.encoders import ComparedEncoder, read_encoders
from flsl_d2.studies.evaluations import (
    DetectionEvaluation,
    EncoderFile,
    add_evaluation_options,
    chosen_evaluations,
)
from flsl_d2.studies.jobs import Record, make_slots, versions
from flsl_d2.studies.plots import draw_measures, overlaid_curves, plot_file
from flsl_d2.studies.runner import run_jobs
from flsl_d2.studies.tables import Subject, Table, results_table
from flsl_d2.visualization import comparison_figure, describe_encoder
from flsl_d2.visualization.detections import choose_records, detections_beside_ground_truth
from flsl_d2.visualization.html import render

DESCRIPTION = "Evaluate a list of encoders alike, and put the results into one table and one page."
EXAMPLES = """examples:
  two weight files, a model of timm and an untrained encoder, by measures of frozen features:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --weights dino=dino.pth \\
      --weights timm:vit_small_patch16_dinov3 --measures knn_segmentation,cluster_quality \\
      --train pennfudan_train --val pennfudan_val --output output/comparison
  Mask R-CNN from each as well, three seeds, on eight GPUs:
    tools/compare.py --weights random --weights flsl=teacher_backbone.pth --seeds 0,1,2 \\
      --detection configs/coco/mask_rcnn_flsl_vit_s16_1x.py --num-gpus 8 --gpus-per-job 8 \\
      --detection-override dataloader.train.total_batch_size=16 --output output/comparison

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
        help=ENCODERS,
    )
    add_evaluation_options(parser)
    parser.add_argument("--eval", action="append", default=[], help=argparse.SUPPRESS)
    add_option(parser, "--seeds", default=[0], help="seeds of all evaluations (default: 0)")
    add_option(parser, "--output", required=True, help="folder of everything that is written")
    for name in ("--device", "--num-gpus", "--gpus-per-job"):
        add_option(parser, name)
    add_defaults(parser, ("--pictures", 3, "images to show the encoders on; 0: none"))
    add_overrides(parser, "changes to the detection configs, like --detection-override")
    run_tool(run_comparison, parse_tool_arguments(parser, arguments))


def run_comparison(args: argparse.Namespace) -> None:
    """Run the jobs that are not done yet, and write the tables and the page.

    Writes below ``output``: ``table.csv``, ``table.md``, ``table.tex``, ``index.html``,
    ``plots/*.png``, ``pictures/*.png``, ``jobs/``, ``encoders/``.

    Raises:
        InputError: no encoders or evaluations, or data that no encoder can be evaluated on.
        WorkerError: some cells of the table failed; everything else is done and written.
    """
    for text in args.eval:  # the earlier form of --measures, --detection and --davis-root
        kind, equals, value = text.partition("=")
        if equals and kind == "detection":
            args.detection.append(value)
        elif equals and kind == "davis":
            args.davis_root = Path(value)
        else:
            args.measures = [*(args.measures or []), *comma_separated(text)]
    args.detection_override += args.opts
    evaluations = chosen_evaluations(args, args.device)
    if not evaluations:
        raise InputError(
            "there is nothing to evaluate; give --train and --val, --detection or --davis-root."
        )
    slots = make_slots(args.device, args.num_gpus, args.gpus_per_job)
    for evaluation in evaluations:
        evaluation.check()
    encoders = read_encoders(args.weights)
    subjects = [
        e.subject({"encoder": e.name}, evaluations, args.seeds, args.output) for e in encoders
    ]
    names = [evaluation.name for evaluation in evaluations]
    # All encoders pass one evaluation before the next, so that the first columns fill up early.
    jobs = [job for name in names for subject in subjects for job in subject.jobs.get(name, ())]
    print(
        f"{len(encoders)} encoders x ({', '.join(names)}) x {len(args.seeds)} seed(s): "
        f"{len({job.key for job in jobs})} jobs in {args.output}",
        flush=True,
    )
    for encoder in encoders:
        if encoder.failure:
            print(f"{encoder.name} is left out: {encoder.failure}", flush=True)

    def write_tables(records: dict[str, Record]) -> Table:
        table = results_table(subjects, records, stages=names)
        table.write(args.output, "table", latex=True)
        return table

    records = run_jobs(jobs, args.output, slots, write_tables)
    table = write_tables(records)
    tokens, shown = None, [e.shown_dataset for e in evaluations if e.shown_dataset]
    if shown and args.pictures:
        tokens = args.output / "pictures" / "tokens.png"
        _draw_tokens(encoders, args.seeds[0], args.output, shown[0], args.pictures, tokens)
    columns = ("source", "sha256", "architecture")
    page = render(
        "comparison.html.j2",
        title="Comparison of encoders",
        seeds=args.seeds,
        table=table,
        bars=draw_measures(table, args.output / "plots"),
        detections=[
            _detection_section(args.output, args.pictures, evaluation, subjects, records)
            for evaluation in evaluations
            if isinstance(evaluation, DetectionEvaluation)
        ],
        tokens=tokens,
        dataset=shown[0] if shown else "",
        encoder_columns=["encoder", *columns],
        encoder_rows=[[s.labels["encoder"], *(s.about[c] for c in columns)] for s in subjects],
        versions=versions(),
        details=[
            (
                f"{job.kind}: {job.label} ({record.status}, {record.seconds:.0f} s)",
                json.dumps(dict(job.settings), indent=1),
            )
            for subject in subjects
            for stage in subject.jobs.values()
            for job in stage
            for record in [records[job.key]]
        ],
    )
    write_text(args.output / "index.html", page)
    print(f"\n{table.markdown()}\ntables and index.html: {args.output}")
    cells = [row.cell(measure) for row in table.rows for measure in table.measures]
    failed = sum(bool(cell.failures) for cell in cells)
    if failed:
        raise WorkerError(
            f"{failed} of {len(cells)} cells of the table failed; the same command tries again."
        )


def _draw_tokens(
    encoders: Sequence[ComparedEncoder],
    seed: int,
    output: Path,
    dataset: str,
    count: int,
    path: Path,
) -> None:
    """Draw a row for each image: the image, then components and clusters of each encoder."""
    records = choose_records(DatasetCatalog.get(dataset), count)
    images = [read_image(record["file_name"]) for record in records]
    described = []
    for each in encoders:
        if each.failure:
            continue
        file: EncoderFile = each.file(seed, output / "encoders")
        encoder = frozen_encoder(file.path, seed)
        side = max(min(_TOKENS * encoder.patch_size, _MAX_SHORT_SIDE), encoder.patch_size)
        features = [extract_tokens(encoder, image, side) for image in images]
        described.append(describe_encoder(each.name, features, (_SCALE,)))
    points = [(i, 0.5, 0.5) for i in range(len(images))]
    comparison_figure(described, points, path, _SCALE, maps=("pca", "clusters"))


def _detection_section(
    output: Path,
    num_pictures: int,
    evaluation: DetectionEvaluation,
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
) -> dict[str, Any]:
    """Draw the curves of fine-tuning, and detections of one seed of each encoder."""
    folders: dict[str, Path] = {}
    pictures: dict[str, Path] = {}
    for subject in subjects:
        done = [j for j in subject.jobs.get(evaluation.name, ()) if records[j.key].status == "done"]
        folders |= {job.label: output / "jobs" / job.key for job in done}
        for job in done[: min(1, num_pictures)]:
            detections = folders[job.label] / "inference" / "coco_instances_results.json"
            if detections.is_file():
                path = pictures[job.label] = output / "pictures" / f"{job.key}.png"
                shown = evaluation.shown_dataset
                detections_beside_ground_truth(shown, str(detections), path, num_pictures)
    curves = plot_file(output / "plots", f"{evaluation.name}_curves")
    files = {label: folder / "metrics.json" for label, folder in folders.items()}
    overlaid_curves(files, _CURVES, curves, "Fine-tuning")
    title = f"{evaluation.name}: {evaluation.config_file}"
    return {"title": title, "curves": curves, "pictures": pictures}


if __name__ == "__main__":
    main()
