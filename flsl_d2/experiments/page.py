"""One HTML page that needs nothing but itself: tables, plots and pictures inlined."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from flsl_d2.experiments.tables import Shown, Table
from flsl_d2.files import write_text

__all__ = ["Page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left }
th { border-bottom: 2px solid #333; vertical-align: bottom }
.number, .best, .failed { text-align: right }
ul.failed { text-align: left }
.records td { overflow-wrap: anywhere; min-width: 5rem }
td.best { font-weight: 700; background: #fdf0e6 }
td.failed { background: #fdecee }
.failed { color: #b00020 }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure { margin: 0 } figure img { max-width: 100% } figcaption { font-size: .9rem; color: #555 }
pre { overflow-x: auto; background: #f6f6f6; padding: .7rem; font-size: .8rem }
"""


class Page:
    """Collects sections and writes them.

    Args:
        title: heading of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def table(self, table: Table) -> None:
        """Best cells marked; the reasons of failed ones below."""
        head, *lines = table.lines()
        self._parts.append(
            f'<div class="wide"><table><thead>{_line("th", head)}</thead>'
            f"<tbody>{''.join(_line('td', line) for line in lines)}</tbody></table></div>"
        )
        reasons = "".join(f"<li>{escape(note)}</li>" for note in table.notes())
        if reasons:
            self._parts.append(f'<p>Failed:</p><ul class="failed">{reasons}</ul>')

    def pictures(self, files: Mapping[str, Path], width: int = 560, captions: bool = True) -> None:
        """PNG files side by side by their captions; those that do not exist are left out.

        Args:
            files: by caption.
            width: of each in pixels at most.
            captions: show them; otherwise they are for those who cannot see the pictures.
        """
        figures = [
            f'<figure style="max-width: {width}px">'
            f'<img alt="{escape(caption)}" src="{_data(path)}">'
            + f"<figcaption>{escape(caption)}</figcaption>" * captions
            + "</figure>"
            for caption, path in files.items()
            if path.is_file()
        ]
        self._parts.append(f'<div class="pictures">{"".join(figures)}</div>')

    def records(self, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A plain table of text."""
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows
        )
        self._parts.append(
            f'<div class="wide"><table class="records"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def details(self, summary: str, text: str) -> None:
        """Text that unfolds on a click."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
        )

    def write(self, path: Path) -> None:
        """Write the page."""
        write_text(
            path,
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{escape(self.title)}</h1>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n",
        )


def _line(tag: str, line: Sequence[Shown]) -> str:
    cells = (f'<{tag} class="{shown.kind}">{escape(shown.text)}</{tag}>' for shown in line)
    return f"<tr>{''.join(cells)}</tr>"


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
