"""Masks of DAVIS 2016 and 2017."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.evaluation.davis.sequences import read_mask, write_indexed_png

OBJECT = np.zeros((6, 8), bool)
OBJECT[2:5, 1:4] = True


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_masks_of_0_and_255_have_one_object(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray(OBJECT.astype(np.uint8) * 255).convert(mode)
    picture.save(tmp_path / "a.png")
    mask = read_mask(tmp_path / "a.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, OBJECT)


@pytest.mark.parametrize("palette", [False, True])
def test_255_is_void_beside_other_objects(palette: bool, tmp_path: Path) -> None:
    values = OBJECT.astype(np.uint8) * 2
    values[0] = 255
    if palette:
        write_indexed_png(tmp_path / "a.png", values)
    else:
        Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), OBJECT * 2)


def test_a_palette_with_void_alone_has_no_object(tmp_path: Path) -> None:
    write_indexed_png(tmp_path / "a.png", OBJECT.astype(np.uint8) * 255)
    assert not read_mask(tmp_path / "a.png").any()


def test_colours_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    with pytest.raises(InputError, match="has colours"):
        read_mask(tmp_path / "a.png")
