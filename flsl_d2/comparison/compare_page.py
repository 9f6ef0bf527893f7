"""The page of a comparison: table, bars, curves and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flsl_d2.comparison.detection import DetectionEvaluation
from flsl_d2.comparison.encoders import Encoder
from flsl_d2.comparison.evaluations import Evaluation, FeatureEvaluation
from flsl_d2.comparison.jobs import Record
from flsl_d2.comparison.page import Page
from flsl_d2.comparison.pictures import detection_pictures, token_pictures
from flsl_d2.comparison.plots import bars, overlaid_curves
from flsl_d2.comparison.provenance import versions
from flsl_d2.comparison.results import Subject
from flsl_d2.comparison.table import Table

__all__ = ["Comparison", "write_comparison_page"]

_CURVES = {"total_loss": "loss of fine-tuning", "bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class Comparison:
    """What to run.

    Attributes:
        encoders: specifications, see :func:`flsl_d2.comparison.encoders.read_encoders`.
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
