"""Page of a comparison: table, bars, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog

from flsl_d2.data.images import read_image
from flsl_d2.evaluation import extract_tokens
from flsl_d2.experiments.encoders import ComparedEncoder
from flsl_d2.experiments.evaluations import DetectionEvaluation, Evaluation
from flsl_d2.experiments.jobs import Record, versions
from flsl_d2.experiments.plots import draw_measures, overlaid_curves, plot_file
from flsl_d2.experiments.tables import Subject, Table
from flsl_d2.files import write_text
from flsl_d2.visualization import (
    comparison_figure,
    describe_encoder,
    detections_beside_ground_truth,
)
from flsl_d2.visualization.detections import choose_records
from flsl_d2.visualization.html import render
from flsl_d2.weights import build_encoder

__all__ = ["Comparison", "token_pictures", "write_comparison_page"]

# Scale of the mean-shift that makes the clusters, times sqrt(D): wide kernels merge everything.
_SCALE = 1.0
# Tokens on the shorter side: fine enough to look at, and clustered within seconds.
_TOKENS = 32
_CURVES = {"total_loss": "loss of fine-tuning", "bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class Comparison:
    """Encoders, evaluations and resources of a comparison.

    Attributes:
        encoders: name and source of each, see
            :func:`flsl_d2.experiments.encoders.read_encoders`.
        evaluations: evaluations of each encoder.
        output: folder of everything that is written.
        seeds: seeds of the evaluations and of the weights of untrained encoders.
        device: ``cuda`` or ``cpu``.
        num_gpus: number of GPUs to use; on the CPU, processes.
        gpus_per_job: number of GPUs of each job.
        num_pictures: number of images that the encoders are shown on; 0 for none.
    """

    encoders: Sequence[tuple[str, str]]
    evaluations: Sequence[Evaluation]
    output: Path
    seeds: Sequence[int] = (0,)
    device: str = "cpu"
    num_gpus: int = 1
    gpus_per_job: int = 1
    num_pictures: int = 3


def token_pictures(encoders: Mapping[str, str], dataset: str, num_images: int, path: Path) -> None:
    """Draw a row for each image: the image, then components and clusters of each encoder.

    Args:
        encoders: weight files by name.
        dataset: registered name; the images are spread evenly over those with objects.
        num_images: number of rows.
        path: PNG file to write.
    """
    records = choose_records(DatasetCatalog.get(dataset), num_images)
    images = [read_image(record["file_name"]) for record in records]
    described = []
    for name, file in encoders.items():
        encoder = build_encoder(file)
        short_side = _TOKENS * encoder.patch_size
        features = [extract_tokens(encoder, image, short_side) for image in images]
        described.append(
            describe_encoder(
                name,
                [each.tokens for each in features],
                [each.grid for each in features],
                [each.image for each in features],
                (_SCALE,),
            )
        )
    points = [(i, 0.5, 0.5) for i in range(len(images))]
    comparison_figure(described, images, points, path, _SCALE, maps=("pca", "clusters"))


def write_comparison_page(
    comparison: Comparison,
    encoders: Sequence[ComparedEncoder],
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
    table: Table,
) -> None:
    """Write ``index.html``: the table, what was run, bars, curves and pictures side by side."""
    tokens, dataset = None, ""
    shown = [e.shown_dataset for e in comparison.evaluations if e.shown_dataset]
    if shown and comparison.num_pictures:
        tokens, dataset = comparison.output / "pictures" / "tokens.png", shown[0]
        files = {
            encoder.name: encoder.file(comparison.seeds[0], comparison.output / "encoders").path
            for encoder in encoders
            if not encoder.failure
        }
        token_pictures(files, dataset, comparison.num_pictures, tokens)
    columns = ("source", "sha256", "architecture")
    jobs = [job for s in subjects for stage in s.jobs.values() for job in stage]
    page = render(
        "comparison.html.j2",
        title="Comparison of encoders",
        seeds=comparison.seeds,
        table=table,
        bars=draw_measures(table, comparison.output / "plots"),
        detections=[
            _detection_section(comparison, evaluation, subjects, records)
            for evaluation in comparison.evaluations
            if isinstance(evaluation, DetectionEvaluation)
        ],
        tokens=tokens,
        dataset=dataset,
        encoder_columns=["encoder", *columns],
        encoder_rows=[[s.labels["encoder"], *(s.about[c] for c in columns)] for s in subjects],
        versions=versions(),
        details=[
            (
                f"{job.kind}: {job.label} ({record.status}, {record.seconds:.0f} s)",
                json.dumps(dict(job.settings), indent=1),
            )
            for job in jobs
            for record in [records[job.key]]
        ],
    )
    write_text(comparison.output / "index.html", page)


def _detection_section(
    comparison: Comparison,
    evaluation: DetectionEvaluation,
    subjects: Sequence[Subject],
    records: Mapping[str, Record],
) -> dict[str, Any]:
    """Draw the curves of fine-tuning, and detections of one seed of each encoder."""
    folders: dict[str, Path] = {}
    pictures: dict[str, Path] = {}
    for subject in subjects:
        done = [j for j in subject.jobs.get(evaluation.name, ()) if records[j.key].status == "done"]
        folders |= {job.label: comparison.output / "jobs" / job.key for job in done}
        for job in done[: min(1, comparison.num_pictures)]:
            detections = folders[job.label] / "inference" / "coco_instances_results.json"
            if detections.is_file():
                pictures[job.label] = comparison.output / "pictures" / f"{job.key}.png"
                detections_beside_ground_truth(
                    evaluation.shown_dataset,
                    str(detections),
                    pictures[job.label],
                    comparison.num_pictures,
                )
    curves = plot_file(comparison.output / "plots", f"{evaluation.name}_curves")
    files = {label: folder / "metrics.json" for label, folder in folders.items()}
    overlaid_curves(files, _CURVES, curves, "Fine-tuning")
    title = f"{evaluation.name}: {evaluation.config_file}"
    return {"title": title, "curves": curves, "pictures": pictures}
