"""Odd and broken files: each is either converted to known pixels, or refused with a reason."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forked import run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from flsl_d2.errors import InputError, MachineError
from flsl_d2.images import opening, reader
from flsl_d2.images.listing import find_images, image_files
from flsl_d2.images.opening import printable
from flsl_d2.images.reader import ImageFile, picture_size, read_channels, read_image, read_rgb
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.views import NestedViews

# pretrain.images silences these; pytest puts filters of its own in their place.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HEIGHT, WIDTH = 40, 56
MAX_PIXELS = 1_000_000
SMALL_VIEWS = {"patch_size": 8, "global_size": 32, "local_size": 16}


def smooth(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encoded(picture: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def png(picture: np.ndarray) -> bytes:
    """OpenCV writes the 16-bit files that Pillow cannot."""
    return cv2.imencode(".png", picture)[1].tobytes()


def png_of_size(width: int, height: int) -> bytes:
    """Make a PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def orientation(value: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def transparent(colour: tuple[int, int, int], alpha: int) -> np.ndarray:
    return np.tile(np.uint8([*colour, alpha]), (HEIGHT, WIDTH, 1))


def uniform(value: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def good_files() -> dict[str, tuple[bytes, np.ndarray, int]]:
    """Name: content, the pixels expected, and by how much they may differ."""
    rgb = smooth()
    picture = Image.fromarray(rgb)
    jpeg = encoded(rgb, "JPEG", quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    grey = np.asarray(picture.convert("L"))
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    bilevel, palette = picture.convert("1"), picture.quantize(16)
    palette_rgb = np.asarray(palette.convert("RGB"))
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)]}
    holed = palette.copy()
    holed.info["transparency"] = 3
    on_white = np.where((np.asarray(holed) == 3)[..., None], 255, palette_rgb)
    files = {
        "plain.jpg": (jpeg, decoded, 0),
        "plain.JPEG": (jpeg, decoded, 0),
        "lossless.png": (encoded(rgb, "PNG"), rgb, 0),
        "lossless.bmp": (encoded(rgb, "BMP"), rgb, 0),
        "lossless.tif": (encoded(rgb, "TIFF"), rgb, 0),
        "deflated.tiff": (encoded(rgb, "TIFF", compression="tiff_deflate"), rgb, 0),
        "lossless.ppm": (encoded(rgb, "PPM"), rgb, 0),
        "lossless.webp": (encoded(rgb, "WEBP", lossless=True), rgb, 0),
        "png named.jpg": (encoded(rgb, "PNG"), rgb, 0),
        "jpeg named.png": (jpeg, decoded, 0),
        "grey.jpg": (encoded(grey, "JPEG", quality=100), grey_rgb, 3),
        "grey.png": (encoded(grey, "PNG"), grey_rgb, 0),
        "bilevel.png": (encoded(bilevel, "PNG"), np.asarray(bilevel.convert("RGB")), 0),
        "progressive.jpg": (encoded(rgb, "JPEG", quality=95, progressive=True), decoded, 0),
        "cmyk.jpg": (
            encoded(picture.convert("CMYK"), "JPEG", quality=100),
            np.asarray(picture.convert("CMYK").convert("RGB")), 8),
        "cmyk.tif": (encoded(picture.convert("CMYK"), "TIFF"), rgb, 1),
        "16 bits grey.png": (png(np.full((HEIGHT, WIDTH), 32896, np.uint16)), uniform(128), 1),
        "16 bits white.png": (png(np.full((HEIGHT, WIDTH), 65535, np.uint16)), uniform(255), 0),
        "16 bits ramp.png": (png(grey.astype(np.uint16) * 257), grey_rgb, 0),
        "16 bits.png": (png(rgb[..., ::-1].astype(np.uint16) * 257), rgb, 0),
        "16 bits.tif": (encoded(grey.astype(np.uint16) * 257, "TIFF"), grey_rgb, 0),
        "16 bits.ppm": (
            b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + (grey.astype(">u2") * 257).tobytes(),
            grey_rgb, 0),
        "palette.png": (encoded(palette, "PNG"), palette_rgb, 0),
        "palette.gif": (encoded(palette, "GIF"), palette_rgb, 0),
        "palette transparent.png": (encoded(holed, "PNG", transparency=3), on_white, 0),
        "palette transparent.gif": (encoded(holed, "GIF", transparency=3), on_white, 0),
        "opaque.png": (encoded(np.dstack([rgb, uniform(255)[..., :1]]), "PNG"), rgb, 0),
        "clear.png": (encoded(transparent((9, 200, 30), 0), "PNG"), uniform(255), 0),
        "half.png": (encoded(transparent((0, 0, 0), 128), "PNG"), uniform(127), 1),
        "clear.webp": (encoded(transparent((9, 9, 9), 0), "WEBP", lossless=True), uniform(255), 0),
        "grey alpha.png": (
            encoded(Image.fromarray(transparent((0, 0, 0), 0)).convert("LA"), "PNG"),
            uniform(255), 0),
        "animated.gif": (
            encoded(palette, "GIF", save_all=True, append_images=[picture.rotate(180)]),
            palette_rgb, 0),
        "animated.png": (encoded(rgb, "PNG", **frames), rgb, 0),
        "animated.webp": (encoded(rgb, "WEBP", lossless=True, **frames), rgb, 0),
        "pages.tif": (encoded(rgb, "TIFF", **frames), rgb, 0),
        "frames.jpg": (encoded(rgb, "MPO", quality=95, **frames), decoded, 0),
        "1 pixel.png": (encoded(uniform(7, 1, 1), "PNG"), uniform(7, 1, 1), 0),
        "1 pixel.jpg": (encoded(uniform(7, 1, 1), "JPEG"), uniform(7, 1, 1), 2),
        "1 pixel.gif": (encoded(uniform(7, 1, 1), "GIF"), uniform(7, 1, 1), 0),
        "wide.png": (encoded(uniform(9, 1, 20_000), "PNG"), uniform(9, 1, 20_000), 0),
        "high.png": (encoded(uniform(9, 20_000, 1), "PNG"), uniform(9, 20_000, 1), 0),
        "wide.jpg": (encoded(uniform(9, 1, 20_000), "JPEG"), uniform(9, 1, 20_000), 2),
        "trailing garbage.jpg": (jpeg + b"garbage" * 99, decoded, 0),
        "trailing zeros.jpg": (jpeg + bytes(999), decoded, 0),
        "broken exif.jpg": (
            encoded(rgb, "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff"), decoded, 0),
        "exif value 9.jpg": (encoded(rgb, "JPEG", quality=95, exif=orientation(9)), decoded, 0),
    }  # fmt: skip
    for value in range(1, 9):
        exif = orientation(value)
        turned = ImageOps.exif_transpose(
            Image.open(io.BytesIO(encoded(rgb, "JPEG", quality=95, exif=exif)))
        )
        files[f"exif {value}.jpg"] = (
            encoded(rgb, "JPEG", quality=95, exif=exif), np.asarray(turned), 0)  # fmt: skip
        for kind in ("PNG", "TIFF", "WEBP"):
            turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(rgb, "PNG", exif=exif))))
            options = {"lossless": True} if kind == "WEBP" else {}
            files[f"exif {value}.{kind.lower()}"] = (
                encoded(rgb, kind, exif=exif, **options), np.asarray(turned), 0)  # fmt: skip
    return files


