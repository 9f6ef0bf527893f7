"""The card beside an export: the origin of the model, its inputs and its outputs."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import flsl_d2
from flsl_d2.engine.run_folder import RUN_FILE
from flsl_d2.files import file_sha256, write_text

_PACKAGES = ("torch", "detectron2", "timm", "onnx", "onnxruntime", "safetensors", "numpy")
# Licences in the repositories of other projects, read in November 2026, by the beginning of the
# name of a layout. Their weights may have others.
_LICENCES = {
    "MAE": "CC BY-NC 4.0 (facebookresearch/mae)",
    "Segment Anything": "Apache-2.0 (facebookresearch/segment-anything)",
}
_FIGURES = ("bbox/", "segm/", "knn_", "linear_", "position_r2", "loss", "feature_std")


def licence_of(layout: str) -> str:
    """Name the licence that the project of a layout states; ``unknown`` where none is known."""
    known = [text for start, text in _LICENCES.items() if layout.startswith(start)]
    return known[0] if known else "unknown"


def versions() -> dict[str, str]:
    """List the versions of what wrote the export."""
    found = {"flsl-d2": flsl_d2.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def run_facts(folder: Path | None) -> dict[str, Any]:
    """Collect settings, data and last figures of a run from its output folder, as far as known."""
    if folder is None:
        return {}
    facts: dict[str, Any] = {"run": str(folder)}
    settings: dict[str, Any] = {}
    with suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder / RUN_FILE).read_text()).get("settings", {})
    if settings:
        names = ("images", "dataset.name", "dataset.root")
        data = {key: settings[key] for key in names if settings.get(key)}
        data |= {k: v for k, v in settings.items() if k.endswith("dataset.names") and v}
        facts["data"] = data
        initial = settings.get("train.init_checkpoint") or settings.get("MODEL.WEIGHTS")
        if initial:
            facts["initial_weights"] = {"file": initial, "licence": "unknown"}
    figures: dict[str, Any] = {}
    rows = folder / "metrics.json"
    if rows.is_file():
        for line in rows.read_text().splitlines():
            with suppress(ValueError):  # a run that was killed leaves half a row
                row = json.loads(line)
                figures |= {k: v for k, v in row.items() if k.startswith((*_FIGURES, "iteration"))}
    if figures:
        facts["figures"] = figures
    return facts


def plain_text(value: Any) -> str:
    """Write a value as one line that every UTF-8 file can hold."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text.encode("utf-8", "backslashreplace").decode()


def _markdown(value: Any) -> str:
    """Write a value so that no sign in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$!&])", r"\\\1", plain_text(value)) or "-"


def card_text(facts: Mapping[str, Any], code: str = "") -> str:
    """Write the facts as Markdown: the code that uses the export, and tables of the groups."""
    lines = [f"# {_markdown(facts['name'])}", ""]
    if code:
        lines += ["```python", code, "```", ""]
    plain = {k: v for k, v in facts.items() if not isinstance(v, Mapping)}
    groups = {"": plain} | {k: v for k, v in facts.items() if isinstance(v, Mapping)}
    for title, group in groups.items():
        if title:
            lines += ["", f"## {title.replace('_', ' ').capitalize()}", ""]
        lines += ["| | |", "| --- | --- |"]
        for key, value in group.items():
            lines.append(f"| {_markdown(key)} | {_markdown(value)} |")
    return "\n".join(lines) + "\n"


def write_card(target: Path, facts: Mapping[str, Any], code: str = "") -> Path:
    """Write the card of an export as Markdown and JSON; return the Markdown file.

    The card of a folder is its ``README.md``; that of ``model.onnx`` is ``model.onnx.md``.
    """
    is_folder = target.is_dir()
    files = [target] if target.is_file() else sorted(target.rglob("*"))
    facts = {**facts, "sha256": {f.name: file_sha256(f) for f in files if f.is_file()}}
    card = target / "README.md" if is_folder else target.with_name(f"{target.name}.md")
    write_text(card, card_text(facts, code))
    data = target / "card.json" if is_folder else target.with_name(f"{target.name}.json")
    write_text(data, json.dumps(facts, indent=2) + "\n")
    return card
