"""Masks as DAVIS stores them: 8-bit PNG files whose pixels are indexes into a fixed palette."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flsl_d2.errors import InputError

__all__ = ["VOID", "davis_palette", "read_indexed_png", "write_indexed_png"]

VOID = 255  # index of pixels that belong to nothing


def davis_palette() -> np.ndarray:
    """(256, 3) uint8 RGB: the colours of PASCAL VOC, which DAVIS uses too.

    An index's bits 0, 3, 6 make its red, 1, 4, 7 its green and 2, 5 its blue, the lowest bit of
    the index becoming the highest of the colour.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    bits = np.pad(bits, ((0, 0), (0, 1)))  # (256, 9): index = 3 * place + channel
    places = 1 << np.arange(7, 4, -1)
    return (bits.reshape(256, 3, 3) * places[:, None]).sum(axis=1).astype(np.uint8)


def read_indexed_png(path: Path) -> np.ndarray:
    """A mask: (H, W) uint8 indexes.

    Raises:
        InputError: the file cannot be read, or its pixels are no indexes (a colour image).
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise InputError(
                    f"mask '{path}' has pixels of mode {image.mode}, not 8-bit indexes; "
                    "use the benchmark's indexed PNG files."
                )
            return np.array(image)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise InputError(
            f"mask '{path}' cannot be read ({type(error).__name__}); download it again."
        ) from error


def write_indexed_png(path: Path, mask: np.ndarray) -> None:
    """Write a mask, (H, W) uint8 indexes, with DAVIS's palette."""
    image = Image.fromarray(mask)  # mode "L" from 2-D uint8; the palette makes it "P"
    image.putpalette(davis_palette().tobytes())
    image.save(path, format="PNG")
