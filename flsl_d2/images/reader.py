"""Pixels of image files: the one reader of pre-training, detection, evaluation and figures."""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import cv2
import numpy as np
import simplejpeg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from flsl_d2.errors import InputError, MachineError
from flsl_d2.files import describe_content, machine_errors

MAX_PIXELS = 100_000_000  # 300 MB decoded
# Divisors of the size for which decoders have fast transforms of a block.
JPEG_REDUCTIONS = (8, 4, 2, 1)
MAX_PIXELS_LIMIT = 178_000_000  # Pillow refuses more as a decompression bomb

# Nothing else is tried on a file, whatever its first bytes say: Pillow hands PostScript, for one,
# to another program.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
_SIGNATURES = re.compile(
    rb"(?s)\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|II[*+]\0|MM\0[*+]|RIFF....WEBP|P[1-6]\s"
)
_ORIENTATION = 0x0112  # EXIF tag
_TURNED = range(5, 9)  # orientations with rows and columns exchanged

# Pillow warns of files that are odd and still readable. The filter is set once and not around each
# call, because entering catch_warnings makes Python forget which warnings it has shown already.
warnings.filterwarnings("ignore", module=r"PIL\.")


def printable(text: str) -> str:
    """Write a file name or other text as one line that any terminal and log file can take.

    Bytes of a name that are no UTF-8 become ``\\xff``, and halves of characters ``\\ud800``.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def read_rgb(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB; see :class:`ImageFile`.

    Raises:
        OSError: not readable, not an image, or one that lacks a part; the text is the reason.
    """
    return ImageFile(path, max_pixels).pixels()


def read_image(path: str, channels: str = "RGB", max_pixels: int = MAX_PIXELS_LIMIT) -> np.ndarray:
    """Read an image file as Detectron2's function of this name does, by :class:`ImageFile`.

    Args:
        path: path or URL that Detectron2's ``PathManager`` knows.
        channels: Detectron2's image format: ``RGB``, ``BGR``, ``L``, ``YUV-BT.601``, ..., or that
            of :func:`channels_format` for the stored values.
        max_pixels: images of more are refused before they are decoded.

    Returns:
        The image (H, W, channels), uint8 in 0 to 255; floats for YUV and for stored values.

    Raises:
        InputError: the file cannot be read; the file and the reason are named.
    """
    local, count = PathManager.get_local_path(path), channels_of(channels)
    try:
        pixels = read_channels(local, count, max_pixels) if count else read_rgb(local, max_pixels)
    except OSError as error:
        raise InputError(
            f"the image '{printable(path)}' cannot be used ({error}); repair it or leave it out."
        ) from None
    if count:
        return pixels
    if channels in ("RGB", "BGR"):
        return pixels if channels == "RGB" else np.ascontiguousarray(pixels[..., ::-1])
    return np.asarray(convert_PIL_to_numpy(Image.fromarray(pixels), channels))


def channels_format(count: int) -> str:
    """Return the image format of pictures whose stored values are fed to a model.

    It is a value of ``model.input_format`` (``INPUT.FORMAT`` in YAML), which the data set mapper
    and prediction read. Greyscale, 16-bit and multispectral pictures keep all their channels and
    bits; ``pixel_mean`` and ``pixel_std`` are then those of the stored values.
    """
    return f"channels:{count}"


def channels_of(image_format: str) -> int:
    """Return the number of channels of a :func:`channels_format`; 0 for any other format."""
    name, _, count = image_format.partition(":")
    return int(count) if name == "channels" and count.isdigit() else 0


def stored_format(path: str) -> tuple[int, int]:
    """Return the number of channels of a PNG or TIFF file and their bits; (3, 8) for others.

    A palette counts as three channels, and transparency as one.

    Raises:
        OSError: not readable; the text is the reason.
    """
    with decoder_errors(path):
        with _open_regular(path) as file:
            start = file.read(26)
        if start.startswith(b"\x89PNG") and len(start) == 26:
            # Colour types of the PNG specification, 11.2.1: grey, RGB, palette, grey and RGB with
            # alpha.
            return {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(start[25], 3), max(start[24], 8)
        if not _is_tiff(path):
            return 3, 8
        shape, bits = _read_tiff(path, header_only=True)[1:]
        return shape[2], bits


def read_channels(path: str, count: int = 0, max_pixels: int = MAX_PIXELS_LIMIT) -> np.ndarray:
    """Read the stored values of an image file, without changing their number or range.

    Args:
        path: path of a regular file.
        count: number of channels that the file must have; 0 takes any.
        max_pixels: images of more are refused.

    Returns:
        (H, W, C) float32; colours in the order red, green, blue.

    Raises:
        OSError: not readable, another number of channels, or a TIFF file without ``tifffile``.
    """
    with decoder_errors(path, max_pixels):
        if _is_tiff(path):
            pixels = _read_tiff(path)[0]
        else:
            data = np.frombuffer(_read_bytes(path, max_pixels), np.uint8)
            decoded = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
            if decoded is None:
                raise OSError("not an image of a known format")
            pixels = decoded.reshape(*decoded.shape[:2], -1)
            if pixels.shape[2] >= 3:  # OpenCV has blue first
                pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]
        _check_size(pixels.shape[0], pixels.shape[1], max_pixels)
        if count and pixels.shape[2] != count:
            raise OSError(f"{pixels.shape[2]} channels instead of {count}")
        return np.ascontiguousarray(pixels, dtype=np.float32)


