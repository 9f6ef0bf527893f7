"""Opening image files: what they are, how large they may be, and whose fault an error is."""

from __future__ import annotations

import functools
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from flsl_d2.errors import MachineError
from flsl_d2.files import describe_content, machine_errors

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
    ".gif",
}
MAX_PIXELS_LIMIT = 178_000_000  # Pillow refuses more as a decompression bomb

# Nothing else is tried on a file, whatever its first bytes say: Pillow hands PostScript, for one,
# to another program.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_SIGNATURES = re.compile(
    rb"(?s)\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|II[*+]\0|MM\0[*+]"
    rb"|RIFF....WEBP|P[1-6]\s"
)
_ORIENTATION = 0x0112  # EXIF tag
TURNED = range(5, 9)  # orientations with rows and columns exchanged


@functools.cache
def _quiet_pillow() -> None:
    """Ignore Pillow's warnings of files that are odd and still readable, from the first one on."""
    # Once and not around each call: catch_warnings makes Python forget which it has shown.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def printable(text: str) -> str:
    """Write a file name or other text as one line that any terminal and log file can take.

    Bytes of a name that are no UTF-8 become ``\\xff``, and halves of characters ``\\ud800``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


@contextmanager
def decoder_errors(path: str, max_pixels: int = MAX_PIXELS_LIMIT) -> Iterator[None]:
    """Raise what a decoder raises as ``OSError``, and errors of the machine as they are.

    Decoders answer broken bytes with nearly any exception: ValueError, SyntaxError, struct.error,
    MemoryError of a size that is wrong.

    Raises:
        OSError: the file is bad; the text is the reason.
        MachineError: see :func:`flsl_d2.files.machine_errors`.
    """
    try:
        with machine_errors(path):
            try:
                yield
            except (MemoryError, cv2.error) as error:
                if isinstance(error, MemoryError) or error.code == cv2.Error.StsNoMem:
                    bytearray(8 * max_pixels)  # as much as 16-bit RGBA of that size
                raise OSError(" ".join(str(error).split()) or type(error).__name__) from None
    except MachineError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(" ".join(reason.split())) from None


def holds_image(path: str) -> bool:
    """Whether the first bytes of a file are those of a format that is read.

    Raises:
        OSError: it is no regular file, or cannot be opened.
        MachineError: see :func:`flsl_d2.files.machine_errors`.
    """
    with machine_errors(path), open_regular(path) as file:
        return bool(_SIGNATURES.match(file.read(16)))


def read_bytes(path: str, max_pixels: int) -> bytes:
    """Read a whole image file; one larger than ``max_pixels`` can be is an OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > 8 * max_pixels + 2**20:  # 16-bit RGBA without compression
            raise OSError(f"{size} bytes are more than {max_pixels} pixels can have")
        return file.read()


@contextmanager
def open_regular(path: str) -> Iterator[BinaryIO]:
    """Open a regular file for reading; raise OSError for pipes, devices and folders."""
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        yield file


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise OSError where an image has more than ``max_pixels`` pixels."""
    if height * width > max_pixels:
        raise OSError(f"{width} x {height} pixels are more than max_pixels")


def open_picture(
    source: bytes | BinaryIO, max_pixels: int = MAX_PIXELS_LIMIT
) -> ImageFile.ImageFile:
    """Open an image whose size is allowed with Pillow; its pixels are not decoded yet."""
    limit = Image.MAX_IMAGE_PIXELS
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if max_pixels > MAX_PIXELS_LIMIT:
            Image.MAX_IMAGE_PIXELS = None
        _quiet_pillow()
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        other = describe_content(file.read(256))
        raise OSError(f"not an image of a known format{' but ' * bool(other)}{other}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    check_size(image.height, image.width, max_pixels)
    return image


def orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an image; None where it has none."""
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF data do not make the pixels worse
        return None


def upright(pixels: np.ndarray, turning: int | None) -> np.ndarray:
    """Turn pixels as EXIF orientations 2 to 8 say (CIPA DC-008); others change nothing."""
    if turning not in range(2, 9):
        return pixels
    if turning in TURNED:
        pixels = pixels.swapaxes(0, 1)
    if turning in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turning in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
