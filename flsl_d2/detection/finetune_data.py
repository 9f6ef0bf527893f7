"""The input of a fine-tuning run: data checked, split and measured, and the encoder adapted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from timm.layers.patch_embed import resample_patch_embed
from timm.models import adapt_input_conv

from flsl_d2.annotations import Use, check_coco_files
from flsl_d2.annotations.coco_file import read_coco, write_coco
from flsl_d2.annotations.convert import convert_to_coco, recognise_annotations
from flsl_d2.annotations.records import load_coco
from flsl_d2.annotations.splitting import split_by_image
from flsl_d2.detection.finetune_plan import DataFacts, InFolder, collect_facts
from flsl_d2.errors import InputError
from flsl_d2.images.stored_values import find_channels
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX, build_timm_backbone, timm_pyramid
from flsl_d2.weights import build_encoder, write_encoder

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
    if not channels:
        for path, root in ((train, args.images), (val, images_of_val)):
            check_coco_files(path, root, Use.PICTURES, open_pictures=True, image_format="RGB")
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


def prepare_encoder(
    weights: str, freeze: bool, channels: int, staging: Path
) -> tuple[list[str], list[tuple[str, Any, str]], dict[str, Any]]:
    """Read the encoder: lines for the user, settings of the config, and sizes for the plan.

    Patches whose side is no power of two, and images of other than three channels, need another
    patch embedding: its filters are resampled by the pseudo-inverse of resizing (FlexiViT, arXiv
    2212.08013), and repeated over the channels and scaled so that equal channels give what they
    gave before. Both are timm's functions. The encoder is then written to the folder ``staging``.
    """
    frozen = [("model.backbone.net.frozen", True, "the encoder stays as it is")]
    if weights.startswith(TIMM_PREFIX):
        if channels != 3:
            raise InputError(
                f"--weights is '{weights}', and the images have {channels} channels; "
                "give a file of a plain ViT's weights for such images."
            )
        net = build_timm_backbone(weights)
        timm_pyramid(net)  # refuses strides that are no powers of two
        start = f"{build_timm_backbone.__module__}."
        node = {"_target_": f"{start}build_timm_backbone", "text": weights, "frozen": freeze}
        settings: list[tuple[str, Any, str]] = [
            ("model.backbone", {"_target_": f"{start}timm_pyramid", "net": node}, ""),
            ("optimizer.params.lr_factor_func", None, "layers are not decayed"),
        ]
        sizes = {"embed_dim": net.embed_dim, "depth": 12, "patch_size": net.patch_size}
        return [f"Encoder: {weights}."], settings, sizes
    encoder = FLSLViT() if weights == "random" else build_encoder(weights)
    architecture: dict[str, Any] = dict(encoder.architecture)
    lines, file = [f"Encoder: {weights}."], absolute_path(weights)
    patch = 2 ** round(np.log2(architecture["patch_size"]))
    if (patch, channels) != (architecture["patch_size"], architecture["in_chans"]):
        lines.append(
            f"Its patch embedding is adapted from {architecture['patch_size']} pixels and "
            f"{architecture['in_chans']} channels to {patch} pixels and {channels} channels."
        )
        encoder = _adapted(encoder, patch, channels)
        architecture = dict(encoder.architecture)
        write_encoder(encoder, staging / "encoder.pth")
        file = InFolder("encoder.pth")
    if weights == "random":
        file = ""
        lines.append("warning: the encoder is untrained, so expect little of a small data set.")
    settings = [
        (f"model.backbone.net.{key}", architecture[key], "")
        for key, value in FLSLViT().architecture.items()
        if key != "num_prefix_tokens" and architecture[key] != value
    ]
    settings.append(("train.init_checkpoint", file, ""))
    return lines, settings + (frozen if freeze else []), architecture


def _adapted(encoder: FLSLViT, patch: int, channels: int) -> FLSLViT:
    architecture: dict[str, Any] = dict(encoder.architecture)
    grid = architecture["img_size"] // encoder.patch_size
    changed = {"patch_size": patch, "in_chans": channels, "img_size": grid * patch}
    new = FLSLViT(**{**architecture, **changed})
    state, name = encoder.state_dict(), "patch_embed.proj.weight"
    state[name] = adapt_input_conv(channels, resample_patch_embed(state[name], [patch, patch]))
    new.load_state_dict(state)
    if channels == encoder.input_format.channels:
        new.input_format = encoder.input_format
    return new


def absolute_path(path: str | Path) -> str:
    """Return a path that the config can be run with from any folder; URLs stay as they are."""
    text = str(path)
    return text if "://" in text else str(Path(text).expanduser().resolve())
