"""Frozen-feature measures: their protocol, the registry, and running them together."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml
from tabulate import tabulate

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.classification import Classification
from flsl_d2.evaluation.cluster_quality import ClusterQuality
from flsl_d2.evaluation.clustering import Clustering
from flsl_d2.evaluation.correspondence import Correspondence
from flsl_d2.evaluation.discovery import Discovery
from flsl_d2.evaluation.explained_variance import ExplainedVariance
from flsl_d2.evaluation.features import RANDOM, frozen_encoder, usable_device
from flsl_d2.evaluation.in_context import InContext
from flsl_d2.evaluation.knn_box import BoxKnn
from flsl_d2.evaluation.labelled_images import LabelledDataset, load_labelled
from flsl_d2.evaluation.samples import (
    Options,
    Sample,
    Task,
    WholeSets,
    check_takes_rgb,
    encode_dataset,
    global_attention,
)
from flsl_d2.evaluation.segmentation import KnnSegmentation, LinearSegmentation
from flsl_d2.files import writable_folder, write_text
from flsl_d2.modeling import Encoder

logger = logging.getLogger(__name__)


class Measure(Protocol):
    """A measure of frozen features.

    It is made from a :class:`flsl_d2.evaluation.samples.Task`, looks at every training image,
    fits, looks at every validation image, and returns its scores. Several measures share one pass
    over the images, so that each image is encoded once, and samples are not kept. A measure that
    prepares images in its own way is a :class:`flsl_d2.evaluation.samples.WholeSets`. Every
    method, the constructor included, may raise ``InputError`` where the data or the encoder do not
    allow this measure.

    Attributes:
        name: name of the measure in :data:`MEASURES`, and start of the names of its scores.
        without_direction: scores for which neither high nor low is better; all others are the
            better the higher.
    """

    name: str
    without_direction: ClassVar[tuple[str, ...]]

    def __init__(self, task: Task) -> None: ...

    def observe_train(self, sample: Sample) -> None:
        """Take what is needed from a training image."""
        ...

    def fit(self) -> None:
        """Learn from the training images, all of which were seen."""
        ...

    def observe_val(self, sample: Sample) -> None:
        """Score a validation image."""
        ...

    def results(self) -> dict[str, float]:
        """Return the scores over all validation images, without the measure's name."""
        ...


MEASURES: dict[str, type[Measure]] = {
    kind.name: kind
    for kind in (
        BoxKnn,
        KnnSegmentation,
        LinearSegmentation,
        ClusterQuality,
        ExplainedVariance,
        Classification,
        InContext,
        Clustering,
        Discovery,
        Correspondence,
    )
}


def suitable_measures(dataset: LabelledDataset) -> list[str]:
    """Return the measures of one pass over the images that the labels of a data set allow."""
    if dataset.image_classes:
        return ["classification", "explained_variance"]
    shared = [name for name, kind in MEASURES.items() if not issubclass(kind, WholeSets)]
    return [name for name in shared if name != "classification"]


def better(score: str) -> str:
    """Return ``higher``, or nothing where neither high nor low is better or nobody knows.

    The score is given by its full name, such as ``knn_segmentation/mIoU``.
    """
    measure, _, key = score.partition("/")
    kind = MEASURES.get(measure)
    return "" if kind is None or key in kind.without_direction else "higher"


def omitted_scores(encoder: Encoder, measures: Sequence[str]) -> dict[str, str]:
    """Return the scores that have no meaning for an encoder, by full name, with the reason."""
    if "cluster_quality" not in measures or global_attention(encoder) is not None:
        return {}
    scores = ("ari_attention", "ari_foreground_attention", "boundary_f_attention")
    reason = "attention weights are read from an FLSLViT whose last block looks at all tokens"
    return dict.fromkeys((f"cluster_quality/{score}" for score in scores), reason)


