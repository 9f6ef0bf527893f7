"""Image files of a folder or of a registered data set."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.data.annotations import check_registered_name
from flsl_d2.data.coco_records import read_picture_files
from flsl_d2.data.images import printable
from flsl_d2.errors import InputError

__all__ = ["find_images", "image_files"]

_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
IMAGE_SUFFIXES = _JPEG_SUFFIXES | {".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"}
# Formats of cameras and phones that the reader does not know.
_UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw"}

# Folders in which operating systems and file servers keep previews, resource forks and deleted
# files, beside those whose names begin with a dot (.Trash-1000, .ipynb_checkpoints).
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "#recycle"}

logger = logging.getLogger(__name__)


def find_images(root: str | Path) -> list[str]:
    """List all image files below a folder, sorted: ImageNet's layout or any other tree.

    Links are followed, and each folder is entered once. Hidden files, the folders of operating
    systems and images of formats that are not read are left out and counted in a message. Folders
    that may not be listed (``lost+found`` of a file system) are named in a warning.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise InputError(
            f"dataset.root is '{root}', which is not a folder; set it to a folder of images, or "
            "set dataset.name to a registered data set."
        )
    found: list[str] = []
    hidden: list[str] = []
    unread: list[str] = []
    for folder, names in _folders(root):
        for name in names:
            path = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                (hidden if _is_hidden(os.path.relpath(path, root)) else found).append(path)
            elif suffix in _UNREAD_SUFFIXES:
                unread.append(path)
    kinds = {
        "that are hidden or lie in folders of the operating system": hidden,
        "of formats that are not read (convert them to JPEG or PNG)": unread,
    }
    left_out = "; ".join(
        f"{len(paths)} image files {kind}, such as '{printable(min(paths))}', are left out"
        for kind, paths in kinds.items()
        if paths
    )
    if not found:
        raise InputError(
            f"dataset.root is '{root}', which holds no image file "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}){'; ' * bool(left_out)}{left_out}; set it to a "
            "folder of images."
        )
    if left_out:
        logger.warning("%s: %s.", root, left_out)
    return sorted(found)


def _folders(root: Path) -> list[tuple[str, list[str]]]:
    """Each folder below the root, itself included, with the names of its files."""

    def log_unlisted(error: OSError) -> None:
        logger.warning("%s is left out: %s", printable(str(error.filename)), error.strerror)

    folders, entered = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=log_unlisted):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            # A link back to a parent: walked again and again, it would multiply every image.
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # A folder that is linked from a hidden one is entered by its other name.
        subfolders.sort(key=lambda name: (_is_hidden(name), name))
        folders.append((folder, names))
    return folders


def _is_hidden(path: str) -> bool:
    parts = path.split(os.sep)
    return any(part.startswith(".") or part.casefold() in _SYSTEM_FOLDERS for part in parts)


def image_files(root: str = "", name: str = "") -> list[str]:
    """Files of the data set: of the registered ``name`` where given, else below ``root``.

    Labels of a registered data set are not looked at, and need not be there.

    Raises:
        InputError: there are no images, or the data set cannot be used.
    """
    if not name:
        return find_images(root)
    check_registered_name(name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") == "coco" and json_file and image_root:
        return read_picture_files(json_file, image_root)
    records = DatasetCatalog.get(name)
    files = [record["file_name"] for record in records if record.get("file_name")]
    if not files or len(files) < len(records):
        raise InputError(
            f"dataset.name is '{name}', where {len(records) - len(files)} of {len(records)} "
            "records have a file_name missing; name a data set of image files."
        )
    return files
