"""Frozen-feature measures of a weight file as a table and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from flsl_d2.errors import InputError
from flsl_d2.evaluation.frozen_encoder import RANDOM, frozen_encoder, usable_device
from flsl_d2.evaluation.measures import MEASURES, measure_all
from flsl_d2.files import writable_folder, write_text

__all__ = ["measures_table", "report_features"]

logger = logging.getLogger(__name__)


def report_features(
    weights: str,
    train: str,
    val: str,
    measures: Sequence[str] = tuple(MEASURES),
    json_file: Path | None = None,
    **settings: Any,
) -> None:
    """Measure an encoder and print the table.

    Args:
        weights: see :func:`flsl_d2.evaluation.frozen_encoder.frozen_encoder`.
        train: see :func:`flsl_d2.evaluation.measures.measure_all`.
        val: see there.
        measures: see there.
        json_file: where scores, failures and settings are written, too.
        **settings: ``seed``, ``device``, ``max_images`` and options of `measure_all`.

    Raises:
        InputError: nothing can be measured, or, after the table, a measure has failed.
    """
    if json_file is not None:
        writable_folder(json_file.absolute().parent)
    usable_device(settings.get("device", "cpu"))
    encoder = frozen_encoder(weights, settings.get("seed", 0))
    if weights == RANDOM:
        logger.warning("The encoder is an untrained ViT-S/16: its scores are a floor, no result.")
    results, failures = measure_all(encoder, train, val, measures, **settings)
    print(measures_table(measures, results, failures))
    if json_file is not None:
        named = {"weights": weights, "train": train, "val": val, "measures": list(measures)}
        content = {"settings": named | settings, "results": results, "failures": failures}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(measures)} measures failed ({', '.join(failures)}): the "
            "reasons stand below the table; correct them, or choose others with --measures."
        )


def measures_table(
    measures: Sequence[str], results: Mapping[str, float], failures: Mapping[str, str]
) -> str:
    """One line a score, by measure; failed ones say so, with the reasons below.

    Args:
        measures: that were asked for, in order.
        results: as of :func:`flsl_d2.evaluation.measures.measure_all`.
        failures: likewise.
    """
    lines = []
    for measure in measures:
        if measure in failures:
            lines.append((measure, "", "failed"))
        for name, value in results.items():
            if name.startswith(f"{measure}/"):
                lines.append((measure, name.removeprefix(f"{measure}/"), f"{value:.2f}"))
    # A measure's name stands once, in its first line.
    shown = [
        (line[0] if index == 0 or lines[index - 1][0] != line[0] else "", *line[1:])
        for index, line in enumerate(lines)
    ]
    table = tabulate(
        shown,
        headers=("measure", "score", "value"),
        colalign=("left", "left", "right"),
        disable_numparse=True,
    )
    reasons = [f"{measure} failed: {reason}" for measure, reason in failures.items()]
    return "\n".join([table, *reasons])
