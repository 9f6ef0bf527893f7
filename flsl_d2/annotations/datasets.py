"""Registration of data sets in Detectron2's catalog, by name or by their two paths."""

from __future__ import annotations

import difflib
import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from flsl_d2.annotations.checks import check_coco_files
from flsl_d2.annotations.findings import Use
from flsl_d2.annotations.imagenet_boxes import register_imagenet_boxes
from flsl_d2.annotations.records import load_coco
from flsl_d2.errors import InputError
from flsl_d2.files import file_sha256

# name: (annotation file, image folder), below the folder of all data sets
_BUILTIN = {
    "pennfudan_train": ("pennfudan/annotations/instances_train.json", "pennfudan/images"),
    "pennfudan_val": ("pennfudan/annotations/instances_val.json", "pennfudan/images"),
    "flsl_scenes_train": ("flsl_scenes/annotations/instances_train.json", "flsl_scenes/train"),
    "flsl_scenes_val": ("flsl_scenes/annotations/instances_val.json", "flsl_scenes/val"),
    "uavdt_train": ("uavdt/annotations/instances_train.json", "uavdt/UAV-benchmark-M"),
    "uavdt_test": ("uavdt/annotations/instances_test.json", "uavdt/UAV-benchmark-M"),
    # Version 2, whose file names begin with images/v1/patch0.
    "objects365_train": ("objects365/annotations/zhiyuan_objv2_train.json", "objects365/train"),
    "objects365_val": ("objects365/annotations/zhiyuan_objv2_val.json", "objects365/val"),
}
_IMAGENET = "imagenet_boxes"