def bad_files() -> dict[str, bytes]:
    """Contents that no image can be made of without making something up."""
    rgb = smooth(1)
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    bmp = encoded(rgb, "BMP")
    files = {
        "empty.jpg": b"",
        "empty.png": b"",
        "text.jpg": b"this is not an image" * 50,
        "html.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "vector.png": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
        "zip.png": b"PK\x03\x04" + bytes(500),
        "document.jpg": b"%PDF-1.4\n" + bytes(500),
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) show\n",
        "zeros.jpg": bytes(5000),
        "ones.png": b"\xff" * 5000,
        "signature.jpg": b"\xff\xd8\xff",
        "signature.png": b"\x89PNG\r\n\x1a\n",
        "signature.gif": b"GIF89a",
        "signature.bmp": b"BM",
        "signature.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
        "signature.tif": b"II*\0",
        "header.ppm": b"P6 56 40 255\n",
        "no pixels.ppm": b"P6 0 0 255\n",
        "no pixels.png": png_of_size(0, 0),
        "bomb.png": png_of_size(50_000, 50_000),
        "large.png": png_of_size(1001, 1000),
        "bomb.gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        "bomb.ppm": b"P6 100000 100000 255\n" + bytes(100),
        "bomb.bmp": bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:],
        "lying.png": png_of_size(900, 900),
        "signed.tif": encoded(Image.fromarray(rgb[..., 0].astype(np.int16) - 300), "TIFF"),
        "lab.tif": encoded(Image.fromarray(rgb, "LAB"), "TIFF"),
        "floats.tif": encoded(Image.fromarray(rgb[..., 0].astype(np.float32)), "TIFF"),
    }
    contents = {
        "jpg": encoded(noise, "JPEG"),
        "progressive.jpg": encoded(noise, "JPEG", progressive=True),
        "cmyk.jpg": encoded(Image.fromarray(noise).convert("CMYK"), "JPEG"),
        "exif.jpg": encoded(noise, "JPEG", exif=orientation(6)),
        "png": encoded(noise, "PNG"),
        "gif": encoded(noise, "GIF"),
        "bmp": encoded(noise, "BMP"),
        "tif": encoded(noise, "TIFF"),
        "deflated.tif": encoded(noise, "TIFF", compression="tiff_deflate"),
        "webp": encoded(noise, "WEBP"),
        "ppm": encoded(noise, "PPM"),
    }
    for name, content in contents.items():
        for share in (10, 50, 95):
            files[f"cut at {share}.{name}"] = content[: len(content) * share // 100]
    jpeg = contents["jpg"]
    half = len(jpeg) // 2
    files["one byte short.jpg"] = jpeg[:-1]
    files["end lost.jpg"] = jpeg[:-2]
    files["zeros to the end.jpg"] = jpeg[:half] + bytes(len(jpeg) - half)
    files["hole of zeros.jpg"] = jpeg[:half] + bytes(200) + jpeg[half + 200 :]
    files["part lost.jpg"] = jpeg[:half] + jpeg[half + 200 :]
    image_data = contents["png"].index(b"IDAT") + 100
    flipped = bytearray(contents["png"])
    flipped[image_data] ^= 0xFF
    files["flipped.png"] = bytes(flipped)
    return files


GOOD, BAD = good_files(), bad_files()


@pytest.mark.parametrize("name", GOOD)
def test_odd_images_are_converted(name: str, tmp_path: Path) -> None:
    content, expected, tolerance = GOOD[name]
    (tmp_path / name).write_bytes(content)
    pixels = read_rgb(str(tmp_path / name), MAX_PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= tolerance
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    views = NestedViews(**SMALL_VIEWS)(pixels, np.random.default_rng(0))
    assert [tuple(view.shape) for view in views.views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2


@pytest.mark.parametrize("name", GOOD)
def test_the_size_is_known_before_the_pixels(name: str, tmp_path: Path) -> None:
    content, expected, _ = GOOD[name]
    (tmp_path / name).write_bytes(content)
    file = ImageFile(str(tmp_path / name))
    assert file.shape == expected.shape[:2]
    assert 1 in file.reductions
    for reduction in file.reductions:
        reduced = file.pixels(reduction)
        assert reduced.shape == (*(-(-side // reduction) for side in expected.shape[:2]), 3)
        assert reduced.flags.c_contiguous


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(OSError, match=r"\w") as caught:
        read_rgb(str(tmp_path / name), MAX_PIXELS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["avif", "jp2"])
def test_formats_that_are_not_read_are_named(suffix: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    try:
        Image.new("RGB", (16, 16)).save(stream, {"avif": "AVIF", "jp2": "JPEG2000"}[suffix])
    except (KeyError, OSError) as error:
        pytest.skip(f"this Pillow does not write {suffix}: {error}")
    (tmp_path / f"a.{suffix}").write_bytes(stream.getvalue())
    with pytest.raises(OSError, match=r"known format but an? .*\(convert it to JPEG or PNG\)"):
        read_rgb(str(tmp_path / f"a.{suffix}"))


def test_sizes_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(BAD["large.png"])
    with pytest.raises(OSError, match="1001 x 1000 pixels are more than max_pixels"):
        read_rgb(str(tmp_path / "bomb.png"), MAX_PIXELS)
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1099511627776 bytes"):
        read_rgb(str(tmp_path / "sparse.jpg"), MAX_PIXELS)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damage_never_raises_anything_else(name: str, data: st.DataObject) -> None:
    """Flip, cut and insert bytes anywhere: pixels or an OSError, whatever the decoder thinks."""
    content = bytearray(GOOD[name][0])
    places = st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    start = data.draw(places)
    del content[start : start + data.draw(st.integers(0, 9))]
    path = Path(os.environ["PYTEST_DAMAGED"])
    path.write_bytes(content)
    with contextlib.suppress(OSError):
        assert read_rgb(str(path), MAX_PIXELS).shape[2] == 3
        file = ImageFile(str(path), MAX_PIXELS)
        assert file.pixels(file.reductions[0]).shape[2] == 3


@pytest.fixture(autouse=True)
def _damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DAMAGED", str(tmp_path / "damaged"))


def special_files(folder: Path) -> list[str]:
    """Things with a name like an image that are none; with the ones only some systems can make."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "broken link.jpg").symlink_to(folder / "nowhere")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "device.jpg").symlink_to("/dev/zero")
    return ["pipe.jpg", "broken link.jpg", "circle.jpg", "device.jpg"]


def test_nothing_hangs_and_decoders_do_not_write_into_the_log(tmp_path: Path) -> None:
    names = special_files(tmp_path)
    (tmp_path / "folder.jpg").mkdir()
    names += ["folder.jpg", "gone.jpg", *GOOD, *BAD]
    for name, content in {**{name: good[0] for name, good in GOOD.items()}, **BAD}.items():
        (tmp_path / name).write_bytes(content)
    script = tmp_path / "read.py"
    script.write_text(
        "import sys; from flsl_d2.images.reader import read_rgb\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_rgb(path); print('read')\n"
        "    except OSError as error: print(error)"
    )
    # Its own process, so that one that hangs is ended.
    result = run_forked([sys.executable, script, *(tmp_path / name for name in names)], timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    reasons = dict(zip(names, result.stdout.splitlines(), strict=True))
    assert reasons["pipe.jpg"] == reasons["device.jpg"] == "not a regular file"
    assert "No such file" in reasons["broken link.jpg"]
    assert "symbolic links" in reasons["circle.jpg"]
    assert "directory" in reasons["folder.jpg"]
    assert "No such file" in reasons["gone.jpg"]
    assert {reasons[name] for name in GOOD} == {"read"}
    assert "read" not in {reasons[name] for name in BAD}


@pytest.fixture
def ordinary_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Root may read everything, so that a test run as root becomes someone else for a while."""
    monkeypatch.chdir(tmp_path)  # the folders above may be readable by root alone
    tmp_path.chmod(0o755)
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_files_without_permission(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "locked.jpg"
    path.write_bytes(GOOD["plain.jpg"][0])
    path.chmod(0)
    request.getfixturevalue("ordinary_user")
    with pytest.raises(MachineError, match="Permission denied"):
        read_rgb("locked.jpg")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_errors_of_the_machine_are_no_bad_pictures(code: int, tmp_path: Path, monkeypatch) -> None:
    """They end the run, with whatever it reads, instead of replacing the picture by another."""
    (tmp_path / "a.jpg").write_bytes(GOOD["plain.jpg"][0])
    dataset = PretrainDataset([str(tmp_path / "a.jpg")], NestedViews(**SMALL_VIEWS))

    def fail(path: str, *_: object) -> None:
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(opening.os, "open", fail)
    for use in (read_rgb, picture_size, read_image, read_channels, find_images):
        with pytest.raises(MachineError, match=r"a\.jpg"):
            use(str(tmp_path / "a.jpg"))
    assert isinstance(dataset.__getitems__([(0, 0)]), MachineError)


def test_a_lack_of_memory_is_told_from_broken_bytes(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(GOOD["lossless.png"][0])

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reader, "_convert", no_memory)
    with pytest.raises(OSError, match="MemoryError"):
        read_rgb(str(tmp_path / "a.png"))  # there is enough
    monkeypatch.setattr(opening, "bytearray", no_memory, raising=False)
    with pytest.raises(MachineError, match="no memory left"):
        read_rgb(str(tmp_path / "a.png"))


def test_folders_without_permission_are_named(
    tmp_path: Path, caplog, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "a.jpg").write_bytes(GOOD["plain.jpg"][0])
    (tmp_path / "lost+found").mkdir(mode=0)
    request.getfixturevalue("ordinary_user")
    assert find_images(".") == ["./a.jpg"]
    assert "lost+found is left out: Permission denied" in caplog.text


def test_links_do_not_multiply_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "a")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "2.jpg").touch()
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (outside / "3.png").touch()
    (tmp_path / "linked").symlink_to(outside)
    found = [os.path.relpath(file, tmp_path) for file in find_images(tmp_path)]
    assert found == ["a/1.jpg", "folder.jpg/2.jpg", "linked/3.png"]


def test_records_without_a_file_are_counted() -> None:
    from detectron2.data import DatasetCatalog

    DatasetCatalog.register("test_no_files", lambda: [{"file_name": "a.jpg"}, {"height": 3}])
    try:
        with pytest.raises(InputError, match="1 of 2 records"):
            image_files(name="test_no_files")
    finally:
        DatasetCatalog.remove("test_no_files")


def test_names_are_printed_as_text() -> None:
    assert printable("/a/bé 1.jpg") == "/a/bé 1.jpg"
    assert printable(os.fsdecode(b"/a/\xff\xe9.jpg")) == r"/a/\xff\xe9.jpg"
    assert printable("/a/\ud800.jpg") == r"/a/\ud800.jpg"
    assert printable("/a/new\nline\t.jpg") == r"/a/new\nline\t.jpg"
    printable(os.fsdecode(bytes(range(1, 256)))).encode("utf-8")


def test_a_folder_of_everything(tmp_path: Path) -> None:
    """Good, odd and bad files in one set, through the loader with and without workers."""
    contents = {os.fsencode(name): content for name, (content, _, _) in GOOD.items()}
    contents |= {os.fsencode(name): content for name, content in BAD.items()}
    contents[b"not utf-8 \xff\xe9.jpg"] = GOOD["plain.jpg"][0]
    contents[b"new\nline.jpg"] = GOOD["plain.jpg"][0]
    contents[b"not utf-8 and bad \xff\xe9.jpg"] = b"bad"
    contents[b"gone.jpg"] = GOOD["plain.jpg"][0]
    for name, content in contents.items():
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    special = special_files(tmp_path)
    files = find_images(tmp_path)
    assert len(files) == len(contents) + len(special)
    (tmp_path / "gone.jpg").unlink()  # during the run
    bad = {*BAD, *special, r"not utf-8 and bad \xff\xe9.jpg", "gone.jpg"}
    assert len(bad) >= 60

    dataset = PretrainDataset(
        files, NestedViews(**SMALL_VIEWS, keep_crops=True), seed=5, max_pixels=MAX_PIXELS
    )
    batch_size = 8
    steps = -(-len(files) // batch_size)  # once through the set, and a bit
    runs = []
    for workers in (0, 2):
        loader = iter(build_pretrain_loader(dataset, batch_size, workers))
        runs.append(list(itertools.islice(loader, steps)))
        loader.close()
    for a, b in zip(*runs, strict=True):
        assert a.failed == b.failed
        for x, y in zip(a.views + a.queries + a.crops, b.views + b.queries + b.crops, strict=True):
            assert torch.equal(x, y)
    failed = [entry.split("\t") for batch in runs[0] for entry in batch.failed]
    assert {Path(name).name for name, _ in failed} == bad
    assert all(reason for _, reason in failed)


def test_replacements_are_not_repetitions(tmp_path: Path) -> None:
    """What stands in for a bad image is cropped anew, and not the same for every bad image."""
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_bytes(encoded(smooth(i), "PNG"))
        (tmp_path / f"{i:02d} bad.png").write_bytes(b"bad")
    dataset = PretrainDataset(find_images(tmp_path), NestedViews(**SMALL_VIEWS), seed=1)
    loader = build_pretrain_loader(dataset, total_batch_size=24, num_workers=0)
    for batch in itertools.islice(loader, 3):
        assert len({entry.split("\t")[0] for entry in batch.failed}) == 12
        for view in batch.views:
            assert len({image.numpy().tobytes() for image in view}) == 24


def test_on_error_raise_names_file_and_reason(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(BAD["end lost.jpg"])
    dataset = PretrainDataset(find_images(tmp_path), NestedViews(**SMALL_VIEWS), on_error="raise")
    for workers in (0, 1):
        with pytest.raises(InputError) as caught:
            next(iter(build_pretrain_loader(dataset, 2, workers)))
        assert "Traceback" not in str(caught.value)
        assert ".jpg' cannot be used (" in str(caught.value)
        assert "on_error=skip" in str(caught.value)
