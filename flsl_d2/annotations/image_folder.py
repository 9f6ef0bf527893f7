"""Picture files that an annotation file names, found in spite of other spellings.

Annotation tools on other systems write names with backslashes, repeat the image folder, quote
characters as in a URL, or use another Unicode form or letter case than the file.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager


class FoundFile(NamedTuple):
    """The search result for one ``file_name``.

    Attributes:
        file_name: name below the image folder as the file spells it; None where no file was found.
        suggestion: name of a file that may be meant, where no file was found; otherwise empty.
    """

    file_name: str | None
    suggestion: str = ""


def stays_inside(file_name: str) -> bool:
    """Whether a name, which comes from a stranger, cannot lead out of the image folder.

    A name with ``..`` may lead out even if its text does not: after a link, ``..`` is the parent
    of the link's target.
    """
    plain = unquote(file_name).replace("\\", "/")
    return not plain.startswith("/") and ".." not in plain.split("/") and plain[1:3] != ":/"


class ImageFolder:
    """Folder of pictures whose listings are read once each."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._names: dict[str, dict[str, list[str]] | None] = {}
        self._sets: dict[str, set[str]] = {}

    def exists(self) -> bool:
        """Whether the folder is there and may be listed."""
        return self._listing("") is not None

    def find(self, file_names: Sequence[str], max_suggestions: int = 10) -> list[FoundFile]:
        """Find the file of each name.

        A file that another name spells exactly is not found a second time.

        Args:
            file_names: names below the folder, as an annotation file has them.
            max_suggestions: number of missing files for which similar names are searched.
        """
        found = [FoundFile(name if self._is_there(name) else None) for name in file_names]
        taken = {result.file_name for result in found}
        for i, name in enumerate(file_names):
            if found[i].file_name is not None:
                continue
            other = self._other_spelling(name) if stays_inside(self._relative(name)) else None
            if other is not None and other not in taken:
                found[i] = FoundFile(other)
                taken.add(other)
            elif max_suggestions > 0:
                found[i] = FoundFile(None, other or self._suggestion(name))
                max_suggestions -= 1
        return found

    def _listing(self, folder: str) -> dict[str, list[str]] | None:
        """Names in a subfolder by their simplified spelling; None if it cannot be listed."""
        if folder not in self._names:
            try:
                names = sorted(PathManager.ls(os.path.join(self.root, folder)))
            except (OSError, ValueError):
                self._names[folder] = None
            else:
                spellings: dict[str, list[str]] = {}
                for name in names:
                    spellings.setdefault(_simplified(name), []).append(name)
                self._names[folder], self._sets[folder] = spellings, set(names)
        return self._names[folder]

    def _is_there(self, file_name: str) -> bool:
        if not stays_inside(file_name) or file_name.endswith("/"):
            return False
        folder, name = os.path.split(file_name)
        return self._listing(folder) is not None and name in self._sets[folder]

    def _relative(self, file_name: str) -> str:
        """Take the path of the folder off a name that is written with it."""
        root = os.path.abspath(self.root) + "/"
        return file_name[len(root) :] if file_name.startswith(root) else file_name

    def _other_spelling(self, file_name: str) -> str | None:
        own_name = _simplified(os.path.basename(os.path.abspath(self.root)))
        for text in (self._relative(file_name), unquote(self._relative(file_name))):
            parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
            repeated = len(parts) > 1 and _simplified(parts[0]) == own_name
            for candidate in (parts, parts[1:]) if repeated else (parts,):
                name = self._walk(candidate)
                if name is not None:
                    return name
        return None

    def _walk(self, parts: Sequence[str]) -> str | None:
        """Find the only file whose path has these parts, in any letter case and Unicode form."""
        folder = ""
        for part in parts:
            listing = self._listing(folder) or {}
            same = listing.get(_simplified(part), [])
            if part in same:
                same = [part]
            if len(same) != 1:
                return None
            folder = os.path.join(folder, same[0])
        return folder or None

    def _suggestion(self, file_name: str) -> str:
        parts = [p for p in unquote(file_name).replace("\\", "/").split("/") if p]
        parts = [part for part in parts if part not in (".", "..")]
        for start in range(1, len(parts)):
            name = self._walk(parts[start:])
            if name is not None:
                return name
        if not parts:
            return ""
        folder = os.path.join("", *parts[:-1])
        stem = _simplified(os.path.splitext(parts[-1])[0]) + "."
        listing = self._listing(folder) or {}
        same_stem = [names[0] for spelling, names in listing.items() if spelling.startswith(stem)]
        return os.path.join(folder, same_stem[0]) if len(same_stem) == 1 else ""


def _simplified(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
