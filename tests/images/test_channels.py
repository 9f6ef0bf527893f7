"""Greyscale, 16-bit and multispectral files keep the values that they store."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.utils import logger as detectron2_logger
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.reader import (
    channels_format,
    channels_of,
    picture_size,
    preview,
    read_channels,
    read_image,
    read_rgb,
)
from flsl_d2.images.stored_format import stored_format

tifffile = pytest.importorskip("tifffile")


def stored(channels: int, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(channels)
    return rng.integers(0, np.iinfo(dtype).max, (12, 20, channels)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("planes", [False, True])
def test_tiff_files_of_any_number_of_channels(channels, dtype, planes, tmp_path: Path):
    values = stored(channels, dtype)
    path = str(tmp_path / "a.tif")
    kind = {"photometric": "minisblack"} if channels != 3 else {"photometric": "rgb"}
    if channels == 1:
        tifffile.imwrite(path, values[..., 0])
    elif planes:
        tifffile.imwrite(path, values.transpose(2, 0, 1), planarconfig="separate", **kind)
    else:
        tifffile.imwrite(path, values, planarconfig="contig", **kind)
    assert stored_format(path) == (channels, 8 * values.itemsize)
    found = read_channels(path, channels)
    assert found.dtype == np.float32
    assert np.array_equal(found, values)
    assert np.array_equal(read_image(path, channels_format(channels)), values)
    assert picture_size(path) == ((12, 20), (12, 20))
    assert preview(path).shape == (12, 20, 3)
    with pytest.raises(InputError, match=f"{channels} channels instead of 9"):
        read_image(path, "channels:9")


def test_png_files(tmp_path: Path):
    for channels, dtype in (
        (1, np.uint8),
        (1, np.uint16),
        (3, np.uint8),
        (3, np.uint16),
        (4, np.uint8),
    ):
        values = stored(channels, dtype)
        order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        path = str(tmp_path / "a.png")
        cv2.imwrite(path, values[..., order])
        assert stored_format(path) == (channels, 8 * values.itemsize)
        assert np.array_equal(read_channels(path), values)


def test_previews_of_usual_files_are_what_the_reader_gives(tmp_path: Path):
    for mode in ("RGB", "RGBA", "L", "P"):
        path = str(tmp_path / f"{mode}.png")
        Image.fromarray(stored(3, np.uint8)).convert(mode).save(path)
        assert np.array_equal(preview(path), read_rgb(path))
    twelve_bits = np.linspace(0, 4095, 240).reshape(12, 20, 1).astype(np.uint16)
    shown = preview(twelve_bits)
    assert shown.min() == 0
    assert shown.max() == 255


def test_names_of_formats():
    assert channels_of(channels_format(5)) == 5
    assert [channels_of(text) for text in ("RGB", "BGR", "L", "YUV-BT.601")] == [0] * 4


def test_files_that_are_no_images(tmp_path: Path):
    for name, content in (("a.tif", b"II*\0broken"), ("a.png", b"\x89PNG"), ("b.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_image(str(tmp_path / name), "channels:4")


def test_an_ordinary_tiff_needs_no_tifffile(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    rgb, grey = stored(3, np.uint8), stored(1, np.uint16)[..., 0]
    for values, kind in ((rgb, (3, 8)), (grey, (1, 16)), (grey >> 8, (1, 16))):
        path = str(tmp_path / "a.tif")
        Image.fromarray(values).save(path)
        assert stored_format(path) == kind
        assert np.array_equal(read_channels(path).squeeze(), values)
        assert read_rgb(path).shape == (*values.shape[:2], 3)
    tifffile.imwrite(path, stored(5, np.uint8))
    with pytest.raises(OSError, match="pip install"):
        read_channels(path)


def with_sbit(content: bytes, bits: int, channels: int) -> bytes:
    body = b"sBIT" + bytes([bits] * channels)
    chunk = struct.pack(">I", channels) + body + struct.pack(">I", zlib.crc32(body))
    return content[:33] + chunk + content[33:]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_bits_that_count_become_the_whole_range(bits, channels, suffix, tmp_path, caplog):
    values = stored(channels, np.uint16) >> (16 - bits)
    values[0, 0] = 2**bits - 1
    path = tmp_path / f"a.{suffix}"
    cv2.imwrite(str(path), values[..., ::-1])
    caplog.clear()
    detectron2_logger._LOG_COUNTER.clear()
    for _ in range(2):
        found = read_rgb(str(path))
    np.testing.assert_array_equal(found, np.broadcast_to(values >> (bits - 8), found.shape))
    assert len(caplog.records) == (bits < 16)  # once
    assert np.array_equal(read_channels(str(path)), values)  # stored values stay


def test_a_file_states_its_bits(tmp_path):
    values = stored(1, np.uint16) >> 8  # the values of one dark picture of 12 bits
    content = cv2.imencode(".png", values)[1].tobytes()
    (tmp_path / "a.png").write_bytes(with_sbit(content, 12, 1))
    tifffile.imwrite(tmp_path / "a.tif", values[..., 0], extratags=[(281, "H", 1, 4095, True)])
    for name in ("a.png", "a.tif"):
        found = read_rgb(str(tmp_path / name))
        np.testing.assert_array_equal(found, np.broadcast_to(values >> 4, found.shape))
