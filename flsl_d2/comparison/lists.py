"""Lists on command lines."""

from __future__ import annotations

from flsl_d2.errors import InputError

__all__ = ["comma_separated", "seeds_of"]


def comma_separated(text: str) -> list[str]:
    """``a,b`` as a list, without what is there twice."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def seeds_of(text: str) -> list[int]:
    """``0,1`` as a list of seeds, each once.

    Raises:
        InputError: something else than whole numbers from 0 on.
    """
    parts = comma_separated(text)
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--seeds {text!r} is not a list of whole numbers; write --seeds 0,1.")
    return [int(part) for part in parts]
