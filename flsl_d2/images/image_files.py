"""Image files of a folder, a pattern, a list of paths or a registered data set."""

from __future__ import annotations

import glob
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.annotations.annotations import check_registered_name
from flsl_d2.annotations.coco_records import read_picture_files
from flsl_d2.errors import InputError
from flsl_d2.images.images import printable

_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif"}
IMAGE_SUFFIXES = _JPEG_SUFFIXES | {".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"}
# Formats of cameras and phones that the reader does not know.
_UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw"}

# Folders in which operating systems and file servers keep previews, resource forks and deleted
# files, beside those whose names begin with a dot (.Trash-1000, .ipynb_checkpoints).
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "#recycle"}

logger = logging.getLogger(__name__)


@dataclass
class FoundImages:
    """Image files below a folder, of a pattern or of a list, and what was left out.

    Attributes:
        files: paths of the images, in the order in which they are numbered.
        hidden: hidden image files, and those in folders of the operating system.
        unread: image files of formats that are not read.
        watched: folders or the list that change when files are added or removed; empty if unknown.
    """

    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """Say how many image files are left out and why; empty where none is."""
        kinds = {
            "that are hidden or lie in folders of the operating system": self.hidden,
            "of formats that are not read (convert them to JPEG or PNG)": self.unread,
        }
        return "; ".join(
            f"{len(paths)} image files {kind}, such as '{printable(min(paths))}', are left out"
            for kind, paths in kinds.items()
            if paths
        )


def find_images(root: str | Path) -> list[str]:
    """List the files of :func:`search_images`; a warning counts those that are left out.

    Raises:
        InputError: there is no such folder, list or match, or no image in it.
    """
    found = search_images(root)
    if left_out := found.left_out():
        logger.warning("%s: %s.", root, left_out)
    return found.files


def search_images(root: str | Path) -> FoundImages:
    """Find image files: below a folder, of a glob pattern, or named in a text file.

    A folder may be ImageNet's layout or any other tree; its images are sorted. Links are followed,
    and each folder is entered once. Hidden files, the folders of operating systems and images of
    formats that are not read are left out and counted. Folders that may not be listed
    (``lost+found`` of a file system) are named in a warning. A pattern such as ``photos/*/2024*``
    matches files and folders, and ``**`` any depth. A text file has one path a line, relative to
    its own folder; empty lines and those that begin with ``#`` are skipped, and the order is kept.

    Args:
        root: folder, pattern or text file.

    Raises:
        InputError: there is no such folder, list or match, or no image in it.
    """
    root = Path(root).expanduser()
    found = FoundImages()
    if root.is_dir():
        found.watched = _add_folder(found, root)
    elif root.is_file():
        return FoundImages(_listed_files(root), watched=[str(root)])
    elif matches := glob.glob(str(root), recursive=True):
        _add_matches(found, matches)
    else:
        raise InputError(
            f"dataset.root is '{root}', which is not a folder and matches no file; set it to a "
            "folder of images, a pattern such as 'photos/**/*.jpg' or a text file of paths, or "
            "set dataset.name to a registered data set."
        )
    if not found.files:
        left_out = found.left_out()
        raise InputError(
            f"dataset.root is '{root}', which holds no image file "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}){'; ' * bool(left_out)}{left_out}; set it to a "
            "folder of images."
        )
    found.files.sort()
    return found


def _add_folder(found: FoundImages, root: Path) -> list[str]:
    """Add the images below a folder; return the folders."""
    folders = _folders(root)
    for folder, names in folders:
        hidden = _is_hidden(os.path.relpath(folder, root)) if folder != str(root) else False
        for name in names:
            _add_file(
                found, f"{folder.removesuffix(os.sep)}{os.sep}{name}", hidden or _is_hidden(name)
            )
    return [folder for folder, _ in folders]


def _add_file(found: FoundImages, path: str, hidden: bool) -> None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        (found.hidden if hidden else found.files).append(path)
    elif suffix in _UNREAD_SUFFIXES:
        found.unread.append(path)


def _add_matches(found: FoundImages, matches: list[str]) -> None:
    """Add what a pattern matches; a file that several matches hold counts once."""
    for match in matches:
        if os.path.isdir(match):
            _add_folder(found, Path(match))
        else:
            _add_file(found, match, _is_hidden(os.path.basename(match)))
    for paths in (found.files, found.hidden, found.unread):
        paths[:] = dict.fromkeys(paths)


def _listed_files(file: Path) -> list[str]:
    """Absolute paths that a text file names."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(
            f"dataset.root is '{file}', which cannot be read ({error.strerror}); set it to a "
            "folder of images or a text file of their paths."
        ) from error
    names = [name for line in lines if (name := line.strip()) and not name.startswith("#")]
    strange = [name for name in names if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES]
    if strange or not names:
        reason = (
            f"line '{printable(strange[0][:80])}' names no image file" if strange else "it is empty"
        )
        raise InputError(
            f"dataset.root is '{file}', which is not a folder and no list of image files "
            f"({reason}); set it to a folder, or to a text file with the path of an image in every "
            "line."
        )
    folder = os.path.abspath(file.parent)
    return [os.path.join(folder, os.path.expanduser(name)) for name in names]


def _folders(root: Path) -> list[tuple[str, list[str]]]:
    """Each folder below the root, itself included, with the names of its files."""

    folders: list[tuple[str, list[str]]] = []
    entered: set[tuple[int, int]] = set()
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            # A link back to a parent: walked again and again, it would multiply every image.
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            subfolders, names = _listed(folder)
        except OSError as error:
            logger.warning("%s is left out: %s", printable(str(error.filename)), error.strerror)
            continue
        # A folder that is linked from a hidden one is entered by its other name.
        subfolders.sort(key=lambda name: (_is_hidden(name), name), reverse=True)
        pending += [os.path.join(folder, name) for name in subfolders]
        folders.append((folder, names))
    return folders


def _listed(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder."""
    folders: list[str] = []
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # Asking where a link points costs more than the rest, so one that is named like an
            # image counts as a file.
            is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            is_folder = entry.is_dir(follow_symlinks=not is_image)
            (folders if is_folder else names).append(entry.name)
    return folders, names


def _is_hidden(path: str) -> bool:
    parts = path.split(os.sep)
    return any(part.startswith(".") or part.casefold() in _SYSTEM_FOLDERS for part in parts)


def image_files(root: str = "", name: str = "") -> list[str]:
    """Files of the data set: of the registered ``name`` where given, else of ``root``.

    Args:
        root: folder, pattern or text file; see :func:`search_images`.
        name: name of a registered data set.

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
