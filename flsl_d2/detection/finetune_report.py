"""The report of a fine-tuned detector: verdict, figures by class, and a page of all pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_ioa
from PIL import Image
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

import flsl_d2
from flsl_d2.annotations.coco_file import read_coco
from flsl_d2.annotations.records import load_coco, read_coco_api
from flsl_d2.detection.coco_evaluator import evaluate_coco
from flsl_d2.detection.detections import Detections
from flsl_d2.detection.predictor import Predictor
from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.images.reader import preview
from flsl_d2.visualization.curves import loss_curves, read_metrics
from flsl_d2.visualization.detections import choose_records, draw_objects, ground_truth
from flsl_d2.visualization.figures import Panel, picture_table
from flsl_d2.visualization.html import render

NOTHING, CROWD = -1, -2
_IOU = 0.5
_MOST_CLASSES = 30  # in the page, those with the lowest AP; results.json has all
_PICTURE_SIDES = {50: 640, 400: 384, math.inf: 224}  # longer side by the number of pictures
_LOWEST_SCORE = 0.05  # of detections in the page
_KIND = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True)
class Report:
    """The outcome of a run on its validation images.

    Attributes:
        figures: value in percent by name, such as ``bbox/AP`` and ``bbox/AP-person``.
        score_threshold: score with the best F1 of boxes at an IoU of 0.5.
        notes: sentences about what limits the detector.
    """

    figures: dict[str, float]
    score_threshold: float
    notes: list[str]
    page: Path


@dataclass(frozen=True)
class _Compared:
    """Detections of one image and its annotated objects, matched by boxes at an IoU of 0.5."""

    labels: np.ndarray  # (M,) classes found, by falling score
    scores: np.ndarray  # (M,)
    match: np.ndarray  # (M,) index of each detection's object; NOTHING and CROWD are none
    truth: np.ndarray  # (T,) annotated classes

    @property
    def annotated(self) -> np.ndarray:
        """(M,) class of each detection's object, or `NOTHING` or `CROWD`."""
        none = np.array([CROWD, NOTHING])
        return np.concatenate([self.truth, none])[self.match]


def draw_labels(records: list[dict[str, Any]], class_names: list[str], path: Path) -> None:
    """Draw eight annotated training images, evenly spread, as a PNG page of pictures."""
    panels = []
    for record in choose_records(records, 8):
        drawn = draw_objects(preview(record["file_name"]), ground_truth(record), class_names)
        panels.append(Panel(drawn, Path(record["file_name"]).name))
    rows = [row for row in (panels[:4], panels[4:]) if row]
    picture_table(path, "Labels of training images", rows)


def write_report(
    folder: Path,
    predictor: Predictor,
    json_file: str,
    image_root: str,
    summary: Sequence[str],
    hints: Sequence[str],
    commands: Sequence[str],
) -> Report:
    """Evaluate a detector on validation images, and write figures and a page.

    Written are ``report.html``, which holds every validation picture, ``results.json`` (figures),
    ``detections.json`` (COCO's results format) and ``curves.png``.

    Args:
        predictor: the detector, with a score threshold of 0.
        summary: lines about the run.
        hints: reasons why the detector may find little, for the case that it does.
        commands: commands to go on with.
    """
    records = load_coco(json_file, image_root)
    categories = sorted(read_coco(json_file)["categories"], key=lambda each: each["id"])
    names, ids = [str(each["name"]) for each in categories], [each["id"] for each in categories]
    side = next(side for most, side in _PICTURE_SIDES.items() if len(records) <= most)
    results, compared, pictures = [], [], []
    for record in progress(records, "predicting the validation images"):
        found = predictor(record["file_name"])[0]
        results += found.coco_results(record["image_id"], ids)
        compared.append(_compare(record, found))
        pictures.append(_picture(record, found, compared[-1], side))
    write_text(folder / "detections.json", json.dumps(results))
    truth = read_coco_api(json_file)
    kinds = ["bbox", "segm"] if results and "segmentation" in results[0] else ["bbox"]
    evaluations = {kind: evaluate_coco(truth, results, kind) for kind in kinds}
    figures, threshold = _figures(evaluations, names), _best_threshold(compared)
    notes = _verdict(folder / "metrics.json", kinds[-1])
    notes += _notes(figures, compared, names, hints)
    written = {"figures": figures, "score_threshold": threshold, "notes": notes}
    write_text(folder / "results.json", json.dumps(written, indent=1))
    curves = {"labels": folder / "labels.png"}
    with suppress(InputError):
        loss_curves(folder / "metrics.json", folder / "curves.png")
        curves = {"training": folder / "curves.png", **curves}
    counts = Counter(int(label) for each in compared for label in each.truth)
    shown = sorted(counts, key=lambda c: figures.get(f"{kinds[-1]}/AP-{names[c]}", 0.0))
    shown = shown[:_MOST_CLASSES]
    data = {
        "classes": names,
        "counts": [sum(counts.values()), *(counts[c] for c in shown)],
        "shown": shown,
        "threshold": threshold,
        "lowest": min(_LOWEST_SCORE, threshold),
        "kinds": {k: _curves(evaluations[k], shown) | {"name": _KIND[k]} for k in kinds},
        "figures": {
            f"{k}/{m}": [_rounded(figures.get(f"{k}/{m}{name}"))
                         for name in ("", *(f"-{names[c]}" for c in shown))]
            for k in kinds
            for m in ("AP", "AP50")
        },
        "images": pictures,
    }  # fmt: skip
    page = folder / "report.html"
    text = render(
        "finetune.html.j2",
        title=f"Detector in {folder.name}",
        notes=notes,
        data=data,
        num_classes=len(counts),
        num_images=len(records),
        pictures=curves,
        commands=list(commands),
        versions={"flsl-d2": flsl_d2.__version__, "PyTorch": torch.__version__},
        details=[("What was run", "\n".join(summary))],
    )
    write_text(page, text)
    return Report(figures, threshold, notes, page)


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), digits)


