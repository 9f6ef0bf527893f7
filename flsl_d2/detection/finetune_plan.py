"""Rules that choose a fine-tuning run's settings from data, encoder and device.

The rules start from COCO's recipe (16 images a step, learning rate 1e-4, 12 epochs of 118,000
images, shorter side 800) and scale it:

- **Shorter side**: 800 pixels on a GPU and 320 on a CPU, at most twice the median shorter side of
  the pictures, a multiple of 32. In training it varies from 0.6 of that to all of it.
- **Batch**: the largest power of two up to 16 that fits four fifths of the memory and leaves at
  least four steps an epoch; at most 2 on a CPU. Gradients are never accumulated over steps: what
  does not fit makes the batch smaller.
- **Memory** of an image, an estimate: 42 bytes for each token, channel and block of the encoder,
  800 bytes a pixel for pyramid and RPN, 0.3 GiB for the heads; twice as much in float32; 2 GiB for
  everything else. The 42 bytes are what Detectron2's ViT-B stores at 1024 pixels with flash
  attention. Where one image does not fit, blocks are recomputed in the backward pass, which stores
  a tenth.
- **Learning rate**: 1e-4 times the square root of batch / 16, the rule for Adam (arXiv 2205.10287).
  On a CPU 3e-4, because runs are short and the small heads start from nothing.
- **Length** on a GPU: epochs, 12 times the square root of 118,000 / images, at least 12 and at most
  100, and at least 200 steps. On a CPU 12 epochs, but at least 400 and at most 2,000 steps, which
  take minutes to a few hours. ``--max-iter`` replaces it.
- **Warm-up**: 1,000 steps, and at most a tenth of the run.
- **Heads**: on a CPU pyramid and heads have half the channels, the box head has no convolutions,
  and they learn from 128 proposals an image instead of 512 and evaluate 300 instead of 1,000. They
  take most of the time there: a step of 2 images of 192 pixels with the shipped encoder takes 1.1
  instead of 3.4 seconds of a core.
- **Evaluation**: ten times in a run, and no more than once an epoch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flsl_d2.engine.gpus import usable_cores

ANCHOR_SIDES = (32, 64, 128, 256, 512)
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
# The RPN takes anchors with a lower IoU for background (Faster R-CNN, arXiv 1506.01497).
_BACKGROUND_IOU = 0.3
_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Name, bytes of memory and number of this process's CPU cores of a run's device."""

    name: str
    memory: float
    cores: int

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("cpu")


def find_device(name: str) -> Device:
    if name.startswith("cuda") and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.device(name)).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(name, float(memory), usable_cores())


@dataclass(frozen=True)
class DataFacts:
    """Facts of the training data that the rules use.

    Attributes:
        num_images: number of images with objects; ``num_without`` is that of the others.
        num_objects: number of objects without crowds; ``max_objects`` is that of the fullest image.
        image_sizes: (N, 2) height and width of all images in pixels.
        object_sizes: (M, 2) height and width in pixels of an image whose shorter side is 1.
        mask_share: share of the objects that have a mask.
    """

    num_images: int
    num_without: int
    num_objects: int
    class_counts: dict[str, int]
    image_sizes: np.ndarray
    object_sizes: np.ndarray
    mask_share: float
    max_objects: int


def collect_facts(records: Sequence[dict[str, Any]], class_names: Sequence[str]) -> DataFacts:
    """Count and measure the records of a training set in Detectron2's format."""
    counts = dict.fromkeys(class_names, 0)
    objects, masks, numbers = [], 0, []
    for record in records:
        shorter = min(record["height"], record["width"])
        learned = [a for a in record["annotations"] if not a["iscrowd"]]
        numbers.append(len(learned))
        for annotation in learned:
            counts[class_names[annotation["category_id"]]] += 1
            masks += bool(annotation.get("segmentation"))
            objects.append([side / shorter for side in annotation["bbox"][:1:-1]])
    return DataFacts(
        num_images=sum(number > 0 for number in numbers),
        num_without=sum(number == 0 for number in numbers),
        num_objects=len(objects),
        class_counts=counts,
        image_sizes=np.array([[r["height"], r["width"]] for r in records], float).reshape(-1, 2),
        object_sizes=np.array(objects, float).reshape(-1, 2),
        mask_share=masks / max(len(objects), 1),
        max_objects=max(numbers, default=0),
    )


