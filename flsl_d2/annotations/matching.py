"""The one matcher of annotations with picture files: one to one, whole paths before bare names.

Annotation tools on other systems write names with backslashes, with the path of another machine,
quoted as in a URL, or in another Unicode form or letter case than the file.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, takewhile, zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import AnnotatedPicture, simplified
from flsl_d2.images.opening import IMAGE_SUFFIXES

# Folders that separate pictures from annotations and say nothing about which belongs to which.
_NEUTRAL = {"images", "image", "imgs", "img", "labels", "label", "annotations", "jpegimages", "xml"}

# Rank of the name, minus common parts without and with neutral folders, by stem, other spelling.
_Tier = tuple[int, int, int, bool, bool]


def match_names(
    entries: Sequence[Sequence[str | Path]],
    files: Sequence[str],
    roots: tuple[str, str] = ("", ""),
    others: Sequence[Path] = (),
) -> tuple[dict[str, int], dict[int, tuple[str, list[str]]]]:
    """Find the file of each entry, of which several names are given, most trusted first.

    A name fits a file if their last parts are the same, in any letter case and Unicode form; a
    ``Path`` fits files of any suffix. A more trusted name is decided before a less trusted one,
    more common parts before fewer, and the same suffix before another. An entry that fits several
    files equally, entries that claim the same file, and entries without a file get nothing. Below
    the ``roots`` of entries and files, a folder that both sides have contradicts another or none:
    ``cam1/a`` means neither ``cam2/a.png`` nor ``a.png``; ``xmls/a`` may mean ``photos/a.png``.
    ``others`` are more files of the entries' side.

    Returns:
        The entry of each file that has one; and for each other entry why it has none, and the files
        that may be meant.
    """
    below = [_split(f"{root}/x").telling for root in roots]
    entries = [[*names, *_unquoted(names)] for names in entries]
    wanted_of = [[_split(str(name), below[0]) for name in names] for names in entries]
    paths = {file: _split(file, below[1]) for file in files}
    known = [*(_split(str(file), below[0]) for file in others), *chain(*wanted_of)]
    ours = {folder for name in known for folder in name.below or []}
    if any(roots) and any(name.below == [] for name in known):
        ours.add("")  # a file in no folder is told from those in folders
    theirs = {folder for path in paths.values() for folder in path.below or []}
    by_name, by_stem = defaultdict(list), defaultdict(list)
    for file, path in paths.items():
        by_name[path.last].append(file)
        by_stem[os.path.splitext(path.last)[0]].append(file)
    options: dict[_Tier, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    failures: dict[int, tuple[str, list[str]]] = {}
    for i, names in enumerate(entries):
        meant: dict[str, bool] = {}  # file: whether no folder contradicts
        for rank, (name, wanted) in enumerate(zip(names, wanted_of[i], strict=True)):
            plain = os.path.basename(str(name).replace("\\", "/"))
            exact = by_name.get(wanted.last, []) if isinstance(name, str) else []
            stem, suffix = os.path.splitext(wanted.last)
            if not isinstance(name, str) or suffix not in IMAGE_SUFFIXES:
                stem = wanted.last
            for file in dict.fromkeys([*exact, *by_stem.get(stem, [])]):
                first, second = _difference(wanted, paths[file])
                fits = first == second or (first not in theirs and second not in ours)
                meant[file] = fits or meant.get(file, False)
                own = os.path.basename(file)
                differs = plain != (own if file in exact else os.path.splitext(own)[0])
                common = _common(wanted.telling, paths[file].telling)
                whole = _common(wanted.folders, paths[file].folders)
                if fits:
                    options[rank, -common, -whole, file not in exact, differs][i].append(file)
        kind = "annotations of a picture that others have"
        kind = kind if any(meant.values()) else "annotations without a picture"
        failures[i] = kind, [*meant]
    claimed: dict[str, int] = {}
    contested: set[str] = set()
    pending = set(failures)
    for tier in sorted(options):
        claims = defaultdict(list)
        for i in sorted(pending & options[tier].keys()):
            free = [file for file in options[tier][i] if file not in contested]
            if len(free) > 1:
                failures[i] = "annotations that fit several pictures", sorted(free)
                pending.remove(i)
            elif free:
                claims[free[0]].append(i)
        for file, same in claims.items():
            contested.add(file)
            pending -= {*same}
            failures |= {i: ("annotations that claim the same picture", [file]) for i in same}
            if len(same) == 1:
                claimed[file] = same[0]
                del failures[same[0]]
    return claimed, failures


def match_pictures(
    annotated: Sequence[AnnotatedPicture],
    files: Sequence[str],
    findings: Findings,
    roots: tuple[str, str],
    others: Sequence[Path] = (),
) -> dict[str, AnnotatedPicture]:
    """Return the entry of each picture file that has one, in the order of the files.

    Entries without a picture, pictures without an entry and matches by the name alone are noted.
    """
    claimed, failures = match_names([entry.names for entry in annotated], files, roots, others)
    below = [_split(f"{root}/x").telling for root in roots]
    for file, i in claimed.items():
        path = _split(file, below[1])
        names = (_split(str(name), below[0]) for name in annotated[i].names)
        if all(all(_difference(name, path)) for name in names):
            kind = "annotations whose picture lies in another folder, matched by the name alone"
            findings.remark(kind, f"{annotated[i].place} with {file}")
    for i, (kind, meant) in sorted(failures.items()):
        entry = annotated[i]
        without = kind == "annotations without a picture"
        why = f" ({'not ' * without}{', '.join(meant[:3])})" if meant else ""
        if not entry.objects or without:
            note = f"{entry.place} with {len(entry.objects)} objects{why}"
            findings.remark(f"{kind}, not used", note)
            continue
        for each in entry.objects:
            findings.unusable(f"objects of {kind}", f"{each.place}{why}")
    doubled = {file for kind, meant in failures.values() for file in meant if "claim" in kind}
    for file in files:
        if file not in claimed and file not in doubled:
            findings.remark("pictures without annotations, not used", file)
    return {file: annotated[claimed[file]] for file in files if file in claimed}


def find_files(names: Sequence[str], root: str) -> tuple[dict[str, str], dict[str, str]]:
    """Find the picture of each name below a folder.

    A name that a file has is believed. Others are matched with the remaining files, of which those
    in a contradicting folder are not used. Nothing outside the folder is found, whatever the name.

    Returns:
        The file below the folder of each name that has one; and for other names a file that may
        be meant.
    """
    listings: dict[str, set[str]] = {}
    found: dict[str, str] = {}
    for name in names:
        folder, base = os.path.split(name)
        if folder not in listings:
            listings[folder] = listed(root, folder) or set()
        if base in listings[folder]:
            found[name] = name
    rest = [name for name in dict.fromkeys(names) if name not in found]
    if not rest:
        return found, {}
    taken = set(found.values())
    files = [file for file in _walked(root) if file not in taken]
    claimed, failures = match_names([[name] for name in rest], files)
    meant = {rest[i]: options[0] for i, (_, options) in failures.items() if options}
    for file, i in claimed.items():
        if not all(_difference(_split(unquote(rest[i])), _split(file))):
            found[rest[i]] = file
        else:
            meant[rest[i]] = file
    return found, meant


def listed(root: str, folder: str = "") -> set[str] | None:
    """Names in a folder below the root; None if it is not there or may not be listed."""
    if folder.startswith("/") or ".." in folder.split("/"):
        return None  # after a link, .. is the parent of the link's target
    try:
        return set(PathManager.ls(os.path.join(root, folder)))
    except (OSError, ValueError):
        return None


def _walked(root: str) -> list[str]:
    """Files below a folder; links are followed, and each folder is entered once."""
    files, entered = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort()
        files += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(names)]
    return files


class _Path(NamedTuple):
    """Parts of a path in simplified spelling."""

    below: list[str] | None  # telling folders below the root; None for a path outside it
    telling: list[str]  # folders without neutral ones
    folders: list[str]
    last: str


def _split(path: str, root: Sequence[str] = ()) -> _Path:
    plain = os.path.normpath(path.replace("\\", "/").strip())
    *folders, last = (simplified(part) for part in plain.split("/"))
    folders = [folder for folder in folders if folder not in ("", "..", ".")]
    telling = [folder for folder in folders if folder not in _NEUTRAL]
    inside = telling[: len(root)] == [*root]
    return _Path(telling[len(root) :] if inside else None, telling, folders, last)


def _unquoted(names: Sequence[str | Path]) -> list[str | Path]:
    """Names that are quoted as in a URL, without the quotation."""
    return [type(name)(unquote(str(name))) for name in names if unquote(str(name)) != str(name)]


def _difference(first: _Path, second: _Path) -> tuple[str, str]:
    """Last folders below the roots in which two paths differ; empty where one has no more."""
    if first.below is None or second.below is None:
        return "", ""
    both = zip_longest(reversed(first.below), reversed(second.below), fillvalue="")
    return next(((a, b) for a, b in both if a != b), ("", ""))


def _common(first: list[str], second: list[str]) -> int:
    """Count the last folders that two paths have in common."""
    both = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
