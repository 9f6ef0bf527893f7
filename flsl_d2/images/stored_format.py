"""Stored values of PNG and TIFF files: their channels, their bits, and what 8 bits show of them.

A value of 16 bits seldom uses them all: X-rays, CT and satellites give 10, 12 or 14. How many count
is stated by the file (the sBIT chunk of PNG; BitsPerSample and MaxSampleValue of TIFF), or else is
the smallest of 8, 10, 12, 14 and 16 that holds every value of the picture, which a line of the log
says once.
"""

from __future__ import annotations

import io
import logging
import struct
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
from detectron2.utils.logger import log_first_n
from PIL import Image, TiffImagePlugin

from flsl_d2.images.opening import (
    MAX_PIXELS_LIMIT,
    check_size,
    decoder_errors,
    open_picture,
    open_regular,
    orientation,
    printable,
    upright,
)

_PNG_START = 4096  # bytes in which a chunk before the pixels is looked for
# Channels by colour type (PNG specification, 11.2.1): grey, RGB, palette, grey and RGB with alpha.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
_USUAL_BITS = (8, 10, 12, 14, 16)


class StoredFormat(NamedTuple):
    """How the values of a PNG or TIFF file are stored.

    Attributes:
        channels: number of channels; a palette counts as three, transparency as one.
        bits: bits of a stored value, 8 or more.
        significant: bits that count, as the file states; 0 where it does not.
        size: height and width as stored.
        is_tiff: whether it is a TIFF file.
        is_plain: whether Pillow and OpenCV read all its values: one page of 1 or 3 channels.
    """

    channels: int
    bits: int
    significant: int
    size: tuple[int, int]
    is_tiff: bool = False
    is_plain: bool = True


def stored_format_of(file: BinaryIO) -> StoredFormat | None:
    """Read the header of an open file; None for other formats than PNG and TIFF."""
    start = file.read(_PNG_START)
    if start.startswith(b"\x89PNG") and len(start) > 26:
        width, height = struct.unpack(">II", start[16:24])
        place = start[: start.find(b"IDAT")].find(b"sBIT")
        stated = start[place + 4 : place + 4 + start[place - 1]] if place > 0 else b"\0"
        channels = _PNG_CHANNELS.get(start[25], 3)
        return StoredFormat(channels, max(start[24], 8), max(stated), (height, width))
    if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    tags = TiffImagePlugin.ImageFileDirectory_v2(start[: 16 if 43 in start[2:4] else 8])
    file.seek(tags.next)
    tags.load(file)
    bits, samples = max(tags.get(258, (1,))), int(tags.get(277, 1))
    has_palette, is_float = tags.get(262) == 3, 3 in tags.get(339, ())
    in_planes = samples > 1 and tags.get(284) == 2  # OpenCV mixes them up
    significant = max(tags.get(281, (0,))).bit_length() if bits == 16 else 0
    significant = bits if 8 < bits < 16 else significant
    return StoredFormat(
        3 if has_palette else samples,
        -(-bits // 8) * 8,
        significant,
        (int(tags[257]), int(tags[256])),
        True,
        samples in (1, 3) and bits <= 16 and not (tags.next or is_float or in_planes),
    )


def stored_format(path: str) -> tuple[int, int]:
    """Return the number of channels of a PNG or TIFF file and their bits; (3, 8) for others.

    Raises:
        OSError: not readable; the text is the reason.
    """
    with decoder_errors(path), open_regular(path) as file:
        found = stored_format_of(file)
        if found is None:
            return 3, 8
        if not found.is_plain:
            with _tiff(file) as tiff:
                shape, dtype = _channels_last(tiff), tiff.series[0].dtype
            return shape[2], 8 * dtype.itemsize
        return found[:2]


def stored_pixels(
    data: bytes, stored: StoredFormat, max_pixels: int = MAX_PIXELS_LIMIT
) -> np.ndarray:
    """Decode the stored values of a PNG or TIFF file, upright, (H, W, C) of the file's own type.

    Colours are red, green, blue. A file that cannot be decoded raises nearly any exception.
    """
    check_size(*stored.size, max_pixels)
    if not stored.is_plain:
        return _read_tiff(data)
    if stored.is_tiff and stored.bits > 8 and stored.channels == 3:  # Pillow does not know it
        return _of_opencv(data)
    image: Image.Image = open_picture(data, max_pixels)
    image.load()  # refuses files that lack a part
    turning = orientation(image)
    if stored.bits > 8 and stored.channels > 1:  # Pillow keeps the upper 8 bits
        return upright(_of_opencv(data), turning)
    if image.mode in ("1", "P"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    pixels = np.asarray(image)
    return upright(pixels.reshape(*pixels.shape[:2], -1), turning)


def _of_opencv(data: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise OSError("its pixels cannot be decoded")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]  # OpenCV has blue first


def _tiff(file: BinaryIO):  # type: ignore[no-untyped-def]  # tifffile is optional
    try:
        import tifffile
    except ImportError as error:
        raise OSError(
            "TIFF files of several pages, of 2 or more than 3 channels or of floats need the "
            "package tifffile; run pip install 'flsl-d2[formats]'"
        ) from error
    file.seek(0)
    return tifffile.TiffFile(file, name="a.tif")


def _channels_last(tiff) -> tuple[int, int, int]:  # type: ignore[no-untyped-def]
    """Shape (H, W, C) of the first image of an open TIFF file."""
    sizes = dict(zip(tiff.series[0].axes, tiff.series[0].shape, strict=True))
    return sizes["Y"], sizes["X"], sizes.get("S") or sizes.get("C") or 1


def _read_tiff(data: bytes) -> np.ndarray:
    """Pixels (H, W, C) of a TIFF file's first image."""
    with _tiff(io.BytesIO(data)) as tiff:
        axes, shape = tiff.series[0].axes, _channels_last(tiff)
        channel = next((axis for axis in "SC" if axis in axes), "")
        # The first of several times or depths is taken, like the first frame of an animation.
        first = tuple(slice(None) if axis in ("Y", "X", channel) else 0 for axis in axes)
        pixels = tiff.series[0].asarray()[first]
    order = [axis for axis in axes if axis in ("Y", "X", channel)]
    return pixels.transpose([order.index(a) for a in ("Y", "X", channel) if a]).reshape(shape)


def eight_bits(values: np.ndarray, significant: int, path: str = "") -> np.ndarray:
    """Return the upper 8 of the bits that count, uint8.

    ``significant`` of 0 takes the smallest usual number of bits that holds all values.
    """
    if values.min(initial=0) < 0:
        raise OSError("negative values have no defined black level; add an offset to all of them")
    most = int(values.max(initial=0))
    bits = significant or next(b for b in _USUAL_BITS if most < 2**b)
    if bits < 16 and not significant:
        text = (
            f"'{printable(path)}' has values of 16 bits that end at {most}, so it is read as one "
            f"of {bits} bits; so is every such picture, each by its own largest value (PNG's sBIT "
            "or TIFF's MaxSampleValue states the bits of a file)."
        )
        log_first_n(logging.WARNING, text, name=__name__)
    shifted = values >> (bits - 8)
    return np.minimum(shifted, 255).astype(np.uint8)
