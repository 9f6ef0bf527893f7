"""One HTML page that needs nothing but itself: tables, plots and pictures inlined."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from flsl_d2.comparison.table import Table
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
td.number, th.number { text-align: right }
td.best { font-weight: 700; background: #fdf0e6 }
td.failed { color: #b00020; background: #fdecee }
td.failed small { display: block; max-width: 22rem; white-space: normal }
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
        """Best cells marked; failed ones with their reason."""
        head = "".join(f"<th>{escape(name)}</th>" for name in table.label_names)
        head += "".join(f'<th class="number">{escape(m.name)}</th>' for m in table.measures)
        best = {measure.name: table.best(measure) for measure in table.measures}
        lines = []
        for i, row in enumerate(table.rows):
            cells = "".join(f"<td>{escape(text)}</td>" for text in row.labels.values())
            for measure in table.measures:
                cell = row.cell(measure)
                kind = "failed" if cell.failures else "best" if i in best[measure.name] else ""
                reasons = "; ".join(dict.fromkeys(cell.failures))
                told = f"<small>{escape(reasons)}</small>" if reasons else ""
                shown = escape(cell.text(measure.digits)) + told
                cells += f'<td class="number {kind}">{shown}</td>'
            lines.append(f"<tr>{cells}</tr>")
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    def pictures(self, files: Mapping[str, Path], width: int = 560) -> None:
        """PNG files side by side by their captions; those that do not exist are left out."""
        figures = [
            f'<figure style="max-width: {width}px">'
            f'<img alt="{escape(caption)}" src="{_data(path)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
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
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
            "</table></div>"
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


def _data(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
