"""Images whose stored values are used: how many channels they have, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from flsl_d2.errors import InputError
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import read_channels
from flsl_d2.images.stored_format import stored_format

_TRIED_IMAGES = 50
_STATISTICS_IMAGES = 200


def find_channels(files: Sequence[str]) -> tuple[int, int]:
    """Return the channels and the bits of images that RGB of 8 bits does not hold.

    These are images of 2 or more than 4 channels, TIFF files of 4, and images of more than 8 bits
    where all are of that kind. Some images are looked at, spread evenly; those that cannot be read
    are passed over.

    Returns:
        The number of channels and of bits; (0, 8) where RGB of 8 bits is enough.

    Raises:
        InputError: only some have such channels, or TIFF files need a package.
    """
    found: set[tuple[int, int]] = set()
    multispectral, failure = False, ""
    for file in _spread(files, _TRIED_IMAGES):
        try:
            channels, bits = stored_format(file)
        except OSError as error:
            failure = failure or f"'{printable(file)}' ({error})"
            continue
        found.add((channels, bits))
        is_tiff = file.lower().endswith((".tif", ".tiff"))
        multispectral |= channels == 2 or channels > 4 or (channels == 4 and is_tiff)
    if "tifffile" in failure:
        raise InputError(f"the images cannot be read, the first is {failure}.")
    counts = sorted({channels for channels, _ in found})
    if multispectral and len(counts) > 1:
        raise InputError(
            f"the images have {' and '.join(map(str, counts))} channels; an encoder needs images "
            "of one kind, so convert some."
        )
    if found and (multispectral or (len(found) == 1 and min(found)[1] > 8)):
        return min(found)
    return 0, 8


def stored_bits(files: Sequence[str]) -> int:
    """Return the most bits of a value that some images have, spread evenly."""
    found = [8]
    for file in _spread(files, _TRIED_IMAGES):
        with suppress(OSError):
            found.append(stored_format(file)[1])
    return max(found)


def channel_statistics(files: Sequence[str], channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over some images, spread evenly."""
    sums = np.zeros((3, channels))
    for file in _spread(files, _STATISTICS_IMAGES):
        try:
            pixels = read_channels(file, channels).astype(float)
        except OSError as error:
            raise InputError(
                f"the image '{printable(file)}' cannot be used ({error}); repair it or leave it "
                "out."
            ) from error
        flat = pixels.reshape(-1, channels)
        sums += [np.full(channels, len(flat)), flat.sum(axis=0), (flat**2).sum(axis=0)]
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - mean**2, 1e-12))
    return mean.round(3).tolist(), np.maximum(std, 1e-3).round(3).tolist()


def _spread(files: Sequence[str], most: int) -> list[str]:
    places = np.unique(np.linspace(0, len(files) - 1, most).astype(int))
    return [files[int(place)] for place in places]