def preview(image: str | np.ndarray) -> np.ndarray:
    """Show any image as (H, W, 3) uint8 RGB.

    Of more than three channels the first three are shown, of two the first. Values of more than 8
    bits are scaled from their first to their 99th percentile.

    Args:
        image: file, or (H, W, C) array.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        if isinstance(image, str):
            channels, bits = stored_format(image) if image.lower().endswith(_STORED) else (3, 8)
            if bits == 8 and (channels in (1, 3) or not _is_tiff(image)):
                return read_rgb(image, MAX_PIXELS_LIMIT)
            image = read_channels(image)
    except OSError as error:
        raise InputError(f"the image '{printable(str(image))}' cannot be read ({error}).") from None
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    low, high = np.percentile(shown, (1, 99))
    return (255 * np.clip((shown - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


_STORED = (".png", ".tif", ".tiff")


def _is_tiff(path: str) -> bool:
    with _open_regular(path) as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _read_tiff(
    path: str, header_only: bool = False
) -> tuple[np.ndarray, tuple[int, int, int], int]:
    """Pixels (H, W, C) of a TIFF file's first image, their shape, and the bits of a value."""
    try:
        import tifffile
    except ImportError as error:
        raise OSError(
            "TIFF files of several channels need the package tifffile; run pip install "
            "'flsl-d2[formats]'"
        ) from error
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes = series.axes
        kept = [axis for axis in axes if axis in "YXSC"]
        sizes = dict(zip(axes, series.shape, strict=True))
        channel = next((axis for axis in "SC" if axis in kept), "")
        shape = sizes["Y"], sizes["X"], sizes.get(channel, 1)
        bits = 8 * series.dtype.itemsize
        if header_only:
            return np.empty(0), shape, bits
        pixels = series.asarray()
        # The first of several times or depths is taken, like the first frame of an animation.
        first = tuple(slice(None) if axis in ("Y", "X", channel) else 0 for axis in axes)
        pixels = pixels[first]
        order = [axis for axis in axes if axis in ("Y", "X", channel)]
        pixels = pixels.transpose([order.index(a) for a in ("Y", "X", channel) if a])
        return pixels.reshape(shape), shape, bits


def _size_of_multispectral(path: str) -> tuple[int, int] | None:
    """Height and width of a TIFF file of more channels than Pillow knows; None for others."""
    try:
        height, width, channels = read_channels(path).shape if _is_tiff(path) else (0, 0, 0)
    except OSError:
        return None
    return (height, width) if channels == 2 or channels > 3 else None