def datasets_root() -> str:
    """Return the folder of all data sets: ``$DETECTRON2_DATASETS`` or ``datasets``."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def _registered_files(name: str) -> tuple[str | None, str | None]:
    metadata = MetadataCatalog.get(name)
    return metadata.get("json_file"), metadata.get("image_root")


def register_coco_format(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    replace: bool = False,
) -> None:
    """Register a data set in COCO format under a name for ``DATASETS.TRAIN`` or a dataloader.

    Nothing is read, so that the files need not exist before the data set is used. Registering the
    same files again changes nothing; a name of other files is an InputError, or is replaced.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if name in DatasetCatalog:
        if _registered_files(name) == (json_file, image_root):
            return
        if not replace:
            raise InputError(
                f"the data set name {name!r} is already registered with "
                f"{_registered_files(name)[0] or 'a loader of its own'}: choose another name for "
                f"{json_file}."
            )
        DatasetCatalog.remove(name)
    # Metadata may stay behind from a name that was removed, and it refuses other values.
    if name in MetadataCatalog:
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(load_coco, json_file, image_root, name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")


def use_own_loader(name: str) -> None:
    """Let :func:`load_coco` read a name that ``register_coco_instances`` registered."""
    register_known(name)
    if name not in DatasetCatalog:
        return
    if getattr(DatasetCatalog[name], "__module__", "") == "detectron2.data.datasets.coco":
        json_file, image_root = _registered_files(name)
        if json_file and image_root:
            DatasetCatalog[name] = partial(load_coco, json_file, image_root, name)


def register_scenes(root: str | os.PathLike[str], name: str = "flsl_scenes") -> None:
    """Register the scenes of ``make_scenes(root)`` as ``{name}_train`` and ``{name}_val``."""
    root = Path(root).expanduser()
    for split in ("train", "val"):
        annotations = root / "annotations" / f"instances_{split}.json"
        register_coco_format(f"{name}_{split}", annotations, root / split, replace=True)


def register_builtin(root: str | os.PathLike[str] | None = None) -> None:
    """Register the data sets that this package knows; names already taken stay as they are.

    They are ``pennfudan_train/val``, ``flsl_scenes_train/val``, ``uavdt_train/test``,
    ``objects365_train/val`` and ``imagenet_boxes_train/val``. The tools register one of them when
    its name is used, so that a project that imports this one may have the names for itself.

    Args:
        root: folder of all data sets; that of :func:`datasets_root` by default.
    """
    for name in (*_BUILTIN, _IMAGENET):
        register_known(name, root)


def register_known(name: str, root: str | os.PathLike[str] | None = None) -> None:
    """Register a name of :func:`register_builtin`, or ``ANNOTATIONS.json:IMAGES``, if it is new."""
    root = datasets_root() if root is None else os.fspath(root)
    stem, separator, image_root = name.partition(".json:")
    if name.startswith(_IMAGENET):
        register_imagenet_boxes(os.path.join(root, "imagenet"))
    elif name in DatasetCatalog:
        return
    elif name in _BUILTIN:
        json_file, image_root = (os.path.join(root, part) for part in _BUILTIN[name])
        register_coco_format(name, json_file, image_root)
    elif separator:
        json_file = os.path.expanduser(f"{stem}.json")
        register_coco_format(name, json_file, os.path.expanduser(image_root))


def check_registered_name(name: str) -> None:
    """Raise an InputError that lists similar names if no data set of this name is registered."""
    register_known(name)
    if name in DatasetCatalog:
        return
    known = sorted({*DatasetCatalog.list(), *_BUILTIN})
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    near += [other for other in known if name and name in other and other not in near][:4]
    hint = f"did you mean {', '.join(near)}" if near else f"{len(known)} other names are known"
    raise InputError(
        f"the data set {name!r} is not registered ({hint}): register your own before using it, "
        f"with flsl_d2.annotations.register_coco_format({name!r}, json_file, image_root)."
    )


def check_registered_dataset(
    name: str,
    use: Use = Use.BOXES,
    max_report: int = 10,
    **options: Any,
) -> list[str]:
    """Check that a data set's name is known, and its files as :func:`check_coco_files` does.

    Returns:
        Names of the categories of a data set in COCO format; else empty.
    """
    check_registered_name(name)
    json_file, image_root = _registered_files(name)
    if MetadataCatalog.get(name).get("evaluator_type") == "coco" and json_file and image_root:
        return check_coco_files(json_file, image_root, use, max_report, **options)
    return []


def register_files(
    json_file: str, image_root: str, keys: tuple[str, str] = ("json_file", "image_root")
) -> str:
    """Register a data set under a name that identifies the content of its annotation file.

    A run whose files have moved has the same name, and one with an edited file another. ``keys``
    are the config keys of the two paths, for messages.

    Raises:
        InputError: only one of the two is given, lists are given, or the same annotations are in
            use with another folder.
    """
    if not json_file or not image_root:
        given, missing = keys if json_file else reversed(keys)
        raise InputError(
            f"{given} is {json_file or image_root!r} but {missing} is empty; a data set in COCO "
            "format needs both."
        )
    for path, key in zip((json_file, image_root), keys, strict=True):
        if not isinstance(path, str):
            raise InputError(
                f"{key} is {path}, but it takes one path; give several data sets by names that are "
                "registered (flsl_d2.annotations.register_coco_format)."
            )
    json_file, image_root = (os.path.expanduser(path) for path in (json_file, image_root))
    try:
        digest = file_sha256(json_file)[:12]
    except OSError:  # reported when the file is used
        digest = "unreadable"
    name = f"{os.path.basename(json_file)}@{digest}"
    if name in DatasetCatalog:
        registered, other = _registered_files(name)
        if registered == json_file and other != image_root:
            raise InputError(
                f"{json_file} is given with two folders of images, {other} and {image_root}; give "
                "the same one, or two annotation files."
            )
    register_coco_format(name, json_file, image_root, replace=True)
    return name


def detection_records(
    names: str | list[str],
    json_file: str = "",
    image_root: str = "",
    filter_empty: bool = True,
    check_consistency: bool = True,
) -> list[dict[str, Any]]:
    """Load the records of data sets by name, or of one given by its files."""
    if json_file or image_root:
        names = register_files(json_file, image_root)
    for name in [names] if isinstance(names, str) else names:
        use_own_loader(name)
    return get_detection_dataset_dicts(
        names, filter_empty=filter_empty, check_consistency=check_consistency
    )
