"""Image files of a folder, a pattern, a list of paths or a registered data set.

What a file holds decides whether it is an image. A name with the suffix of an image is believed
here, and its content is looked at when it is read; other files are opened for their first bytes.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from flsl_d2.annotations.datasets import check_registered_name
from flsl_d2.annotations.records import read_picture_files
from flsl_d2.errors import InputError, MachineError
from flsl_d2.files import machine_errors
from flsl_d2.images.opening import IMAGE_SUFFIXES, holds_image, printable

# Formats of cameras and phones that the reader does not know.
_UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw"}
# After so many files of a suffix that hold no image, others of it are not opened.
_OPENED_OF_A_SUFFIX = 1000
_NAMED_KINDS = 6

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
        unread: files that hold no image that can be read; hidden ones are not listed.
    """

    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """Say how many files are left out and why, by kind; empty where none is."""
        parts = []
        if self.unread:
            parts.append(
                f"{len(self.unread)} files that hold no image ({_kinds(self.unread)}), such as "
                f"'{printable(min(self.unread))}'"
            )
        if self.hidden:
            parts.append(
                f"{len(self.hidden)} image files that are hidden or lie in folders of the "
                f"operating system, such as '{printable(min(self.hidden))}'"
            )
        convert = any(os.path.splitext(file)[1].lower() in _UNREAD_SUFFIXES for file in self.unread)
        advice = "; convert pictures of other formats to JPEG or PNG" * convert
        return f"left out: {' and '.join(parts)}{advice}" if parts else ""

    def add(self, path: str, hidden: bool, opened: Counter[str]) -> None:
        """Add a file to the list it belongs to; ``opened`` counts those in vain by suffix."""
        suffix = os.path.splitext(path)[1].lower()
        is_image = suffix in IMAGE_SUFFIXES
        if not (is_image or hidden) and (not suffix or opened[suffix] < _OPENED_OF_A_SUFFIX):
            is_image = _is_image(path)
            opened[suffix] += -_OPENED_OF_A_SUFFIX if is_image else 1
        if is_image:
            (self.hidden if hidden else self.files).append(path)
        elif not hidden:
            self.unread.append(path)


def _kinds(files: Sequence[str]) -> str:
    """Count files by suffix, such as ``120 .txt, 3 .heic``."""
    counts = Counter(os.path.splitext(file)[1].lower()[:12] or "no suffix" for file in files)
    named = [f"{count} {printable(kind)}" for kind, count in counts.most_common(_NAMED_KINDS)]
    rest = len(files) - sum(count for _, count in counts.most_common(_NAMED_KINDS))
    return ", ".join(named + [f"{rest} others"] * bool(rest))


def _is_image(path: str) -> bool:
    try:
        return holds_image(path)
    except (OSError, MachineError) as error:
        _own_fault(error)
        return False


def _own_fault(error: OSError | MachineError) -> OSError:
    """Return an error of one file or folder, a lack of permission among them; raise others."""
    if isinstance(error, OSError):
        return error
    if not isinstance(error.__cause__, PermissionError):
        raise error
    return error.__cause__


def named_like_an_image(place: str, names: Sequence[str]) -> list[str]:
    """Choose the names with an image's suffix, where files cannot be opened; count the others."""
    kept = [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    rest = FoundImages(unread=sorted(set(names) - set(kept)))
    if rest.unread:
        logger.warning("%s: %s.", place, rest.left_out())
    return kept


def find_images(root: str | Path) -> list[str]:
    """List the files of :func:`search_images`; a warning counts those that are left out."""
    found = search_images(root)
    if left_out := found.left_out():
        logger.warning("%s: %d images; %s.", root, len(found.files), left_out)
    return found.files


def search_images(root: str | Path) -> FoundImages:
    """Find image files: below a folder, of a glob pattern, or named in a text file.

    A folder may be ImageNet's layout or any other tree; its images are sorted. Links are followed,
    and each folder is entered once. Hidden files, the folders of operating systems and files that
    hold no image are left out and counted. Folders that may not be listed (``lost+found`` of a file
    system) are named in a warning. A pattern such as ``photos/*/2024*`` matches files and folders,
    and ``**`` any depth. A text file has one path a line, relative to its own folder; empty lines
    and those that begin with ``#`` are skipped, and the order is kept.

    Args:
        root: folder, pattern, text file, or one image.

    Raises:
        InputError: there is no such folder, list or match, or no image in it.
    """
    root = Path(root).expanduser()
    found = FoundImages()
    if root.is_dir():
        _add_folder(found, root, Counter())
    elif root.is_file():
        return FoundImages([str(root)] if _is_image(str(root)) else _listed_files(root))
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


def _add_folder(found: FoundImages, root: Path, opened: Counter[str]) -> None:
    """Add the images below a folder."""
    for folder, names in _folders(root):
        hidden = _is_hidden(os.path.relpath(folder, root)) if folder != str(root) else False
        for name in names:
            path = f"{folder.removesuffix(os.sep)}{os.sep}{name}"
            found.add(path, hidden or _is_hidden(name), opened)


def _add_matches(found: FoundImages, matches: list[str]) -> None:
    """Add what a pattern matches; a file that several matches hold counts once."""
    opened: Counter[str] = Counter()
    for match in matches:
        if os.path.isdir(match):
            _add_folder(found, Path(match), opened)
        else:
            found.add(match, _is_hidden(os.path.basename(match)), opened)
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
    folder = os.path.abspath(file.parent)
    paths = [os.path.join(folder, os.path.expanduser(name)) for name in names]
    strange = [n for n in names if os.path.splitext(n)[1].lower() not in IMAGE_SUFFIXES]
    strange = [n for n in strange if "\0" in n or not os.path.isfile(os.path.join(folder, n))]
    if strange or not names:
        reason = (
            f"line '{printable(strange[0][:80])}' names no image file" if strange else "it is empty"
        )
        raise InputError(
            f"dataset.root is '{file}', which is not a folder and no list of image files "
            f"({reason}); set it to a folder, or to a text file with the path of an image in every "
            "line."
        )
    return paths


def _folders(root: Path) -> list[tuple[str, list[str]]]:
    """Each folder below the root, itself included, with the names of its files."""
    folders: list[tuple[str, list[str]]] = []
    entered: set[tuple[int, int]] = set()
    pending = [str(root)]
    while pending:
        folder = pending.pop()
        try:
            with machine_errors(folder):
                status = os.stat(folder)
                # A link back to a parent: walked again and again, it would multiply every image.
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                subfolders, names = _listed(folder)
        except (OSError, MachineError) as error:
            cause = _own_fault(error)
            logger.warning("%s is left out: %s", printable(str(cause.filename)), cause.strerror)
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
    """Files of the registered data set ``name`` where given, else of :func:`search_images`.

    Labels of a registered data set are not looked at, and need not be there.
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
