"""HTML pages from the templates in ``page/``; each page is one file that needs no other."""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_PARTS = Path(__file__).parent / "page"


def data_uri(path: Path) -> str:
    """Return the content of a file as a ``data:`` URI, for pages that need no other file."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _source(name: str) -> Markup:
    """Return a style sheet or script of ``page/`` as it is."""
    return Markup((_PARTS / name).read_text(encoding="utf-8"))


def render(template: str, **values: Any) -> str:
    """Fill in a template; all values are escaped.

    Templates have the function ``source`` for style sheets and scripts of ``page/``, the filter
    ``data_uri`` for paths of pictures and jinja2's ``tojson`` for data of scripts.

    Raises:
        jinja2.UndefinedError: the template has a name without a value.
    """
    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["source"] = _source
    environment.filters["data_uri"] = data_uri
    return environment.get_template(template).render(**values)
