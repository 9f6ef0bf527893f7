"""Fonts for text of any script, in matplotlib's figures and in drawn pictures."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from functools import cache

import matplotlib
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

logger = logging.getLogger(__name__)

_DEFAULT = "DejaVu Sans"  # comes with matplotlib
_REGULAR = (400, "normal", "regular", "book", "roman", "medium")


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font has; none where the file cannot be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _covering(missing: frozenset[int]) -> tuple[str, ...]:
    """Files of installed fonts that together have the characters, as far as there are some."""
    left, files = set(missing), []
    # matplotlib's Last Resort has a box for every character.
    fonts = {
        each.fname
        for each in fontManager.ttflist
        if each.style == "normal" and each.weight in _REGULAR and "Last Resort" not in each.name
    }
    while left:
        best = max(fonts, key=lambda path: len(left & _characters(path)), default="")
        if not best or not left & _characters(best):
            named = "".join(chr(point) for point in sorted(left)[:10])
            logger.warning(
                "No installed font has the characters %s, which are drawn as boxes; install one, "
                "for example fonts-noto-cjk or fonts-noto-core.",
                named.encode("ascii", "backslashreplace").decode(),
            )
            break
        files.append(best)
        left -= _characters(best)
    return tuple(files)


def _missing(texts: Iterable[str]) -> frozenset[int]:
    """Visible characters of texts that the default font lacks."""
    points = {ord(c) for text in texts for c in text if not c.isspace()}
    shown = {p for p in points if unicodedata.category(chr(p)) not in ("Cc", "Cf", "Mn")}
    return frozenset(shown - _characters(findfont(_DEFAULT)))


def families(texts: Iterable[str]) -> list[str]:
    """Name the font families for matplotlib that have the characters of some texts."""
    own = matplotlib.rcParams["font.family"]
    names = {each.fname: each.name for each in fontManager.ttflist}
    return [*own, *(names[path] for path in _covering(_missing(texts)))]


@cache
def pillow_font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Return the font for one text in a picture: the default one, or one with its characters."""
    missing = _missing([text])
    return ImageFont.truetype(next(iter(_covering(missing)), findfont(_DEFAULT)), size)
