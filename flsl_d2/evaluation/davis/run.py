"""Evaluation of an encoder on a split of DAVIS: masks, scores and failures.

J, F and their statistics are those of Perazzi et al. (CVPR 2016), Sec. 5. What the paper leaves
open (tolerance, borders of the image, quarters of a sequence) follows the benchmark's own
evaluation of DAVIS 2017.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence as Ordered
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.propagation import Propagation, frame_size, segment_sequence
from flsl_d2.evaluation.davis.sequences import (
    Sequence,
    davis_palette,
    find_sequence,
    read_mask,
    sequence_names,
    write_indexed_png,
)
from flsl_d2.evaluation.features import RANDOM, frozen_encoder, usable_device
from flsl_d2.evaluation.partitions import match_boundaries
from flsl_d2.files import writable_folder, write_text
from flsl_d2.images.reader import preview
from flsl_d2.modeling import Encoder

logger = logging.getLogger("detectron2.flsl_d2.evaluation")

_TOLERANCE = 0.008  # distance within which boundaries match, as a share of the diagonal
_DRAWN_FRAMES = 4
_COLUMNS = ("J&F", "J", "J rec.", "J dec.", "F", "F rec.", "F dec.")


@dataclass
class Results:
    """Results of a run, by sequence and in the order of the sequences.

    The scores of an object, by its index in the masks, are (2, 3): mean, recall and decay of J and
    of F, 0 to 1; there are none where masks are not scored.
    """

    objects: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def every(self) -> list[np.ndarray]:
        """Scores of all objects of all sequences, over which the benchmark averages."""
        return [scores for objects in self.objects.values() for scores in objects.values()]

    def as_json(self) -> dict[str, Any]:
        """Return all numbers by the names that papers use; measures are 0 to 1."""
        return {
            "overall": _named(self.every) or None,
            "counts": {
                "objects": len(self.every),
                "sequences": len(self.objects),
                "failed": len(self.failed),
            },
            "sequences": {
                name: {
                    **_named(list(objects.values())),
                    "frames": self.frames[name],
                    "objects": {str(i): _named([scores]) for i, scores in objects.items()},
                }
                for name, objects in self.objects.items()
            },
            "failed": dict(self.failed),
        }

    def table(self) -> str:
        """Format a row for each sequence and one overall, measures in percent, and failures."""
        named = {name: list(objects.values()) for name, objects in self.objects.items()}
        rows = []
        for name, scores in [*named.items(), *([("overall", self.every)] if self.every else [])]:
            values = ["", "masks written, not scored"]
            if scores:
                mean = np.mean(scores, axis=0)
                numbers = 100 * np.array([mean[:, 0].mean(), *mean.flat])
                values = [str(len(scores)), *(f"{number:.1f}" for number in numbers)]
            rows.append([name, *values])
        table = tabulate(rows, ("sequence", "objects", *_COLUMNS), tablefmt="plain")
        failed = [f"{name} failed: {reason}" for name, reason in self.failed.items()]
        total = len(self.objects) + len(self.failed)
        return "\n".join([table, *failed, f"{len(self.objects)} of {total} sequences count."])


def _named(scores: Ordered[np.ndarray]) -> dict[str, Any]:
    """Average the scores (2, 3) of objects, and name the numbers; nothing of none."""
    if not scores:
        return {}
    mean, names = np.mean(scores, axis=0), ("mean", "recall", "decay")
    parts = {key: dict(zip(names, mean[i].tolist(), strict=True)) for i, key in enumerate("JF")}
    return {"J&F": float(mean[:, 0].mean()), **parts}


@dataclass(frozen=True)
class DavisRun:
    """Data and settings of an evaluation; the defaults are the protocol's.

    With ``score=False`` the masks of the first frames are enough, and masks are only written, as
    for the benchmark's server. The batch size does not change the protocol.
    """

    root: Path
    output: Path
    split: str = "val"
    year: str = "2017"
    resolution: str = "480p"
    short_side: int = 480
    propagation: Propagation = field(default_factory=Propagation)
    batch_size: int = 8
    score: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size is {self.batch_size}; give 1 or more.")


def run_davis(
    run: DavisRun, weights: str, device: str, json_file: Path | None = None, seed: int = 0
) -> Results:
    """Evaluate a weight file, print the table and write results and settings as JSON.

    InputError where nothing can be evaluated; or, after all is written, where some sequences
    failed.
    """
    on = usable_device(device)
    sequence_names(run.root, run.year, run.split, run.resolution)
    json_file = json_file or run.output / "results.json"
    writable_folder(json_file.parent)
    encoder = frozen_encoder(weights, seed).to(on)
    if weights == RANDOM:
        logger.warning("The encoder is an untrained ViT-S/16; its scores are a lower reference.")
    results = evaluate_davis(encoder, run)
    architecture = getattr(encoder, "architecture", None)
    settings = {"weights": weights, "encoder": architecture, **asdict(run)}
    content = {"settings": settings, **results.as_json()}
    write_text(json_file, json.dumps(content, indent=1, default=str) + "\n")
    print(results.table())
    print(f"masks: {run.output / 'masks'}, drawn over frames: {run.output / 'drawn'}")
    print(f"results: {json_file}")
    if results.failed:
        raise InputError(
            f"{len(results.failed)} of {len(results.failed) + len(results.objects)} sequences "
            f"failed ({', '.join(results.failed)}) and are not in the overall numbers; repair "
            "their files and run again."
        )
    return results


def evaluate_davis(encoder: Encoder, run: DavisRun) -> Results:
    """Segment, write and score every sequence of a split; one may fail without the others."""
    frame_size((run.short_side, run.short_side), run.short_side, encoder.patch_size)
    writable_folder(run.output / "masks")
    results, sequences = Results(), []

    def report_failure(name: str, error: InputError) -> None:
        results.failed[name] = str(error)
        logger.warning("sequence %s failed: %s", name, error)

    for name in sequence_names(run.root, run.year, run.split, run.resolution):
        # A sequence that fails in this run must not keep the masks of an earlier run.
        shutil.rmtree(run.output / "masks" / name, ignore_errors=True)
        try:
            sequences.append(find_sequence(run.root, run.resolution, name, all_masks=run.score))
        except InputError as error:
            report_failure(name, error)
    with tqdm(total=sum(len(each.frames) for each in sequences), unit="frame") as progress:
        for number, sequence in enumerate(sequences, 1):
            progress.set_description(f"{sequence.name} ({number} of {len(sequences)})")
            progress_before = progress.n
            try:
                masks = _segment_and_write(encoder, sequence, run, progress)
                scores = score_sequence(sequence, masks) if run.score else {}
            except InputError as error:
                report_failure(sequence.name, error)
                progress.update(progress_before + len(sequence.frames) - progress.n)
            else:
                results.objects[sequence.name] = scores
                results.frames[sequence.name] = len(sequence.frames)
    return results


def score_sequence(sequence: Sequence, masks: Ordered[np.ndarray]) -> dict[int, np.ndarray]:
    """Score each object of the first mask, by its number; the first and last frame do not count.

    The benchmark counts every number up to the largest, and an absent one as right. Its own data
    have no gaps; in other data absent numbers do not count, and the log says what does.
    """
    objects = [number for number in np.unique(read_mask(sequence.masks[0])).tolist() if number]

    def score(mask: np.ndarray, path: Path) -> tuple[list[tuple[float, float]], set[int]]:
        truth = read_mask(path)
        pairs = [(mask == number, truth == number) for number in objects]
        values = [(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs]
        return values, set(np.unique(truth).tolist())

    with ThreadPoolExecutor() as pool:  # OpenCV releases Python's lock
        scored = list(pool.map(score, masks[1:-1], sequence.masks[1:-1]))
    later = sorted(set().union(*(found for _, found in scored)) - {0, *objects})
    if later or objects != list(range(1, len(objects) + 1)):
        logger.warning(
            "sequence %s: objects %s of the first mask are scored%s.",
            sequence.name,
            ", ".join(map(str, objects)),
            f"; {', '.join(map(str, later))} come later and are not" if later else "",
        )
    values = statistics(np.array([values for values, _ in scored]))  # (3, objects, 2)
    return {number: values[:, i].T for i, number in enumerate(objects)}


def region_similarity(mask: np.ndarray, truth: np.ndarray) -> float:
    """J, the intersection over union of two masks (H, W) bool; 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_accuracy(mask: np.ndarray, truth: np.ndarray) -> float:
    """F of the boundaries of two masks (H, W) bool, within 0.8% of the image's diagonal."""
    return match_boundaries(_boundary(mask), _boundary(truth), _TOLERANCE)