def _curves(evaluation: COCOeval | None, shown: Sequence[int]) -> dict[str, Any]:
    """Precision at 101 recalls at an IoU of 0.5: the mean of all classes, then of each shown."""
    if evaluation is None:
        return {"curves": []}
    precision = np.asarray(evaluation.eval["precision"])[0, :, :, 0, -1]
    known = precision[:, precision.max(axis=0) > -1]
    chosen = [known.mean(axis=1) if known.size else np.zeros(len(precision))]
    chosen += [precision[:, number] for number in shown]
    return {"curves": [[_rounded(v, 3) for v in curve] for curve in chosen]}


def _picture(
    record: dict[str, Any], found: Detections, compared: _Compared, side: int
) -> dict[str, Any]:
    """Picture of one image for the page, with its objects and detections in its pixels."""
    image = preview(record["file_name"])
    factor = min(1.0, side / max(image.shape[:2]))
    size = (max(round(image.shape[1] * factor), 1), max(round(image.shape[0] * factor), 1))
    buffer = io.BytesIO()
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    Image.fromarray(small).save(buffer, "JPEG", quality=82)
    truth, chosen = ground_truth(record), np.flatnonzero(compared.scores >= _LOWEST_SCORE)
    masks = [None] * len(found) if found.masks is None else list(found.masks)
    drawn = zip(truth.classes, truth.boxes, truth.masks, strict=True)
    jpeg = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {
        "name": Path(record["file_name"]).name,
        "width": size[0],
        "height": size[1],
        "jpeg": f"data:image/jpeg;base64,{jpeg}",
        "truth": [[int(c), _corners(b, factor), _outline(m, size)] for c, b, m in drawn],
        "found": [
            [int(compared.labels[i]), _rounded(compared.scores[i], 3), int(compared.match[i]),
             _corners(found.boxes[i], factor), _outline(masks[i], size)]
            for i in chosen
        ],
    }  # fmt: skip


def _corners(box: np.ndarray, factor: float) -> list[float]:
    return [round(float(value) * factor, 1) for value in box]


