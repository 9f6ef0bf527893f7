"""The layer of figures: where pictures, texts and colour scales stand on a page."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps

from flsl_d2.visualization.figures import (
    COLOUR_MAP,
    Panel,
    palette,
    picture_table,
    plot_grid,
)

RED = (200, 30, 40)


def plain(height: int, width: int, colour: tuple[int, int, int] = RED) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1].astype(int)


def test_every_picture_has_the_same_width_and_its_own_aspect(tmp_path):
    rows = [[Panel(plain(10, 20)), Panel(plain(10, 20))], [Panel(plain(30, 20))]]
    picture_table(tmp_path / "new" / "a.png", "", rows, width=1.0)
    red = (np.abs(read(tmp_path / "new" / "a.png") - RED).max(axis=2) < 3).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(red)
    sizes = sorted((w, h) for _, _, w, h, area in stats[1:].tolist() if area > 100)
    # The edges of a picture are blended with the page where they are no whole pixels.
    expected = [(100, 50), (100, 50), (100, 150)]
    for found, size in zip(sizes, expected, strict=True):
        assert max(abs(np.subtract(found, size))) <= 2


def test_a_scale_shows_the_colour_map_with_its_end_above(tmp_path):
    picture_table(tmp_path / "a.png", "", [[Panel(plain(20, 10), span=(0.0, 3.5))]], width=1.0)
    page = read(tmp_path / "a.png")
    column = page[:, 8 + 100 + 5 + 4]  # the margin, the picture, the gap, the middle of the scale
    coloured = column[np.ptp(column, axis=1) > 60]
    high, low = (255 * np.array(colormaps[COLOUR_MAP](end)[:3]) for end in (0.97, 0.03))
    assert np.abs(coloured[4] - high).max() < 40
    assert np.abs(coloured[-4] - low).max() < 40


def test_notes_labels_and_headings_take_room(tmp_path):
    panel = Panel(plain(10, 10))
    sizes = []
    for texts in ({}, {"headings": ["one\ntwo"]}, {"labels": ["row"]}, "note"):
        rows = [[panel._replace(note="note") if texts == "note" else panel] * 3]
        picture_table(tmp_path / "a.png", "title", rows, **(texts if texts != "note" else {}))
        sizes.append(read(tmp_path / "a.png").shape[:2])
    bare, heading, label, note = sizes
    assert heading[0] > bare[0] + 20
    assert label[1] > bare[1] + 50
    assert note[0] > bare[0] + 10


def test_the_title_fits(tmp_path):
    title = "W" * 40
    picture_table(tmp_path / "a.png", title, [[Panel(plain(10, 10))]], width=1.0)
    page = read(tmp_path / "a.png")
    dark = (page.max(axis=2) < 128)[:40].any(axis=0).nonzero()[0]
    assert dark.min() > 0
    assert dark.max() < page.shape[1] - 1


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 11))
def test_as_many_plots_as_asked_for(count):
    figure, plots = plot_grid(count, "title")
    assert len(plots) == count
    assert [axes.get_visible() for axes in figure.axes].count(True) == count
    assert (palette(13)[12] == palette(1)[0]).all()
