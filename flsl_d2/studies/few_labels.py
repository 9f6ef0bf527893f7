"""Training sets of which only some images are used: seeded, and each within the larger ones."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from detectron2.utils.registry import locate

from flsl_d2.errors import InputError

Records = list[dict[str, Any]]


def shares(text: str) -> list[int | float]:
    """Read ``0.01,0.1,1.0`` (shares of the images) or ``12,120`` (numbers of images).

    Raises:
        argparse.ArgumentTypeError: a part is neither a share up to 1.0 nor a number from 2 on.
    """
    found: list[int | float] = []
    for part in text.split(","):
        try:
            value = int(part) if part.strip().isdecimal() else float(part)
        except ValueError:
            value = 0
        if not (value >= 2 if isinstance(value, int) else 0 < value <= 1):
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither a share such as 0.05 or 1.0 nor a number of images from 2 on"
            )
        found.append(value)
    return found


def count_of(share: int | float, total: int) -> int:
    """Return the number of images of a share, at least 1; InputError if there are fewer."""
    if isinstance(share, float):
        return max(round(share * total), 1)
    if share > total:
        raise InputError(
            f"--label-fraction asks for {share} images, but {total} are labelled; give fewer, or "
            "1.0 for all."
        )
    return share


def drawn(records: Records, count: int, seed: int) -> Records:
    """Draw images by a hash of the seed and each image's id and name.

    The draw depends on neither the folder nor the order of the images, and a smaller one is a part
    of a larger one with the same seed.
    """

    def place(record: dict[str, Any]) -> bytes:
        name = Path(record["file_name"]).name
        return hashlib.sha256(f"{seed}\0{record.get('image_id')}\0{name}".encode()).digest()

    chosen = {id(record) for record in sorted(records, key=place)[:count]}
    return [record for record in records if id(record) in chosen]


def few_labels(loader: str, count: int, draw: int, **arguments: Any) -> Records:
    """Load a training set by the function named ``loader``, and draw ``count`` of its images.

    Takes the loader's place in a config; ``draw`` is the seed.
    """
    return drawn(locate(loader)(**arguments), count, draw)


def describe_draw(records: Records, chosen: Records) -> str:
    """Say in a phrase what a draw has, and which classes it lacks."""
    both = (records, chosen)
    every, seen = ([a["category_id"] for r in d for a in r.get("annotations", ())] for d in both)
    unseen = len({*every} - {*seen})
    missing = f"; no example of {unseen} class(es)" if unseen else ""
    return f"{len(chosen)} of {len(records)} labelled images with {len(seen)} objects{missing}"