def measure_features(
    encoder: Encoder,
    train: str,
    val: str,
    measures: Sequence[str] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Measure a frozen encoder.

    Args:
        encoder: moved to the device, and left in the mode it was in.
        train: data set that labels are learned from; see
            :func:`flsl_d2.evaluation.labelled_images.load_labelled`.
        val: data set that is scored.
        measures: names in `MEASURES`; by default :func:`suitable_measures` of ``train``.
        **settings: ``device``; ``seed`` for everything that is drawn (the global generators are
            not touched); ``max_images``, bound of the images of each data set, drawn by the seed;
            and fields of :class:`flsl_d2.evaluation.samples.Options`.

    Returns:
        ``{"knn_segmentation/mIoU": 41.2, ...}``, in percent where that is customary.

    Raises:
        InputError: the first measure that these data, this encoder or options do not allow.
    """
    results, failures = measure_all(encoder, train, val, measures, **settings)
    for name, reason in failures.items():
        raise InputError(f"{name}: {reason}")
    return results


def measure_all(
    encoder: Encoder,
    train: str | LabelledDataset,
    val: str | LabelledDataset,
    measures: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    max_images: int | None = None,
    **options: Any,
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure like :func:`measure_features`, and return the reasons of measures that failed.

    Data sets may be given as :func:`prepare_measures` has loaded them; ``max_images`` then has no
    effect. Only a name that does not exist raises InputError.
    """
    settings = _checked_options(measures, options)
    try:
        datasets = [
            load_labelled(data, max_images, seed) if isinstance(data, str) else data
            for data in (train, val)
        ]
    except InputError as error:
        return {}, dict.fromkeys(measures or MEASURES, str(error))
    task = Task(encoder, datasets[0], datasets[1], settings, seed)
    with _in_evaluation(encoder.to(device)):
        return run_measures(task, measures or suitable_measures(task.train))


def prepare_measures(
    train: str,
    val: str,
    measures: Sequence[str] | None = None,
    seed: int = 0,
    max_images: int | None = None,
    **options: Any,
) -> tuple[LabelledDataset, LabelledDataset]:
    """Check names and data before long work, and return the data sets to measure with.

    See :func:`measure_features` for the arguments.
    """
    _checked_options(measures, options)
    return load_labelled(train, max_images, seed), load_labelled(val, max_images, seed)


def run_measures(task: Task, names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Run measures; return the scores by full name, and the reasons of measures that failed."""
    running, failures = {}, {}
    for name in names:
        try:
            if issubclass(MEASURES[name], WholeSets):
                check_takes_rgb(task.encoder)
            running[name] = MEASURES[name](task)
        except InputError as error:
            failures[name] = str(error)

    def call_each(method: str, *arguments: Any) -> dict[str, Any]:
        returned = {}
        for name, measure in list(running.items()):
            try:
                returned[name] = getattr(measure, method)(*arguments)
            except InputError as error:
                failures[name] = str(error)
                del running[name]
        return returned

    for dataset, observe in ((task.train, "observe_train"), (task.val, "observe_val")):
        if observe == "observe_val":
            call_each("fit")
        if all(isinstance(measure, WholeSets) for measure in running.values()):
            continue
        samples = encode_dataset(task.encoder, dataset, task.options.short_side)
        try:
            for sample in progress(samples, f"measuring {dataset.name}", len(dataset.images)):
                call_each(observe, sample)
        except InputError as error:  # an image cannot be encoded, which stops all measures
            failures |= dict.fromkeys(running, str(error))
            running.clear()
    scores = call_each("results")
    return {f"{name}/{key}": v for name in scores for key, v in scores[name].items()}, failures


def _checked_options(names: Sequence[str] | None, given: Mapping[str, Any]) -> Options:
    unknown = [name for name in names or () if name not in MEASURES]
    if unknown or (names is not None and not names):
        problem = f"there is no measure {unknown[0]!r}" if unknown else "no measure was named"
        raise InputError(f"{problem}; use some of {', '.join(MEASURES)}.")
    known = [field.name for field in fields(Options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(
            f"the measures have no option {unknown[0]!r}; there are {', '.join(known)}."
        )
    return Options(**given)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings of protocols, each ``KEY=NUMBER`` or ``KEY=[NUMBER,NUMBER]``."""
    known = {field.name: field.default for field in fields(Options)}
    found: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        several = isinstance(known.get(key), tuple)
        try:
            given = yaml.safe_load(value)
            numbers = [v + 0 for v in (given if isinstance(given, list) and several else [given])]
        except (yaml.YAMLError, TypeError) as error:
            raise InputError(
                f"the option {text!r} has no number; give KEY=VALUE, such as side=224."
            ) from error
        found[key] = tuple(numbers) if several else given
    return found


@contextmanager
def _in_evaluation(encoder: Encoder) -> Iterator[None]:
    was_training = encoder.training
    encoder.train(False)
    try:
        yield
    finally:
        encoder.train(was_training)


def report_features(
    weights: str,
    train: str,
    val: str,
    measures: Sequence[str] | None = None,
    json_file: Path | None = None,
    **settings: Any,
) -> None:
    """Measure an encoder, print the table and write scores, failures and settings as JSON.

    Args:
        **settings: ``seed``, ``device``, ``max_images`` and options of :func:`measure_features`.

    Raises:
        InputError: nothing can be measured; or, after the table, a measure has failed.
    """
    if json_file is not None:
        writable_folder(json_file.absolute().parent)
    usable_device(settings.get("device", "cpu"))
    encoder = frozen_encoder(weights, settings.get("seed", 0))
    if weights == RANDOM:
        logger.warning("The encoder is an untrained ViT-S/16; its scores are a lower reference.")
    results, failures = measure_all(encoder, train, val, measures, **settings)
    names = list(measures or dict.fromkeys([*(n.split("/")[0] for n in results), *failures]))
    omitted = omitted_scores(encoder, [name for name in names if name not in failures])
    print(measures_table(names, results, failures, omitted))
    if json_file is not None:
        named = {"weights": weights, "train": train, "val": val, "measures": names} | settings
        content = {"settings": named, "results": results, "failures": failures, "omitted": omitted}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    if failures:
        raise InputError(
            f"{len(failures)} of {len(names)} measures failed ({', '.join(failures)}): the "
            "reasons stand below the table; correct them, or choose others with --measures."
        )


def measures_table(
    measures: Sequence[str],
    results: Mapping[str, float],
    failures: Mapping[str, str],
    omitted: Mapping[str, str],
) -> str:
    """Format scores by full name as a table with a line for each, and reasons below."""
    lines: list[tuple[str, str, str]] = []
    values = {name: f"{value:.2f}" for name, value in results.items()}
    values |= dict.fromkeys(omitted, "n/a")
    for measure in measures:
        scores = [("", "failed")] * (measure in failures)
        scores += [
            (n.split("/", 1)[1], v) for n, v in values.items() if n.startswith(f"{measure}/")
        ]
        # The name of a measure stands in the first of its lines only.
        lines += [("" if i else measure, *score) for i, score in enumerate(scores)]
    columns = ("left", "left", "right")
    headers = ("measure", "score", "value")
    table = tabulate(lines, headers=headers, colalign=columns, disable_numparse=True)
    reasons = [f"{measure} failed: {reason}" for measure, reason in failures.items()]
    reasons += [f"n/a: {reason}" for reason in dict.fromkeys(omitted.values())]
    return "\n".join([table, *reasons])