def _outline(mask: np.ndarray | None, size: tuple[int, int]) -> list[list[int]]:
    """Outlines of a mask, resized to a width and height: x0, y0, x1, y1, ... each."""
    if mask is None:
        return []
    small = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_AREA)
    contours, _ = cv2.findContours(small, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [cv2.approxPolyDP(each, 0.7, True).astype(int).ravel().tolist() for each in contours]


def _verdict(metrics: Path, kind: str) -> list[str]:
    """Say whether AP still rises at the end of the training, from its evaluations."""
    try:
        values = read_metrics(metrics)[0].get(f"{kind}/AP", ([], []))[1]
    except InputError:
        return []
    third = len(values) // 3
    if not third:
        return []
    middle, late = float(np.mean(values[third:-third])), float(np.mean(values[-third:]))
    name = f"{_KIND[kind]} AP"
    if late > middle + max(1.0, 0.03 * middle):
        return [f"{name} still rises ({middle:.1f}, then {late:.1f}): train longer (--max-iter)."]
    if max(values) > values[-1] + max(1.0, 0.05 * max(values)):
        return [f"{name} fell from {max(values):.1f} to {values[-1]:.1f}; the best is kept."]
    return [f"{name} no longer rises: more steps alone will help little."]


def _compare(record: dict[str, Any], found: Detections) -> _Compared:
    """Match detections by falling score, each to the best free object, first of its own class."""
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    crowds = [a for a in record["annotations"] if a["iscrowd"]]
    classes = np.array([a["category_id"] for a in objects], int)
    corners = torch.from_numpy(_corner_boxes(objects))
    overlap = box_iou(torch.from_numpy(found.boxes).double(), corners).numpy()
    # Share of each detection's box that lies in one crowd.
    in_crowd = pairwise_ioa(
        *(Boxes(torch.from_numpy(b)) for b in (_corner_boxes(crowds), found.boxes))
    )
    on_crowd = (in_crowd >= 0.5).any(dim=0).tolist()
    free = np.ones(len(objects), bool)
    match = np.full(len(found), NOTHING)
    for number, label in enumerate(found.classes.tolist()):
        candidates = np.flatnonzero(free & (overlap[number] >= _IOU))
        if candidates.size:
            own = candidates[classes[candidates] == label]
            among = own if own.size else candidates
            match[number] = among[overlap[number][among].argmax()]
            free[match[number]] = False
        elif on_crowd[number]:
            match[number] = CROWD
    return _Compared(found.classes, found.scores, match, classes)


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
                known = part[:, :, number][part[:, :, number] > -1]
                mean = 100 * float(known.mean()) if known.size else math.nan
                figures[f"{kind}/{label}-{name}"] = mean
    return figures


def _corner_boxes(objects: Sequence[dict[str, Any]]) -> np.ndarray:
    corners = np.array([a["bbox"] for a in objects], float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners


def _best_threshold(compared: Sequence[_Compared]) -> float:
    """Score with the best F1 of all classes together, rounded down to hundredths."""
    scores = np.concatenate([c.scores[c.match != CROWD] for c in compared])
    right = np.concatenate([(c.annotated == c.labels)[c.match != CROWD] for c in compared])
    if not right.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    total = sum(len(c.truth) for c in compared)
    f1 = 2 * np.cumsum(right[order]) / (np.arange(1, len(order) + 1) + total)
    return math.floor(100 * float(scores[order][f1.argmax()])) / 100


def _notes(
    figures: dict[str, float],
    compared: Sequence[_Compared],
    names: Sequence[str],
    hints: Sequence[str],
) -> list[str]:
    """Say in words what the figures show, with reasons where the detector finds nearly nothing."""
    notes = []
    absent = [name for name in names if math.isnan(figures.get(f"bbox/AP-{name}", 0.0))]
    if absent and len(absent) < len(names):
        notes.append(
            f"{_listed(absent)}: without an object in the validation images, so there is no AP."
        )
    weak = [n for n in names if 0 <= figures.get(f"bbox/AP50-{n}", 100.0) < 5]
    ap50 = figures["bbox/AP50"]
    if not ap50 < 5:  # NaN counts as found
        if weak and len(names) > 1:
            notes.append(f"{_listed(weak)}: nearly nothing is found.")
        return notes
    notes.append(f"The detector finds nearly nothing: box AP at an IoU of 0.5 is {ap50:.1f}.")
    total, anywhere = sum(len(c.truth) for c in compared), 0
    wrong: Counter[tuple[int, int]] = Counter()
    for each in compared:
        hit = each.match >= 0
        anywhere += int(hit.sum())
        pairs = zip(each.annotated[hit].tolist(), each.labels[hit].tolist(), strict=True)
        wrong.update(pair for pair in pairs if pair[0] != pair[1])
    if not any(len(each.scores) for each in compared):
        notes.append(
            "No detection has a score that the model reports at all: it has not begun to learn, "
            "so train for more steps."
        )
    elif anywhere > 0.5 * total and wrong.total() > 0.5 * anywhere:
        (row, column), _ = wrong.most_common(1)[0]
        notes.append(
            f"{anywhere} of {total} objects are found at the right place with a wrong class (most "
            f"often {names[row]} as {names[column]}): check that both annotation files number the "
            "classes alike."
        )
    elif total:
        notes.append(f"Detections match {anywhere} of {total} objects at any score and class.")
    return [*notes, *hints]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
