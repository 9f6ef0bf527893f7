"""The one matcher of annotations with picture files: one to one, whole paths before bare names."""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile

from flsl_d2.annotations.findings import Findings
from flsl_d2.annotations.objects import AnnotatedPicture, simplified
from flsl_d2.images.listing import IMAGE_SUFFIXES

# Folders that separate pictures from annotations and say nothing about which belongs to which.
_NEUTRAL = {"images", "image", "imgs", "img", "labels", "label", "annotations", "jpegimages", "xml"}

_Tier = tuple[int, int, bool, bool]  # rank of the name, minus common parts, by stem, other spelling
_Options = list[tuple[_Tier, list[str]]]


def match_pictures(
    annotated: Sequence[AnnotatedPicture], files: Sequence[str], findings: Findings
) -> dict[str, AnnotatedPicture]:
    """Find the picture file of each entry of annotations.

    A name fits a file if their last parts are the same, in any letter case and Unicode form; the
    file with the most common parts is meant. A path without a suffix fits files of any suffix. A
    more trusted name is decided before a less trusted one, and more common parts before fewer. An
    entry that fits several files equally, entries that claim the same file, and entries without a
    file get nothing and are noted, as are the files without an entry.

    Args:
        annotated: entries.
        files: absolute paths of picture files.
        findings: extended by what is found.

    Returns:
        The entry of each file that has one, in the order of the files.
    """
    by_name, by_stem = defaultdict(list), defaultdict(list)
    parts = {file: _parts(file) for file in files}
    for file, names in parts.items():
        by_name[names[-1]].append(file)
        by_stem[os.path.splitext(names[-1])[0]].append(file)

    def options_of(entry: AnnotatedPicture) -> _Options:
        tiers: dict[_Tier, list[str]] = defaultdict(list)
        for rank, name in enumerate(entry.names):
            wanted, plain = _parts(str(name)), os.path.basename(str(name).replace("\\", "/"))
            exact = by_name.get(wanted[-1], []) if isinstance(name, str) else []
            stem, suffix = os.path.splitext(wanted[-1])
            if not isinstance(name, str) or suffix not in IMAGE_SUFFIXES:
                stem = wanted[-1]
            for file in dict.fromkeys([*exact, *by_stem.get(stem, [])]):
                is_exact = file in exact
                common = _common([*wanted[:-1], "."], [*parts[file][:-1], "."])
                own = os.path.basename(file)
                differs = plain != (own if is_exact else os.path.splitext(own)[0])
                tiers[rank, -common, not is_exact, is_exact and differs].append(file)
        return sorted(tiers.items())

    claimed: dict[str, AnnotatedPicture] = {}
    doubled: set[str] = set()
    heap = [(options[0][0], i, options) for i, entry in enumerate(annotated)
            if (options := options_of(entry))]  # fmt: skip
    found = {i for _, i, _ in heap}
    for i, entry in enumerate(annotated):
        if i not in found:
            findings.remark("annotations without a picture, not used", _example(entry))
    heapq.heapify(heap)
    while heap:
        tier = heap[0][0]
        claims = defaultdict(list)
        while heap and heap[0][0] == tier:
            _, i, options = heapq.heappop(heap)
            free = [file for file in options[0][1] if file not in claimed and file not in doubled]
            entry = annotated[i]
            if len(free) > 1:
                shown = ", ".join(sorted(free)[:3])
                _lose(findings, entry, "annotations that fit several pictures", shown)
            elif free:
                claims[free[0]].append(entry)
            elif len(options) > 1:
                heapq.heappush(heap, (options[1][0], i, options[1:]))
            else:
                file = options[0][1][0]
                other = f"which {claimed[file].place} has" if file in claimed else "claimed twice"
                _lose(
                    findings, entry, "annotations of a picture that others have", f"{file}, {other}"
                )
        for file, entries in claims.items():
            if len(entries) == 1:
                claimed[file] = entries[0]
                continue
            doubled.add(file)
            for entry in entries:
                _lose(findings, entry, "annotations that claim the same picture", file)
    for file in files:
        if file not in claimed and file not in doubled:
            findings.remark("pictures without annotations, not used", file)
    return {file: claimed[file] for file in files if file in claimed}


def _lose(findings: Findings, entry: AnnotatedPicture, kind: str, why: str) -> None:
    """Note the objects of an entry that gets no picture as left out."""
    for each in entry.objects:
        findings.unusable(f"objects of {kind}", f"{each.place} ({why})")
    if not entry.objects:
        findings.remark(kind, f"{entry.place} ({why})")


def _example(entry: AnnotatedPicture) -> str:
    return f"{entry.place} with {len(entry.objects)} objects"


def _parts(path: str) -> list[str]:
    """Parts of a path in simplified spelling, without folders that say nothing."""
    plain = os.path.normpath(path.replace("\\", "/").strip())
    names = [simplified(part) for part in plain.split("/")]
    folders = [name for name in names[:-1] if name not in _NEUTRAL and name not in ("", "..", ".")]
    return [*folders, names[-1]]


def _common(first: list[str], second: list[str]) -> int:
    """Count the last parts that two paths have in common."""
    both = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
