"""Texts that end quotes, strings, lines, tags or formulas wherever they are pasted in.

Class names, file names and option values may be any of them: a sink writes them as they are, or
escapes them, and never runs, drops or fails on one.
"""

from __future__ import annotations

HOSTILE = [
    "'",
    '"',
    "'''",
    '"""\nopen("ran.txt", "w").close()\n"""',
    "' + str(open('ran.txt', 'w').close()) + '",
    "\\",
    "vehicle\\unknown \\xenon \\N{x}",
    "a\nb\r\nc\x0b\x0c\x1c\x85\u2028\u2029d",
    "# comment\n---\n- a: *b",
    "${oc.env:HOME} ${train.seed} \\${x} $",
    "cost $i_$3 $\\frac{$",
    "{0} {x!r} {{ 7 * 7 }} {% raw %} {#",
    "%s %(name)s %",
    "<script>alert(1)</script> &amp; ]]> -->",
    '=1+1,"a";b\t|c|`d`',
    "../../up/../..",
    "C:\\data\\a.png",
    "nul\0byte",
    "\x1b[2J\x07\x08bell",
    "\u202eevil\u202c \u200f\u200b\ufeff",
    "浑浊 脏污物 Möwe Mo\u0308we 🦆",
    " leading and trailing ",
    "-rf",
    "!!python/object/apply:os.system [id]",
    "null",
    "x" * 300,
]
# Halves of characters: texts in Python and JSON, which UTF-8 cannot hold.
SURROGATES = ["\udcff byte of a file name", "\ud83e half"]


def as_file_name(text: str) -> str:
    """Return the text with what no file name can have replaced, cut to 200 bytes."""
    plain = text.replace("\0", "_").replace("/", "_")
    return plain.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")
