"""HTML pages from the templates in ``page/``; each page is one file that needs no other."""

from __future__ import annotations

import base64
import hashlib
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

_PARTS = Path(__file__).parent / "page"


def data_uri(path: Path) -> str:
    """Return the content of a file as a ``data:`` URI, for pages that need no other file."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _source(name: str) -> Markup:
    """Return a style sheet or script of ``page/`` as it is."""
    return Markup((_PARTS / name).read_text(encoding="utf-8"))


def _breakable(text: str) -> Markup:
    """Let a browser break a name of a measure behind its slashes."""
    return escape(text).replace("/", Markup("/<wbr>"))


def _script(names: Sequence[str]) -> Markup:
    """Return scripts of ``page/`` as one."""
    return Markup("\n").join(_source(name) for name in names)


def _sha256(text: str) -> str:
    """Return a script's hash for a Content-Security-Policy, so that no other script may run."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def render(template: str, **values: Any) -> str:
    """Fill in a template; all values are escaped.

    Templates have the functions ``source`` and ``script`` for style sheets and scripts of
    ``page/``, the filter ``data_uri`` for paths of pictures and jinja2's ``tojson`` for data.
    """
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"source": _source, "script": _script}
    environment.filters |= {"data_uri": data_uri, "sha256": _sha256, "breakable": _breakable}
    text = environment.get_template(template).render(**values)
    # A lone surrogate, of a file name that is no UTF-8, cannot be written.
    return text.encode("utf-8", "replace").decode("utf-8")
