"""Frozen-feature measures: the registry, and running them together."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.classification import BoxKnn, Classification
from flsl_d2.evaluation.cluster_quality import ClusterQuality
from flsl_d2.evaluation.clustering import Clustering
from flsl_d2.evaluation.correspondence import Correspondence
from flsl_d2.evaluation.discovery import Discovery
from flsl_d2.evaluation.explained_variance import ExplainedVariance
from flsl_d2.evaluation.features import RANDOM, frozen_encoder, usable_device
from flsl_d2.evaluation.in_context import InContext
from flsl_d2.evaluation.labelled_images import LabelledDataset, load_labelled
from flsl_d2.evaluation.samples import Measure, Options, Task, encode_dataset, global_attention
from flsl_d2.evaluation.segmentation import KnnSegmentation, LinearSegmentation
from flsl_d2.files import writable_folder, write_text
from flsl_d2.modeling import Encoder

logger = logging.getLogger(__name__)

MEASURES: dict[str, type[Measure]] = {
    kind.name: kind
    for kind in (
        *(BoxKnn, KnnSegmentation, LinearSegmentation, ClusterQuality, ExplainedVariance),
        *(Classification, InContext, Clustering, Discovery, Correspondence),
    )
}


def suitable_measures(dataset: LabelledDataset) -> list[str]:
    """Return the measures of one pass over the images that the labels of a data set allow."""
    if dataset.image_classes:
        return ["classification", "explained_variance"]
    shared = [name for name, kind in MEASURES.items() if not kind.prepares_images]
    return [name for name in shared if name != "classification"]


def better(score: str) -> str:
    """Return ``higher``, or nothing where neither is better, for a score's full name."""
    measure, _, key = score.partition("/")
    kind = MEASURES.get(measure)
    return "" if kind is None or key in kind.without_direction else "higher"


def omitted_scores(encoder: Encoder, measures: Sequence[str]) -> dict[str, str]:
    """Return the scores that have no meaning for an encoder, by full name, with the reason."""
    if "cluster_quality" not in measures or global_attention(encoder) is not None:
        return {}
    reason = "attention weights are read from an FLSLViT whose last block looks at all tokens"
    scores = ("ari", "ari_foreground", "boundary_f")
    return {f"cluster_quality/{score}_attention": reason for score in scores}


def measure_features(
    encoder: Encoder, train: str, val: str, measures: Sequence[str] | None = None, **settings: Any
) -> dict[str, float]:
    """Measure a frozen encoder, which is moved to the device and left in the mode it was in.

    Args:
        train: data set that labels are learned from, see :func:`load_labelled`.
        val: data set that is scored.
        measures: names in `MEASURES`; by default :func:`suitable_measures` of ``train``.
        **settings: ``device``; ``seed`` for everything that is drawn (the global generators are not
            touched); ``max_images`` of each data set, drawn by the seed; and fields of
            :class:`flsl_d2.evaluation.samples.Options`.

    Returns ``{"knn_segmentation/mIoU": 41.2, ...}``, in percent where that is customary, or raises
    the InputError of the first measure that fails.
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

    Data sets may be those of :func:`prepare_measures`. Only an unknown name raises InputError.
    """
    settings = _checked_options(measures, options)
    try:
        train, val = (
            load_labelled(data, max_images, seed) if isinstance(data, str) else data
            for data in (train, val)
        )
    except InputError as error:
        return {}, dict.fromkeys(measures or MEASURES, str(error))
    was_training = encoder.training
    task = Task(encoder.to(device).eval(), train, val, settings, seed)
    try:
        return run_measures(task, measures or suitable_measures(task.train))
    finally:
        encoder.train(was_training)


def prepare_measures(
    train: str,
    val: str,
    measures: Sequence[str] | None = None,
    seed: int = 0,
    max_images: int | None = None,
    **options: Any,
) -> tuple[LabelledDataset, LabelledDataset]:
    """Check names and data before long work, and return the data sets to measure with."""
    _checked_options(measures, options)
    return load_labelled(train, max_images, seed), load_labelled(val, max_images, seed)


def run_measures(task: Task, names: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Run measures; return the scores by full name, and the reasons of measures that failed."""
    running: dict[str, Measure] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
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
        if all(measure.prepares_images for measure in running.values()):
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
    known = vars(Options())
    if unknown := [name for name in given if name not in known]:
        raise InputError(
            f"the measures have no option {unknown[0]!r}; there are {', '.join(known)}."
        )
    return Options(**given)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings of protocols, each ``KEY=NUMBER`` or ``KEY=[NUMBER,NUMBER]``."""
    defaults = vars(Options())
    found: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        several = isinstance(defaults.get(key), tuple)
        try:
            given = yaml.safe_load(value)
            values = given if several and isinstance(given, list) else [given]
            numbers = tuple(v + 0 for v in values)
        except (yaml.YAMLError, TypeError) as error:
            raise InputError(
                f"the option {text!r} has no number; give KEY=VALUE, such as side=224."
            ) from error
        found[key] = numbers if several else given
    return found


def report_features(
    weights: str,
    train: str,
    val: str,
    measures: Sequence[str] | None = None,
    json_file: Path | None = None,
    **settings: Any,
) -> None:
    """Measure an encoder, print the table and write scores, failures and settings as JSON.

    InputError where nothing can be measured, or, after the table, where a measure has failed.
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
    values = {name: f"{value:.2f}" for name, value in results.items()}
    values |= dict.fromkeys(omitted, "n/a")
    lines = []
    for measure in measures:
        scores = [("", "failed")] * (measure in failures)
        scores += [(n[len(measure) + 1 :], v) for n, v in values.items() if f"{measure}/" in n]
        # The name of a measure stands in the first of its lines only.
        lines += [("" if i else measure, *score) for i, score in enumerate(scores)]
    columns = ("left", "left", "right")
    headers = ("measure", "score", "value")
    table = tabulate(lines, headers=headers, colalign=columns, disable_numparse=True)
    reasons = [f"{measure} failed: {reason}" for measure, reason in failures.items()]
    reasons += [f"n/a: {reason}" for reason in dict.fromkeys(omitted.values())]
    return "\n".join([table, *reasons])
