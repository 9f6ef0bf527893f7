"""The page of a comparison: table, bars, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog

from flsl_d2.data.images import read_image
from flsl_d2.evaluation import extract_tokens
from flsl_d2.experiments.encoders import Encoder
from flsl_d2.experiments.evaluations import DetectionEvaluation, Evaluation, FeatureEvaluation
from flsl_d2.experiments.jobs import Record, versions
from flsl_d2.experiments.page import Page
from flsl_d2.experiments.plots import bars, overlaid_curves
from flsl_d2.experiments.tables import Subject, Table
from flsl_d2.visualization import (
    cluster_labels,
    cluster_overlay,
    detections_beside_ground_truth,
    pca_rgb,
)
from flsl_d2.visualization.detections import choose_records
from flsl_d2.visualization.figures import new_figure, save_figure, show_image
from flsl_d2.weights import build_encoder

__all__ = [
    "Comparison",
    "detection_pictures",
    "token_pictures",
    "write_comparison_page",
]

# Of the mean-shift that makes the clusters, times sqrt(D): wide kernels merge everything.
_SCALE = 1.0
# Tokens on the shorter side: as fine as eyes want it, and clustered within seconds.
_TOKENS = 32
_PANEL_INCHES = 2.5


def token_pictures(encoders: Mapping[str, str], dataset: str, num_images: int, path: Path) -> None:
    """Rows of images; a column for the image, and two for each encoder: components and clusters.

    Args:
        encoders: weight files by name.
        dataset: registered name; the images are spread evenly over those with objects.
        num_images: rows.
        path: the PNG to write.
    """
    records = choose_records(DatasetCatalog.get(dataset), num_images)
    images = [read_image(record["file_name"], "RGB") for record in records]
    heights = [_PANEL_INCHES * image.shape[0] / image.shape[1] + 0.25 for image in images]
    figure = new_figure(_PANEL_INCHES * (1 + 2 * len(encoders)), 0.5 + sum(heights))
    axes = figure.subplots(
        len(images), 1 + 2 * len(encoders), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    axes[0, 0].set_title("image", fontsize=10)
    for row, image in zip(axes, images, strict=True):
        show_image(row[0], image)
    for place, (name, file) in enumerate(encoders.items()):
        encoder = build_encoder(file)
        axes[0, 1 + 2 * place].set_title(f"{name}: components", fontsize=10)
        axes[0, 2 + 2 * place].set_title(f"{name}: clusters", fontsize=10)
        for row, image in zip(axes, images, strict=True):
            tokens, grid, seen = extract_tokens(encoder, image, _TOKENS * encoder.patch_size)
            labels = cluster_labels(tokens, grid, _SCALE / encoder.embed_dim**0.5)
            show_image(row[1 + 2 * place], pca_rgb(tokens, grid, seen.shape[:2]))
            count = f"{labels.max() + 1} clusters"
            show_image(row[2 + 2 * place], cluster_overlay(seen, labels, grid), count)
    save_figure(figure, path)


def detection_pictures(
    dataset: str, folders: Mapping[str, Path], num_images: int, output: Path
) -> dict[str, Path]:
    """Detections beside the ground truth, a picture for each detector, of the same images.

    Args:
        dataset: registered name of what was evaluated on.
        folders: of the runs, by label.
        num_images: rows of each picture.
        output: folder of the pictures.

    Returns:
        The pictures by label.
    """
    drawn = {}
    for label, folder in folders.items():
        results = folder / "inference" / "coco_instances_results.json"
        if results.is_file():
            path = output / f"{folder.name}.png"
            detections_beside_ground_truth(dataset, str(results), path, num_images)
            drawn[label] = path
    return drawn


_CURVES = {"total_loss": "loss of fine-tuning", "bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class Comparison:
    """What to run.

    Attributes:
        encoders: specifications, see :func:`flsl_d2.experiments.encoders.read_encoders`.
        evaluations: what to do with each.
        output: folder of everything.
        seeds: of the evaluations, and of the weights of untrained encoders.
        device: ``cuda`` or ``cpu``.
        num_gpus: to use; on the CPU, processes.
        gpus_per_job: for each job.
        num_pictures: images that the encoders are shown on; 0 for none.
    """

    encoders: Sequence[str]
    evaluations: Sequence[Evaluation]
    output: Path
    seeds: Sequence[int] = (0,)
    device: str = "cpu"
    num_gpus: int = 1
    gpus_per_job: int = 1
    num_pictures: int = 3


def write_comparison_page(
    comparison: Comparison,
    encoders: Sequence[Encoder],
    subjects: Sequence[Subject],
    records: dict[str, Record],
    table: Table,
) -> None:
    """Write ``index.html``: the table, what was run, bars, curves and pictures side by side."""
    page = Page("Comparison of encoders")
    page.text(
        f"Every encoder had the same data, seeds ({', '.join(map(str, comparison.seeds))}) and "
        "budget. With several seeds: mean ± standard deviation of the sample."
    )
    page.table(table)
    page.heading("Measures")
    page.pictures(_bars(table, comparison.output / "plots"), captions=False)
    for evaluation in comparison.evaluations:
        if isinstance(evaluation, DetectionEvaluation):
            _detection_section(page, comparison, evaluation, subjects, records)
    dataset = _dataset_of_pictures(comparison.evaluations)
    if dataset and comparison.num_pictures:
        path = comparison.output / "pictures" / "tokens.png"
        token_pictures(
            {
                encoder.name: encoder.file(comparison.seeds[0], comparison.output / "encoders").path
                for encoder in encoders
                if not encoder.failure
            },
            dataset,
            comparison.num_pictures,
            path,
        )
        page.heading(f"Tokens on {dataset}")
        page.pictures({"principal components as colours, and mean-shift clusters": path}, 1150)
    _what_was_run(page, subjects, records)
    page.write(comparison.output / "index.html")


def _bars(table: Table, folder: Path) -> dict[str, Path]:
    drawn = {}
    for measure in table.measures:
        if any(row.cell(measure).values for row in table.rows):
            path = folder / f"{measure.name.replace('/', '_').replace(' ', '_')}.png"
            bars(table, measure, path)
            drawn[measure.name] = path
    return drawn


def _detection_section(
    page: Page,
    comparison: Comparison,
    evaluation: DetectionEvaluation,
    subjects: Sequence[Subject],
    records: dict[str, Record],
) -> None:
    folders, shown = {}, {}
    for subject in subjects:
        done = [j for j in subject.jobs.get(evaluation.name, ()) if records[j.key].status == "done"]
        mine = {job.label: comparison.output / "jobs" / job.key for job in done}
        folders |= mine
        shown |= dict(list(mine.items())[:1])  # detections of one seed are enough to look at
    page.heading(f"{evaluation.name}: {evaluation.config_file}")
    curves = comparison.output / "plots" / f"{evaluation.name}_curves.png"
    files = {label: folder / "metrics.json" for label, folder in folders.items()}
    if overlaid_curves(files, _CURVES, curves, "Fine-tuning"):
        page.pictures({"curves": curves}, 1150)
    if comparison.num_pictures:
        drawn = detection_pictures(
            evaluation.test_dataset(),
            shown,
            comparison.num_pictures,
            comparison.output / "pictures",
        )
        page.pictures(drawn, width=560)


def _dataset_of_pictures(evaluations: Sequence[Evaluation]) -> str:
    for evaluation in evaluations:
        if isinstance(evaluation, FeatureEvaluation):
            return evaluation.val
        if isinstance(evaluation, DetectionEvaluation):
            return evaluation.test_dataset()
    return ""


def _what_was_run(page: Page, subjects: Sequence[Subject], records: dict[str, Record]) -> None:
    page.heading("What was run")
    names = ("source", "sha256", "architecture")
    page.records(
        ["encoder", *names],
        [[subject.labels["encoder"], *(subject.about[n] for n in names)] for subject in subjects],
    )
    page.text(", ".join(f"{name} {version}" for name, version in versions().items()))
    for subject in subjects:
        for jobs in subject.jobs.values():
            for job in jobs:
                record = records[job.key]
                head = f"{job.kind}: {job.label} ({record.status}, {record.seconds:.0f} s)"
                page.details(head, json.dumps(dict(job.settings), indent=1))