def picture_size(path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image file when it is upright, and as they are stored.

    Only the header is read, unless the file is odd.

    Raises:
        OSError: the header shows that the file cannot be read; the text is the reason.
    """
    try:
        with _open_regular(path) as file:
            image = Image.open(file, formats=_FORMATS)
            _check_size(image.height, image.width, MAX_PIXELS_LIMIT)
            _check_mode(image)
            turned = _orientation(image) in _TURNED
    except Exception:
        # The reader knows files that Pillow refuses, and has its own words for the others.
        try:
            shape = ImageFile(path, MAX_PIXELS_LIMIT).shape
        except OSError as error:
            known = _size_of_multispectral(path)
            if not known:
                raise error from None
            shape = known
        return shape, shape
    size = image.height, image.width
    if not turned:
        return size, size
    # Pillow gives the size of a TIFF file upright.
    return (size, size[::-1]) if image.format == "TIFF" else (size[::-1], size)


class ImageFile:
    """An image file whose size is known, and whose pixels can be decoded.

    It is upright as its EXIF data say. Of several frames the first is taken; transparency is put on
    white, as a viewer shows it, because the colour of a transparent pixel is arbitrary; of 16 bits
    the upper 8 are kept; CMYK is converted without its colour profile. The format is that of the
    content, not of the name.

    Args:
        source: path of a regular file, because a pipe or a device would be read for ever; or the
            content of a file.
        max_pixels: number of pixels from which an image is refused before it is decoded.

    Attributes:
        shape: height and width in pixels.
        reductions: divisors of the size that the file can be decoded at, 1 among them.

    Raises:
        OSError: not readable or not an image; the text is the reason.
    """

    def __init__(self, source: str | bytes, max_pixels: int = MAX_PIXELS) -> None:
        self._path, self._max_pixels = source if isinstance(source, str) else "", max_pixels
        with decoder_errors(self._path, max_pixels):
            self._data = _read_bytes(source, max_pixels) if isinstance(source, str) else source
            if not self._data:
                raise OSError("empty file")
            size = self._size = _plain_jpeg_size(self._data)
            self._decoded: np.ndarray | None = None
            self.reductions: tuple[int, ...] = JPEG_REDUCTIONS
            self.shape: tuple[int, int]
            if size is None:
                image = _open(self._data, max_pixels)
                pixels = _convert(image)
                # Pillow has turned images of some formats by now, and dropped their orientation.
                self._decoded, self.reductions = _upright(pixels, _orientation(image)), (1,)
                self.shape = self._decoded.shape[0], self._decoded.shape[1]
            else:
                _check_size(*size, max_pixels)
                self._orientation = _jpeg_orientation(self._data)
                self.shape = size[::-1] if self._orientation in _TURNED else size

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Decode the image to (H, W, 3) uint8 RGB.

        Args:
            reduction: one of ``reductions``. Sides are divided by it and rounded up; a JPEG's
                blocks are decoded at that size, which is faster than decoding all and resampling.

        Raises:
            OSError: the image lacks a part, or cannot be decoded; the text is the reason.
        """
        if self._decoded is not None or self._size is None:
            assert self._decoded is not None
            return self._decoded
        with decoder_errors(self._path, self._max_pixels):
            return _upright(_decode_jpeg(self._data, *self._size, reduction), self._orientation)


@contextmanager
def decoder_errors(path: str, max_pixels: int = MAX_PIXELS_LIMIT) -> Iterator[None]:
    """Raise what a decoder raises as ``OSError``, and errors of the machine as they are.

    Decoders answer broken bytes with nearly any exception: ValueError, SyntaxError, struct.error,
    MemoryError of a size that is wrong.

    Raises:
        OSError: the file is bad; the text is the reason.
        MachineError: see :func:`flsl_d2.files.machine_errors`.
    """
    try:
        with machine_errors(path):
            try:
                yield
            except (MemoryError, cv2.error) as error:
                if isinstance(error, MemoryError) or error.code == cv2.Error.StsNoMem:
                    bytearray(8 * max_pixels)  # as much as 16-bit RGBA of that size
                raise OSError(" ".join(str(error).split()) or type(error).__name__) from None
    except MachineError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(" ".join(reason.split())) from None


def holds_image(path: str) -> bool:
    """Whether the first bytes of a file are those of a format that is read.

    Raises:
        OSError: it is no regular file, or cannot be opened.
        MachineError: see :func:`flsl_d2.files.machine_errors`.
    """
    with machine_errors(path), _open_regular(path) as file:
        return bool(_SIGNATURES.match(file.read(16)))


def _read_bytes(path: str, max_pixels: int) -> bytes:
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > 8 * max_pixels + 2**20:  # 16-bit RGBA without compression
            raise OSError(f"{size} bytes are more than {max_pixels} pixels can have")
        return file.read()


@contextmanager
def _open_regular(path: str) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        yield file


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise OSError(f"{width} x {height} pixels are more than max_pixels")


def _open(data: bytes, max_pixels: int = MAX_PIXELS_LIMIT) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        other = describe_content(data)
        raise OSError(f"not an image of a known format{' but ' * bool(other)}{other}") from None
    _check_size(image.height, image.width, max_pixels)
    return image


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that the fast decoder takes; None for other files."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return None if colours in ("CMYK", "YCCK") else (height, width)


def _decode_jpeg(data: bytes, height: int, width: int, reduction: int) -> np.ndarray:
    smallest = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **(smallest if reduction > 1 else {}))
    except ValueError as error:
        # libjpeg invents what is lost and only warns, and most decoders, such as Pillow, hide it.
        # It also warns of superfluous bytes, which remain where others were overwritten.
        if str(error).startswith(("Corrupt", "Premature")):
            raise
        pixels = _convert(_open(data))  # an odd file that is not known to be damaged
        if reduction == 1:
            return pixels
        size = (smallest["min_width"], smallest["min_height"])
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _jpeg_orientation(data: bytes) -> int | None:
    # Pillow reads the orientation from EXIF or XMP data. Most files have neither, and opening them
    # once more takes a tenth of the time of decoding them.
    header = data[: _end_of_jpeg_header(data)]
    if b"Exif" not in header and b"Orientation" not in header:
        return None
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "MPO"))
    except MemoryError:
        raise
    except Exception:
        return None
    return _orientation(image)


def _end_of_jpeg_header(data: bytes) -> int:
    """Offset of the first scan (ITU-T T.81, B.1.1); the end of the data where none is found."""
    place = 2
    while data[place : place + 1] == b"\xff":
        if data[place + 1 : place + 2] == b"\xda":
            return place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF data do not make the pixels worse
        return None


def _check_mode(image: Image.Image) -> None:
    # PPM and older versions of Pillow widen 16 bits to mode I.
    sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise OSError("32-bit values, of which nobody knows which is white")


def _convert(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a Pillow image of any mode."""
    image.load()
    _check_mode(image)
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _upright(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """Turn pixels as EXIF orientations 2 to 8 say (CIPA DC-008); others change nothing."""
    if orientation not in range(2, 9):
        return pixels
    if orientation in _TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
