"""Texts of users in figures and pictures: drawn as they are, in any script, whatever they hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from hostile import HOSTILE, SURROGATES, as_file_name
from matplotlib.font_manager import findfont, fontManager

from flsl_d2.files import plain_line
from flsl_d2.visualization import fonts, loss_curves
from flsl_d2.visualization.detections import DrawnObjects, draw_objects
from flsl_d2.visualization.figures import Panel, label_plot, picture_table, plot_grid, save_figure

NAMES = [*HOSTILE, *SURROGATES]
GREY = np.full((40, 60, 3), 90, np.uint8)


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path)).astype(int)


def test_every_text_reaches_every_place_of_a_figure(tmp_path):
    rows = [[Panel(GREY, name), Panel(GREY, name[::-1])] for name in NAMES]
    picture_table(tmp_path / "a.png", "\n".join(NAMES[:3]), rows, NAMES[3:5], NAMES)
    assert read(tmp_path / "a.png").shape[1] < 2000, "a long name makes no wide figure"
    figure, plots = plot_grid(6, NAMES[0])
    for start, axes in enumerate(plots):  # 30 places for the names
        title, x_label, y_label, tick, line = (NAMES * 2)[5 * start : 5 * start + 5]
        axes.plot([1, 2], [1, 1000], label=line)
        axes.set_xticks([1, 2], [tick[:60], "b"])
        axes.legend()
        label_plot(axes, title, x_label, y_label)
        axes.set_yscale("log")
    save_figure(figure, tmp_path / "b.png")
    for name in NAMES:
        drawn = draw_objects(
            GREY, DrawnObjects(np.array([[9.0, 9, 30, 30]]), [None], [0], [1.0]), [name]
        )
        assert drawn.std() > 1


def test_curves_of_hostile_keys_and_folders(tmp_path):
    folder = tmp_path / as_file_name("cost $i_$3 $\\frac{$")
    folder.mkdir()
    lines = [{"iteration": i, **{f"{n} loss": i % 3 for n in HOSTILE[:9]}} for i in range(4)]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    loss_curves(folder / "metrics.json", folder / "curves.png")


def test_a_formula_is_drawn_letter_by_letter(tmp_path):
    pages = []
    for name in ("$i$", "$j$", "i"):
        picture_table(tmp_path / "a.png", "", [[Panel(GREY, name)]])
        pages.append(read(tmp_path / "a.png"))
    assert (pages[0] != pages[1]).any()
    assert (pages[0] != pages[2]).any(), "the dollars are drawn"


def test_a_curve_of_rounding_is_flat_and_has_no_offset(tmp_path):
    figure, (axes,) = plot_grid(1, "")
    axes.plot([0, 1, 2], [5.545, 5.545001, 5.545])
    save_figure(figure, tmp_path / "a.png")
    low, high = axes.get_ylim()
    assert high - low > 1e-3
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_fonts_are_found_by_their_characters(caplog, tmp_path):
    default = fonts._characters(findfont(fonts._DEFAULT))
    other = next(
        e.fname for e in fontManager.ttflist if e.name == "STIXGeneral" and e.style == "normal"
    )
    character = next(c for c in map(chr, sorted(fonts._characters(other) - default)) if c.isalpha())
    assert fonts.pillow_font(f"a{character}", 12).path != findfont(fonts._DEFAULT)
    assert fonts.pillow_font("a", 12).path == findfont(fonts._DEFAULT)
    assert len(fonts.families([character])) > len(fonts.families(["a"])) == 1
    fonts._covering.cache_clear()
    missing = "\U0001f986\U00020000"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            fonts.families(["a", missing])
    assert len(caplog.records) <= 1, "one line for each set of characters that no font has"
    with_other = [draw_objects(GREY, DrawnObjects(np.zeros((1, 4)) + 9, [None], [0], None), [n])
                  for n in (f"a{character}", "ab")]  # fmt: skip
    assert (with_other[0] != with_other[1]).any()


@pytest.mark.parametrize("text", NAMES)
def test_what_is_printed_stays_on_its_line(text):
    shown = plain_line(text)
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    shown.encode("utf-8")
    assert len(shown) == len(text)
