"""Sequences in the folders of DAVIS, checked before anything is computed from them.

Below the root lie ``ImageSets/<year>/<split>.txt`` with a name on each line, and
``JPEGImages/<resolution>/<name>/00000.jpg``, ``Annotations/<resolution>/<name>/00000.png``, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.labels import indexed_pixels
from flsl_d2.images.reader import picture_size

VOID = 255  # index of pixels that belong to nothing


def davis_palette() -> np.ndarray:
    """Return the colours of PASCAL VOC, which DAVIS uses as well: (256, 3) uint8 RGB.

    Bits 0, 3, 6 of an index make its red, 1, 4, 7 its green and 2, 5 its blue, the lowest first.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    bits = np.pad(bits, ((0, 0), (0, 1)))  # (256, 9): index = 3 * place + channel
    places = 1 << np.arange(7, 4, -1)
    return (bits.reshape(256, 3, 3) * places[:, None]).sum(axis=1).astype(np.uint8)


def write_indexed_png(path: Path, mask: np.ndarray) -> None:
    """Write a mask, (H, W) uint8 indexes, with DAVIS's palette."""
    image = Image.fromarray(mask)  # mode "L" from 2-D uint8; the palette makes it "P"
    image.putpalette(davis_palette().tobytes())
    image.save(path, format="PNG")


_LEAST_SCORED_FRAMES = 3  # the first and the last do not count


@dataclass(frozen=True)
class Sequence:
    """A video whose files exist and have one size (H, W), with masks of all frames or the first."""

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]
    size: tuple[int, int]


def sequence_names(root: Path, year: str, split: str, resolution: str) -> list[str]:
    """Return the names of the sequences of a split, in the order of its list."""
    lists = root / "ImageSets" / year
    for folder in (root / "JPEGImages" / resolution, lists):
        if not folder.is_dir():
            raise InputError(
                f"'{root}' has no folder {folder.relative_to(root)}; give the folder that DAVIS "
                f"{year} was unpacked to, with its JPEGImages, Annotations and ImageSets."
            )
    path = lists / f"{split}.txt"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in lists.glob("*.txt"))) or "none"
        raise InputError(f"'{path}' does not exist; splits that exist: {known}.")
    lines = path.read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not names:
        raise InputError(f"'{path}' names no sequence; write one name on each line.")
    for name in names:
        if name in (".", "..") or any(mark in name for mark in "/\\ \t"):
            raise InputError(
                f"'{path}' has the line {name!r}, which is no name of a folder; use the lists of "
                "DAVIS 2017, with one sequence's name on each line."
            )
    return names


def find_sequence(root: Path, resolution: str, name: str, all_masks: bool = True) -> Sequence:
    """Find the files of a sequence, and check what can be checked without decoding pixels."""
    frames = sorted((root / "JPEGImages" / resolution / name).glob("*.jpg"))
    folder = root / "Annotations" / resolution / name
    if not frames:
        raise InputError(f"'{root / 'JPEGImages' / resolution / name}' holds no frames (*.jpg).")
    masks = [folder / f"{frame.stem}.png" for frame in frames][: None if all_masks else 1]
    _check_numbers(frames)
    missing = [mask.name for mask in masks if not mask.is_file()]
    if missing:
        advice = ", or only write masks (--masks-only) if these are not public" if all_masks else ""
        raise InputError(f"{_listed(missing)} missing in '{folder}'; download it again{advice}.")
    if all_masks:
        more = sorted(set(folder.glob("*.png")) - set(masks))
        if more:
            absent = _listed([f"{mask.stem}.jpg" for mask in more])
            raise InputError(f"{absent} missing, though '{more[0]}' is there; download it.")
        if len(frames) < _LEAST_SCORED_FRAMES:
            raise InputError(
                f"{len(frames)} frames in '{frames[0].parent}': the first and the last do not "
                f"count, so {_LEAST_SCORED_FRAMES} or more are needed."
            )
    size = _size(frames[0])
    for path in (*frames, *masks):
        own = _size(path)
        if own != size:
            raise InputError(
                f"'{path}' has {own[0]} x {own[1]} pixels, but the first frame has {size[0]} x "
                f"{size[1]}; all files of a sequence must have one size."
            )
    return Sequence(name, tuple(frames), tuple(masks), size)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask, (H, W) uint8: 0 is the background, 1, 2, ... are the objects.

    Void pixels (255) count as background, as in the benchmark's evaluation. In the greyscale masks
    of DAVIS 2016, which have no palette and no other values than 0 and 255, 255 is the object.
    """
    mask, has_palette = indexed_pixels(str(path))
    if mask.max(initial=0) > VOID:
        raise InputError(f"mask '{path}' has the index {mask.max()}; write indexes up to 254.")
    mask = mask.astype(np.uint8)
    if not has_palette and np.isin(mask, (0, VOID)).all():
        return mask // VOID
    mask[mask == VOID] = 0
    return mask


def _check_numbers(frames: list[Path]) -> None:
    """Check that the numbers of frames rise evenly: a frame may be missing with its mask."""
    if not all(frame.stem.isdecimal() for frame in frames):
        return
    numbers = [int(frame.stem) for frame in frames]
    step = min((b - a for a, b in pairwise(numbers)), default=1)
    absent = sorted(set(range(numbers[0], numbers[-1], max(step, 1))) - set(numbers))
    if absent:
        names = [f"{number:0{len(frames[0].stem)}d}.jpg" for number in absent]
        raise InputError(f"{_listed(names)} missing in '{frames[0].parent}'; download it again.")


def _size(path: Path) -> tuple[int, int]:
    try:
        return picture_size(str(path))[0]
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error}); download it again.") from error


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return names[0] + rest
