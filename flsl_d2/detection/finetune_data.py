"""The data of a fine-tuning run: converted, checked, split and measured."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flsl_d2.annotations import Use, check_coco_files
from flsl_d2.annotations.coco_file import read_coco, write_coco
from flsl_d2.annotations.convert import convert_to_coco, recognise_annotations
from flsl_d2.annotations.records import load_coco
from flsl_d2.annotations.splitting import split_by_image
from flsl_d2.detection.finetune_plan import DataFacts, collect_facts
from flsl_d2.errors import InputError
from flsl_d2.images.stored_values import find_channels

# Share of the objects that must have a mask for a detector of masks to be chosen.
_MASK_SHARE = 0.99


@dataclass(frozen=True)
class OwnData:
    """The two parts of the data.

    Attributes:
        train: annotations to train on, in COCO's format; ``val`` are those to validate on.
        records: the training part in Detectron2's format; ``facts`` describe it.
        names: names of the classes.
        lines: findings to print.
        channels: number of channels whose stored values are fed to the model; 0 for RGB.
    """

    train: Path
    val: Path
    records: list[dict[str, Any]]
    names: list[str]
    has_masks: bool
    facts: DataFacts
    lines: list[str]
    channels: int


def prepare_data(args: argparse.Namespace, staging: Path) -> OwnData:
    """Convert, check and split the annotations."""
    lines: list[str] = []
    folder = staging / "annotations"
    train = _as_coco(args.annotations, args.images, folder / "converted.json", lines)
    images_of_val = args.val_images or args.images
    names = check_coco_files(train, args.images, Use.BOXES, open_pictures=True)
    if args.val_annotations:
        target = folder / "converted_val.json"
        val = _as_coco(args.val_annotations, images_of_val, target, lines, names)
        how = "as given"
    else:
        parts = split_by_image(read_coco(train), args.val_share, args.seed, args.val_group)
        train, val = folder / "train.json", folder / "val.json"
        for part, path in zip(parts, (train, val), strict=True):
            write_coco(path, part)
        how = f"split off by image with seed {args.seed}"
        how += f", images with the same {args.val_group!r} together" if args.val_group else ""
    records = load_coco(str(train), args.images)
    facts = collect_facts(records, names)
    if not facts.num_images:
        raise InputError(f"no image of '{train}' has an object, so nothing can be learned.")
    has_masks = args.task == "masks" or (not args.task and facts.mask_share >= _MASK_SHARE)
    without = facts.num_objects - round(facts.mask_share * facts.num_objects)
    if not has_masks and not args.task and facts.mask_share:
        lines.append(
            f"warning: {without} of {facts.num_objects} objects have no mask "
            f"({_without_mask(records)}), so boxes are learned and the other masks are not used; "
            "draw the missing ones to learn masks."
        )
    use = Use.BOXES | Use.MASKS if has_masks else Use.BOXES
    off = "--task boxes"
    check_coco_files(train, args.images, use, masks_off=off)
    both, opened = use | Use.EVALUATION, bool(args.val_annotations)
    val_names = check_coco_files(val, images_of_val, both, masks_off=off, open_pictures=opened)
    if val_names != names:
        raise InputError(
            f"the classes of '{args.annotations}' ({', '.join(names)}) and of "
            f"'{args.val_annotations}' ({', '.join(val_names)}) differ; both need the same "
            "categories in the same order of their ids."
        )
    val_records = load_coco(str(val), images_of_val)
    num_val = sum(any(not a["iscrowd"] for a in r["annotations"]) for r in val_records)
    if not num_val:
        raise InputError(
            f"no image of '{args.val_annotations or val}' has an object, so nothing can be "
            "measured; give other validation annotations or leave them out."
        )
    lines += _data_lines(facts, len(val_records), how)
    files = [record["file_name"] for record in [*records, *val_records]]
    channels, bits = find_channels(files)
    if channels:
        lines.append(
            f"Images of {channels} channels and {bits} bits: their stored values are used, "
            "normalised by the mean and the standard deviation of the training images."
        )
    return OwnData(train, val, records, names, has_masks, facts, lines, channels)


def _without_mask(records: Sequence[dict[str, Any]]) -> str:
    files = [
        Path(r["file_name"]).name
        for r in records
        if any(not a["iscrowd"] and not a.get("segmentation") for a in r["annotations"])
    ]
    return f"in {', '.join(files[:5])}" + (f" and {len(files) - 5} more" if len(files) > 5 else "")


def _data_lines(facts: DataFacts, num_val: int, how: str) -> list[str]:
    shown = ", ".join(f"{name} {count}" for name, count in list(facts.class_counts.items())[:10])
    more = ", ..." * (len(facts.class_counts) > 10)
    lines = [
        f"Data: {facts.num_images} images to train on with {facts.num_objects} objects ({shown}"
        f"{more}), {num_val} images to validate on ({how})."
    ]
    if facts.num_without:
        lines.append(f"{facts.num_without} images without objects are left out of training.")
    empty = [name for name, count in facts.class_counts.items() if not count]
    if empty:
        some = ", ".join(empty[:10]) + ", ..." * (len(empty) > 10)
        lines.append(
            f"warning: no training image has an object of {some}, so nothing is learned of it."
        )
    if facts.max_objects > 100:
        lines.append(
            f"warning: an image has {facts.max_objects} objects, and the detector reports 100 at "
            "most; raise model.roi_heads.box_predictor.test_topk_per_image in the config."
        )
    return lines


def _as_coco(
    annotations: str, images: str, output: Path, lines: list[str], labels: Sequence[str] = ()
) -> Path:
    """Convert annotations where they are not in COCO's format."""
    source = recognise_annotations(annotations)
    if source.kind == "COCO":
        return source.path
    content, account = convert_to_coco(source, images, labels)
    write_coco(output, content)
    lines += account
    return output
