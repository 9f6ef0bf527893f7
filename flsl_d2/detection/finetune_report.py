"""The report of a fine-tuned detector: figures by class, errors, pictures and one page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

import flsl_d2
from flsl_d2.annotations.coco_file import read_coco
from flsl_d2.annotations.coco_records import load_coco, read_coco_api
from flsl_d2.detection.coco_evaluator import evaluate_coco
from flsl_d2.detection.predictor import Detections, Predictor
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.images.reader import preview
from flsl_d2.visualization.curves import loss_curves
from flsl_d2.visualization.detections import draw_objects, ground_truth
from flsl_d2.visualization.figures import (
    Panel,
    enlarge,
    label_plot,
    new_figure,
    picture_table,
    plot_grid,
    save_figure,
)
from flsl_d2.visualization.html import render

_IOU = 0.5
_NUM_WORST = 6
_NUM_CURVES = 10
_LABELS_ACROSS = 4


@dataclass(frozen=True)
class Report:
    """The outcome of a run on its validation images.

    Attributes:
        figures: value in percent by name, such as ``bbox/AP`` and ``bbox/AP-person``.
        score_threshold: score with the best F1 of boxes at an IoU of 0.5.
        notes: sentences about what limits the detector.
        page: the HTML page.
    """

    figures: dict[str, float]
    score_threshold: float
    notes: list[str]
    page: Path


@dataclass
class _Matches:
    """How detections and annotated objects of one image match at an IoU of 0.5.

    Attributes:
        pairs: detection number, class found and class annotated; class -1 for a detection without
            an object. Detections on crowds are left out.
        missed: classes of the objects that no detection matches.
    """

    pairs: list[tuple[int, int, int]] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)


def draw_labels(
    records: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    path: Path,
    title: str,
    count: int = 8,
) -> None:
    """Draw annotated images, evenly spread, as a page of pictures.

    Args:
        records: records in Detectron2's format.
        class_names: by class number.
        path: PNG file to write.
        title: heading of the page.
        count: number of images.
    """
    having = [r for r in records if r["annotations"]] or list(records)
    places = np.unique(np.linspace(0, len(having) - 1, min(count, len(having))).round().astype(int))
    panels = []
    for place in places:
        record = having[place]
        image = preview(record["file_name"])
        drawn = draw_objects(image, ground_truth(record), list(class_names))
        panels.append(Panel(drawn, Path(record["file_name"]).name))
    rows = [panels[i : i + _LABELS_ACROSS] for i in range(0, len(panels), _LABELS_ACROSS)]
    picture_table(path, title, rows)


def write_report(
    folder: Path,
    predictor: Predictor,
    json_file: str,
    image_root: str,
    summary: Sequence[str],
    hints: Sequence[str],
    commands: Sequence[str],
) -> Report:
    """Evaluate a detector on validation images, and write figures, pictures and a page.

    Written are ``report.html``, ``results.json`` (figures), ``detections.json`` (COCO's results
    format) and the pictures ``confusion.png``, ``precision_recall.png``, ``worst.png`` and
    ``curves.png``.

    Args:
        folder: output folder of the run.
        predictor: the detector, with a score threshold of 0.
        json_file: annotations of the validation images.
        image_root: folder of the images.
        summary: lines about the run.
        hints: reasons why the detector may find little, for the case that it does.
        commands: commands to go on with.
    """
    records = load_coco(json_file, image_root)
    categories = sorted(read_coco(json_file)["categories"], key=lambda each: each["id"])
    names = [str(each["name"]) for each in categories]
    found = [predictor(record["file_name"])[0] for record in records]
    results = [
        entry
        for record, each in zip(records, found, strict=True)
        for entry in each.coco_results(record["image_id"], [c["id"] for c in categories])
    ]
    write_text(folder / "detections.json", json.dumps(results))
    truth = read_coco_api(json_file)
    kinds = ["bbox", "segm"] if results and "segmentation" in results[0] else ["bbox"]
    evaluations = {kind: evaluate_coco(truth, results, kind) for kind in kinds}
    figures = _figures(evaluations, names)
    matches = [_match(r, d) for r, d in zip(records, found, strict=True)]
    threshold = _best_threshold(found, matches)
    confusion = _confusion(found, matches, threshold, len(names))
    notes = _notes(figures, results, found, matches, confusion, names, hints)
    write_text(
        folder / "results.json",
        json.dumps({"figures": figures, "score_threshold": threshold, "notes": notes}, indent=1),
    )
    pictures = {
        "precision and recall": folder / "precision_recall.png",
        f"confusion at a score of at least {threshold:.2f}": folder / "confusion.png",
        "images with the most errors": folder / "worst.png",
        "training": folder / "curves.png",
        "labels": folder / "labels.png",
    }
    _draw_curves(evaluations[kinds[-1]], names, folder / "precision_recall.png")
    _draw_confusion(confusion, names, folder / "confusion.png")
    _draw_worst(records, found, matches, threshold, names, folder / "worst.png")
    try:
        loss_curves(folder / "metrics.json", folder / "curves.png")
    except InputError:
        pictures.pop("training")
    page = folder / "report.html"
    write_text(
        page,
        render(
            "finetune.html.j2",
            title=f"Detector in {folder.name}",
            notes=notes,
            rows=_table(figures, names, kinds, truth),
            columns=[
                "class",
                "objects",
                *(f"{_KIND[k]} {m}" for k in kinds for m in ("AP", "AP50")),
            ],
            num_images=len(records),
            threshold=threshold,
            pictures=pictures,
            commands=list(commands),
            versions={"flsl-d2": flsl_d2.__version__, "PyTorch": torch.__version__},
            details=[("What was run", "\n".join(summary))],
        ),
    )
    return Report(figures, threshold, notes, page)


_KIND = {"bbox": "box", "segm": "mask"}
_SHOWN = ("AP", "AP50")


def _figures(evaluations: dict[str, COCOeval | None], names: Sequence[str]) -> dict[str, float]:
    """Figures in percent; NaN for a class without objects, 0 without any detection."""
    figures: dict[str, float] = {}
    for kind, evaluation in evaluations.items():
        if evaluation is None:
            figures |= {f"{kind}/AP": 0.0, f"{kind}/AP50": 0.0, f"{kind}/AP75": 0.0}
            continue
        for place, name in enumerate(("AP", "AP50", "AP75", "APs", "APm", "APl")):
            value = float(evaluation.stats[place])
            figures[f"{kind}/{name}"] = 100 * value if value >= 0 else math.nan
        # IoU x recall x class x area x number of detections
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        for number, name in enumerate(names):
            for label, part in (("AP", precision), ("AP50", precision[:1])):
                values = part[:, :, number]
                known = values[values > -1]
                figures[f"{kind}/{label}-{name}"] = (
                    100 * float(known.mean()) if known.size else math.nan
                )
    return figures


def _match(record: dict[str, Any], found: Detections) -> _Matches:
    """Match detections by falling score, each to the best free object, first of its own class."""
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    crowds = [a for a in record["annotations"] if a["iscrowd"]]
    classes = np.array([a["category_id"] for a in objects], int)
    overlap = _overlap(found.boxes, objects)
    free = np.ones(len(objects), bool)
    matches = _Matches()
    for number, label in enumerate(found.classes.tolist()):
        candidates = np.flatnonzero(free & (overlap[number] >= _IOU))
        if candidates.size:
            own = candidates[classes[candidates] == label]
            among = own if own.size else candidates
            best = among[overlap[number][among].argmax()]
            free[best] = False
            matches.pairs.append((number, label, int(classes[best])))
        elif not _on_crowd(found.boxes[number], crowds):
            matches.pairs.append((number, label, -1))
    matches.missed = classes[free].tolist()
    return matches


def _overlap(boxes: np.ndarray, objects: Sequence[dict[str, Any]]) -> np.ndarray:
    corners = np.array([a["bbox"] for a in objects], float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(corners)).numpy()


def _on_crowd(box: np.ndarray, crowds: Sequence[dict[str, Any]]) -> bool:
    """Whether half of a box lies in a crowd."""
    area = float(np.prod(box[2:] - box[:2]))
    for crowd in crowds:
        x, y, width, height = crowd["bbox"]
        sides = np.minimum(box[2:], (x + width, y + height)) - np.maximum(box[:2], (x, y))
        if float(np.prod(np.maximum(sides, 0))) >= 0.5 * area:
            return True
    return False


def _best_threshold(found: Sequence[Detections], matches: Sequence[_Matches]) -> float:
    """Score with the best F1 of all classes together, rounded down to hundredths."""
    scored = [
        (float(each.scores[number]), label == truth)
        for each, match in zip(found, matches, strict=True)
        for number, label, truth in match.pairs
    ]
    total = sum(len(m.missed) + sum(truth >= 0 for *_, truth in m.pairs) for m in matches)
    if not scored or not any(right for _, right in scored):
        return 0.5
    scored.sort(reverse=True)
    right = np.cumsum([each for _, each in scored])
    f1 = 2 * right / (np.arange(1, len(scored) + 1) + total)
    return math.floor(100 * scored[int(f1.argmax())][0]) / 100


def _confusion(
    found: Sequence[Detections], matches: Sequence[_Matches], threshold: float, num_classes: int
) -> np.ndarray:
    """Count (annotated class, class found); the last row and column stand for nothing."""
    counts = np.zeros((num_classes + 1, num_classes + 1), int)
    for each, match in zip(found, matches, strict=True):
        for number, label, truth in match.pairs:
            if each.scores[number] >= threshold:
                counts[truth, label] += 1
            elif truth >= 0:
                counts[truth, -1] += 1
        for truth in match.missed:
            counts[truth, -1] += 1
    return counts


def _notes(
    figures: dict[str, float],
    results: Sequence[dict[str, Any]],
    found: Sequence[Detections],
    matches: Sequence[_Matches],
    confusion: np.ndarray,
    names: Sequence[str],
    hints: Sequence[str],
) -> list[str]:
    """Say in words what the figures show, with reasons where the detector finds nearly nothing."""
    notes = []
    absent = [name for name in names if math.isnan(figures.get(f"bbox/AP-{name}", 0.0))]
    if absent and len(absent) < len(names):
        notes.append(
            f"{', '.join(absent)}: without an object in the validation images, so there is no AP."
        )
    weak = [n for n in names if 0 <= figures.get(f"bbox/AP50-{n}", 100.0) < 5]
    ap50 = figures["bbox/AP50"]
    if not ap50 < 5:  # NaN counts as found
        if weak and len(names) > 1:
            notes.append(f"{', '.join(weak)}: nearly nothing is found.")
        return notes
    notes.append(f"The detector finds nearly nothing: box AP at an IoU of 0.5 is {ap50:.1f}.")
    if not results:
        notes.append(
            "No detection has a score that the model reports at all: it has not begun to learn, "
            "so train for more steps."
        )
    anywhere = sum(truth >= 0 for match in matches for *_, truth in match.pairs)
    total = anywhere + sum(len(match.missed) for match in matches)
    right = sum(label == truth for match in matches for _, label, truth in match.pairs)
    if results and anywhere > 0.5 * total and right < 0.5 * anywhere:
        worst = confusion[:-1, :-1].copy()
        np.fill_diagonal(worst, 0)
        row, column = (int(i) for i in np.unravel_index(worst.argmax(), worst.shape))
        example = f" (most often {names[row]} as {names[column]})" if worst.max() else ""
        notes.append(
            f"{anywhere} of {total} objects are found at the right place with a wrong class"
            f"{example}: check that both annotation files number the classes alike."
        )
    elif results and total:
        notes.append(f"Detections match {anywhere} of {total} objects at any score and class.")
    return [*notes, *hints]


def _table(
    figures: dict[str, float], names: Sequence[str], kinds: Sequence[str], truth: Any
) -> list[list[str]]:
    counts = dict.fromkeys(sorted(truth.getCatIds()), 0)
    for annotation in truth.dataset["annotations"]:
        counts[annotation["category_id"]] += not annotation.get("iscrowd")
    rows = [["all", str(sum(counts.values())), *_row(figures, kinds, "")]]
    if len(names) > 1:
        for name, count in zip(names, counts.values(), strict=True):
            rows.append([name, str(count), *_row(figures, kinds, f"-{name}")])
    return rows


def _row(figures: dict[str, float], kinds: Sequence[str], suffix: str) -> list[str]:
    values = [figures.get(f"{k}/{m}{suffix}", math.nan) for k in kinds for m in _SHOWN]
    return ["-" if math.isnan(value) else f"{value:.1f}" for value in values]


def _draw_curves(evaluation: COCOeval | None, names: Sequence[str], path: Path) -> None:
    figure, (plot,) = plot_grid(1, "Precision and recall at an IoU of 0.5")
    if evaluation is not None:
        precision = np.asarray(evaluation.eval["precision"])[0, :, :, 0, -1]
        known = [k for k in range(len(names)) if precision[:, k].max() > -1]
        recall = np.linspace(0, 1, len(precision))
        for number in known[:_NUM_CURVES]:
            label = f"{names[number]}, AP50 {100 * precision[:, number].mean():.1f}"
            plot.plot(recall, precision[:, number], linewidth=1.3, label=label)
        if len(known) > 1:
            mean = precision[:, known].mean(axis=1)
            plot.plot(recall, mean, color="black", linewidth=2.2, label="mean of all classes")
        if known:
            plot.legend(fontsize=7)
    label_plot(plot, "", "recall", "precision")
    plot.xaxis.set_major_locator(MaxNLocator(5))
    plot.set_xlim(0, 1)
    plot.set_ylim(0, 1.02)
    save_figure(figure, path)


def _draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    side = max(4.5, 0.45 * len(counts) + 2.5)
    figure = new_figure(side + 0.6, side)
    plot = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    plot.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 30:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            plot.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    places = range(len(counts))
    plot.set_xticks(places, [*names, "nothing"], rotation=60, ha="right", fontsize=8)
    plot.set_yticks(places, [*names, "nothing"], fontsize=8)
    plot.set_xlabel("found", fontsize=9)
    plot.set_ylabel("annotated", fontsize=9)
    plot.set_title("Objects by class at an IoU of 0.5", fontsize=11)
    save_figure(figure, path)


def _draw_worst(
    records: Sequence[dict[str, Any]],
    found: Sequence[Detections],
    matches: Sequence[_Matches],
    threshold: float,
    names: Sequence[str],
    path: Path,
) -> None:
    """Draw the images with the most errors: annotated objects beside detections."""
    errors = []
    for each, match in zip(found, matches, strict=True):
        kept = [pair for pair in match.pairs if each.scores[pair[0]] >= threshold]
        too_low = sum(truth >= 0 for *_, truth in match.pairs) - sum(t >= 0 for *_, t in kept)
        wrong = sum(label != truth for _, label, truth in kept)
        errors.append((wrong, len(match.missed) + too_low))
    order = sorted(range(len(records)), key=lambda i: -sum(errors[i]))[:_NUM_WORST]
    rows = []
    for i in order:
        record, shown = records[i], found[i].at_least(threshold)
        image = preview(record["file_name"])
        wrong, missed = errors[i]
        truth = ground_truth(record)
        rows.append(
            [
                Panel(enlarge(image)[0], Path(record["file_name"]).name),
                Panel(draw_objects(image, truth, list(names)), f"objects: {len(truth.classes)}"),
                Panel(shown.drawn_on(image), f"{wrong} wrong, {missed} missed"),
            ]
        )
    headings = ("image", "annotated", f"found (score at least {threshold:.2f})")
    picture_table(path, "Images with the most errors", rows, headings, width=4.2)
