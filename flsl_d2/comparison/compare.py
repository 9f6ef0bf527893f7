"""Encoders x evaluations: the same data, seeds and budget for each, one table and one page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from flsl_d2.comparison.compare_page import Comparison, write_comparison_page
from flsl_d2.comparison.encoders import Encoder, read_encoders
from flsl_d2.comparison.jobs import Job, Record
from flsl_d2.comparison.provenance import versions
from flsl_d2.comparison.results import Subject, results_table
from flsl_d2.comparison.runner import run_jobs
from flsl_d2.comparison.slots import make_slots
from flsl_d2.engine.launch import WorkerError
from flsl_d2.errors import InputError

__all__ = ["Comparison", "run_comparison"]


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