@dataclass(frozen=True)
class Plan:
    """Settings of a run, with the reasons to print.

    Attributes:
        short_side: shorter side of the images in pixels; ``max_side`` limits the longer one.
        warmup_length: share of the steps in which the learning rate rises.
        eval_period: steps between two evaluations; ``log_period`` is that of the log.
        recompute: recompute the encoder's blocks in the backward pass.
        reasons: sentence by setting.
    """

    short_side: int
    max_side: int
    batch_size: int
    learning_rate: float
    max_iter: int
    warmup_length: float
    eval_period: int
    log_period: int
    workers: int
    recompute: bool
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def train_sides(self) -> list[int]:
        first = max(32, round(0.6 * self.short_side / 32) * 32)
        return [*range(first, self.short_side, 32), self.short_side]

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup_length * self.max_iter)


def make_plan(
    facts: DataFacts,
    device: Device,
    encoder: dict[str, Any],
    max_iter: int = 0,
    short_side: int = 0,
    batch_size: int = 0,
    num_processes: int = 1,
) -> Plan:
    """Choose the settings by the rules of this module, those that are 0.

    Args:
        encoder: ``embed_dim``, ``depth`` and ``patch_size``.
        num_processes: number of GPUs, each with the memory of the device, or of processes that
            share the memory of a CPU; the batch is a multiple of it.
    """
    reasons = {}
    if not short_side:
        usual = 800 if device.is_gpu else 320
        median = float(np.median(facts.image_sizes.min(axis=1)))
        short_side = max(32, min(usual, int(2 * median) // 32 * 32))
        reasons["short_side"] = (
            f"{usual} pixels is usual on {'a GPU' if device.is_gpu else 'a CPU'}; the median "
            f"picture has {median:.0f}"
        )
    max_side = math.ceil(short_side * 1333 / 800)
    per_image, recompute = _image_bytes(encoder, short_side, max_side, device.is_gpu, False), False
    room = 0.8 * device.memory - 2 * _GIB
    if per_image > room:
        recompute = True
        per_image = _image_bytes(encoder, short_side, max_side, device.is_gpu, True)
        reasons["recompute"] = "one image does not fit the memory otherwise"
    fitting = max(1, int(room // per_image)) * (num_processes if device.is_gpu else 1)
    if not batch_size:
        most = min(16 if device.is_gpu else 2, fitting, max(1, facts.num_images // 4))
        batch_size = 2 ** int(math.log2(most))
        batch_size = max(batch_size // num_processes, 1) * num_processes
    reasons["batch_size"] = (
        f"an image needs about {per_image / _GIB:.1f} of {device.memory / _GIB:.0f} GiB (estimate)"
        + ("" if batch_size <= fitting else f", so {batch_size} may not fit")
    )
    learning_rate, reasons["learning_rate"] = 3e-4, "a short run with small heads, on a CPU"
    if device.is_gpu:
        learning_rate = float(f"{1e-4 * math.sqrt(batch_size / 16):.3g}")
        reasons["learning_rate"] = "1e-4 * sqrt(batch / 16)"
    epoch = facts.num_images / batch_size
    epochs = min(max(12.0, 12 * math.sqrt(118_000 / facts.num_images)), 100)
    on_gpu, on_cpu = math.ceil(epochs * epoch), math.ceil(12 * epoch)
    max_iter = max_iter or (max(200, on_gpu) if device.is_gpu else min(max(on_cpu, 400), 2000))
    reasons["max_iter"] = (
        f"{max_iter / epoch:.1f} epochs of {facts.num_images} images"
        if max_iter >= epoch
        else f"only {max_iter * batch_size} of {facts.num_images} images are seen"
    )
    log_period = max(1, min(20, max_iter // 20))
    eval_period = max(math.ceil(max_iter / 10), math.ceil(epoch))
    eval_period = math.ceil(eval_period / log_period) * log_period
    return Plan(
        short_side,
        max_side,
        batch_size,
        learning_rate,
        max_iter,
        min(1000 / max_iter, 0.1),
        min(eval_period, max_iter),
        log_period,
        min(4, device.cores) if device.is_gpu or device.cores > 4 else 0,
        recompute,
        reasons,
    )


def _image_bytes(
    encoder: dict[str, Any], short_side: int, max_side: int, half: bool, recompute: bool
) -> float:
    pixels = short_side * min(max_side, 1.5 * short_side)
    tokens = pixels / encoder["patch_size"] ** 2
    stored = 42 * tokens * encoder["embed_dim"] * encoder["depth"]
    size = stored * (0.1 if recompute else 1) + 800 * pixels + 0.3 * _GIB
    return size if half else 2 * size


def anchor_warnings(
    facts: DataFacts, short_side: int, anchor_sides: Sequence[int] = ANCHOR_SIDES
) -> list[str]:
    """Say which objects the detector's anchors do not fit, with numbers and a remedy.

    An object fits if an anchor of the same centre has an IoU of at least 0.3 with it; the RPN
    learns others by their single best anchor alone. There is a sentence for each problem of more
    than a twentieth of the objects.
    """
    if not len(sizes := facts.object_sizes * short_side):
        return []
    fits = _best_anchor_iou(sizes, anchor_sides) >= _BACKGROUND_IOU
    sides = np.sqrt(sizes.prod(axis=1))
    small = ~fits & (sides < anchor_sides[0])
    large = ~fits & (sides > anchor_sides[-1])
    thin = ~fits & ~small & ~large
    warnings = []
    at = f"at a shorter side of {short_side} pixels"
    if small.mean() > 0.05:
        # At this shorter side nineteen of twenty objects are as large as an anchor can fit.
        needed = (
            0.55 * anchor_sides[0] / float(np.quantile(np.sqrt(facts.object_sizes.prod(1)), 0.05))
        )
        remedy = (
            f"--short-side {math.ceil(needed / 32) * 32} would fit them"
            if needed <= 1600
            else "cut the pictures into tiles for training, and predict with --slice"
        )
        warnings.append(
            f"{small.mean():.0%} of the objects are too small for the anchors {at} (their median "
            f"side is {np.median(sides[small]):.0f} pixels, the smallest anchor has "
            f"{anchor_sides[0]}, the finest stride is 4); {remedy}."
        )
    if large.mean() > 0.05:
        warnings.append(
            f"{large.mean():.0%} of the objects are too large for the anchors {at} (their median "
            f"side is {np.median(sides[large]):.0f} pixels, the largest anchor has "
            f"{anchor_sides[-1]}); give a smaller --short-side."
        )
    if thin.mean() > 0.05:
        ratio = sizes[thin].max(axis=1) / sizes[thin].min(axis=1)
        warnings.append(
            f"{thin.mean():.0%} of the objects are too thin for the anchors (their sides are in a "
            f"ratio of {np.median(ratio):.1f}, those of the anchors of at most "
            f"{max(ANCHOR_RATIOS):g}); add ratios to "
            "model.proposal_generator.anchor_generator.aspect_ratios in the config."
        )
    return warnings


def _best_anchor_iou(sizes: np.ndarray, anchor_sides: Sequence[int]) -> np.ndarray:
    """IoU of each object (M, 2) with the best anchor of the same centre."""
    roots = np.sqrt(ANCHOR_RATIOS)
    anchors = np.multiply.outer(anchor_sides, np.stack([roots, 1 / roots], 1)).reshape(-1, 2)
    overlap = np.minimum(sizes[:, None], anchors).prod(axis=2)
    union = sizes.prod(axis=1)[:, None] + anchors.prod(axis=1) - overlap
    return (overlap / union).max(axis=1)


_CONFIG = '''"""Detector on own annotations.

    tools/train_net.py --config-file THIS_FILE --resume
"""

from pathlib import Path

from flsl_d2.model_zoo import get_config

_folder = Path(__file__).absolute().parent
_recipe = get_config({recipe!r})
dataloader, lr_multiplier = _recipe["dataloader"], _recipe["lr_multiplier"]
model, optimizer, train = _recipe["model"], _recipe["optimizer"], _recipe["train"]
'''


class InFolder(str):
    """Path relative to the folder of the generated config, which may be moved."""


def config_text(recipe: str, settings: Sequence[tuple[str, Any, str]]) -> str:
    """Write a LazyConfig: a recipe, and key, plain value and reason of what differs from it.

    A value enters as its ``repr`` alone; keys, reasons and the rest are texts of this package.
    """
    lines = [_CONFIG.format(recipe=recipe)]
    for key, value, reason in settings:
        lines += [f"# {reason[0].upper()}{reason[1:]}."] if reason else []
        lines.append(f"{key} = {literal(value)}")
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    """Return a plain value as Python code that gives it back."""
    if isinstance(value, InFolder):
        return f"str(_folder / {str(value)!r})"
    if isinstance(value, str):
        # OmegaConf would take ${...} for a reference; a backslash before it is doubled.
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(v)}" for k, v in value.items()) + "}"
    return repr(value)
