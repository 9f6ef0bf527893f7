"""Frozen-feature measures of a weight file as a table and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

from flsl_d2.errors import InputError
from flsl_d2.evaluation.cluster_quality import ClusterQuality
from flsl_d2.evaluation.explained_variance import ExplainedVariance
from flsl_d2.evaluation.features import RANDOM, frozen_encoder, usable_device
from flsl_d2.evaluation.knn_box import BoxKnn
from flsl_d2.evaluation.labelled_images import LabelledDataset, load_labelled
from flsl_d2.evaluation.samples import Measure, Options, encode, progress
from flsl_d2.evaluation.segmentation import KnnSegmentation, LinearSegmentation
from flsl_d2.files import writable_folder, write_text
from flsl_d2.modeling import FLSLViT

__all__ = [
    "MEASURES",
    "measure_all",
    "measure_features",
    "measures_table",
    "prepare_measures",
    "report_features",
]

MEASURES: dict[str, Callable[..., Measure]] = {
    "knn_box": BoxKnn,
    "knn_segmentation": KnnSegmentation,
    "linear_segmentation": LinearSegmentation,
    "cluster_quality": ClusterQuality,
    "explained_variance": ExplainedVariance,
}


def measure_features(
    encoder: FLSLViT,
    train: str,
    val: str,
    measures: Sequence[str] = tuple(MEASURES),
    seed: int = 0,
    device: str = "cpu",
    max_images: int | None = None,
    **options,
) -> dict[str, float]:
    """Scores of a frozen encoder.

    Args:
        encoder: any; moved to the device, and left in the mode it was in.
        train: registered data set that labels are learned from.
        val: registered data set that is scored.
        measures: names in `MEASURES`.
        seed: of everything that is drawn. The global generators are not touched.
        device: to encode and compute on.
        max_images: bound of the images of each data set, drawn by the seed; None for all.
        **options: fields of :class:`flsl_d2.evaluation.samples.Options`.

    Returns:
        ``{"knn_segmentation/mIoU": 41.2, ...}``, in percent where that is customary.

    Raises:
        InputError: of the first measure that these data, this encoder or options do not allow.
    """
    results, failures = measure_all(
        encoder, train, val, measures, seed, device, max_images, **options
    )
    for name, reason in failures.items():
        raise InputError(f"{name}: {reason}")
    return results


def measure_all(
    encoder: FLSLViT,
    train: str | LabelledDataset,
    val: str | LabelledDataset,
    measures: Sequence[str] = tuple(MEASURES),
    seed: int = 0,
    device: str = "cpu",
    max_images: int | None = None,
    **options,
) -> tuple[dict[str, float], dict[str, str]]:
    """As :func:`measure_features`, but a measure that fails does not stop the others.

    Data sets may be given as :func:`prepare_measures` has loaded them; ``max_images`` then has no
    effect.

    Returns:
        The scores, and for every measure that failed the reason.

    Raises:
        InputError: a measure or an option of that name does not exist.
    """
    chosen = _checked(measures, options)
    try:
        sets = _loaded(train, max_images, seed), _loaded(val, max_images, seed)
    except InputError as error:
        return {}, dict.fromkeys(measures, str(error))
    running = _Running(failures={}, measures={})
    for name in measures:
        with running.dropped_if_failing(name):
            running.measures[name] = MEASURES[name](encoder, *sets, chosen, seed)
    with _in_evaluation(encoder.to(device)):
        return running.run(encoder, *sets, chosen.short_side), running.failures


def prepare_measures(
    train: str,
    val: str,
    measures: Sequence[str] = tuple(MEASURES),
    seed: int = 0,
    max_images: int | None = None,
    **options,
) -> tuple[LabelledDataset, LabelledDataset]:
    """Find out before long work whether names and data can be used; see :func:`measure_features`.

    Returns:
        The data sets, to measure with repeatedly: a large annotation file takes a while to read.

    Raises:
        InputError: naming what cannot be used.
    """
    _checked(measures, options)
    return load_labelled(train, max_images, seed), load_labelled(val, max_images, seed)


def _loaded(data: str | LabelledDataset, max_images: int | None, seed: int) -> LabelledDataset:
    return load_labelled(data, max_images, seed) if isinstance(data, str) else data


class _Running:
    """Measures that are still without a fault, and the reasons of the others."""

    def __init__(self, measures: dict[str, Measure], failures: dict[str, str]) -> None:
        self.measures, self.failures = measures, failures

    @contextmanager
    def dropped_if_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.failures[name] = str(error)
            self.measures.pop(name, None)

    def run(
        self, encoder: FLSLViT, train: LabelledDataset, val: LabelledDataset, short_side: int
    ) -> dict[str, float]:
        """Show every measure the training images, then the validation images; its scores."""
        self._show(encoder, train, short_side, "observe_train")
        self._each("fit")
        self._show(encoder, val, short_side, "observe_val")
        results = self._each("results")
        return {
            f"{name}/{key}": value
            for name, scores in results.items()
            for key, value in scores.items()
        }

    def _show(
        self, encoder: FLSLViT, dataset: LabelledDataset, short_side: int, method: str
    ) -> None:
        if not self.measures:
            return
        samples = encode(encoder, dataset, short_side)
        try:
            for sample in progress(samples, len(dataset.images), f"Measuring {dataset.name}"):
                self._each(method, sample)
        except InputError as error:  # of an image that cannot be encoded
            self.failures |= dict.fromkeys(self.measures, str(error))
            self.measures.clear()

    def _each(self, method: str, *arguments: object) -> dict[str, Mapping[str, float]]:
        returned = {}
        for name, measure in list(self.measures.items()):
            with self.dropped_if_failing(name):
                returned[name] = getattr(measure, method)(*arguments)
        return returned


def _checked(measures: Sequence[str], given: Mapping[str, object]) -> Options:
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        what = f"there is no measure {unknown[0]!r}" if unknown else "no measure was named"
        raise InputError(f"{what}; use some of {', '.join(MEASURES)}.")
    known = [field.name for field in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(
            f"the measures have no option {unknown[0]!r}; there are {', '.join(known)}."
        )
    return Options(**given)


@contextmanager
def _in_evaluation(encoder: FLSLViT) -> Iterator[None]:
    was_training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(was_training)


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
        weights: see :func:`flsl_d2.evaluation.features.frozen_encoder`.
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