def statistics(values: np.ndarray) -> np.ndarray:
    """Mean, recall and decay over the scored frames, along the first axis: (3, ...).

    Recall is the share of the frames above 0.5, decay the mean of the first quarter minus that of
    the last. The quarters overlap by the frame where they meet, as in the benchmark's evaluation.
    """
    # Halves round up; the small addend keeps them from rounding to even.
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return np.stack([values.mean(0), (values > 0.5).mean(0), first.mean(0) - last.mean(0)])


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Mark pixels that differ from a neighbour to the right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")  # there is no boundary at the border
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _segment_and_write(
    encoder: Encoder, sequence: Sequence, run: DavisRun, progress: tqdm[Any]
) -> list[np.ndarray]:
    """Segment a sequence and write its masks to a folder that appears when it is complete."""
    folder = run.output / "masks" / sequence.name
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was stopped
    part.mkdir()
    masks = []
    settings = run.propagation, run.short_side, run.batch_size
    try:
        with closing(segment_sequence(encoder, sequence, *settings)) as found:
            for frame, mask in zip(sequence.frames, found, strict=True):
                write_indexed_png(part / f"{frame.stem}.png", mask)
                masks.append(mask)
                progress.update()
        part.rename(folder)
        _draw(run.output / "drawn" / f"{sequence.name}.jpg", sequence, masks)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return masks


def _draw(path: Path, sequence: Sequence, masks: Ordered[np.ndarray]) -> None:
    """Draw masks over some frames beside each other, an object a colour."""
    chosen = np.unique(np.linspace(0, len(masks) - 1, _DRAWN_FRAMES).round().astype(int)).tolist()
    pictures = []
    for number in chosen:
        frame, mask = preview(str(sequence.frames[number])), masks[number][..., None]
        tinted = 0.5 * frame + 0.5 * davis_palette()[masks[number]]
        pictures.append(np.where(mask > 0, tinted, frame).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(pictures, axis=1)).save(path, quality=90)
