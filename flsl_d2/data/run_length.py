"""The text form of COCO's run-length masks, read without trust."""

from __future__ import annotations

import numpy as np

# Of 5 bits each: runs of up to 2^34 pixels, whose sums still fit 64 bits.
_MAX_CHARACTERS = 7


def runs_of_text(text: str) -> list[int]:
    """Runs of a mask in COCO's compressed text form.

    The form, as in pycocotools' `maskApi.c`: a character is 48 plus six bits, of which the lowest
    five are part of a number, least significant part first, and the sixth says that another
    follows; the highest bit of a number's last part is its sign; from the fourth number on, each
    is the difference to the run two before.

    Args:
        text: `counts` of a mask.

    Returns:
        The runs of 0 and 1 in turn, column by column. They may be negative in a faulty text.

    Raises:
        ValueError: a character, or an end, that the form does not have.
    """
    bits = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not len(bits):
        return []
    follows = bits & 0x20
    if bits.min() < 0 or bits.max() > 63 or follows[-1]:
        raise ValueError("not a run-length mask")
    starts = np.flatnonzero(np.append(32, ~follows[:-1] & 0x20))
    lengths = np.diff(np.append(starts, len(bits)))
    if lengths.max() > _MAX_CHARACTERS:
        raise ValueError("a run of a run-length mask is too long")
    places = np.arange(len(bits)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((bits & 0x1F) << (5 * places), starts)
    negative = bits[starts + lengths - 1] & 0x10
    numbers -= np.where(negative, 1 << (5 * lengths), 0)
    numbers[1::2], numbers[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    return numbers.tolist()
