"""Pixels of image files: the one reader of pre-training, detection, evaluation and figures."""

from __future__ import annotations

import io
from contextlib import suppress

import cv2
import numpy as np
import simplejpeg
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from flsl_d2.errors import InputError
from flsl_d2.images.opening import (
    MAX_PIXELS_LIMIT,
    TURNED,
    check_size,
    decoder_errors,
    open_picture,
    open_regular,
    orientation,
    printable,
    read_bytes,
    upright,
)
from flsl_d2.images.stored_format import (
    StoredFormat,
    eight_bits,
    stored_format,
    stored_format_of,
    stored_pixels,
)

MAX_PIXELS = 100_000_000  # 300 MB decoded
# Divisors of the size for which decoders have fast transforms of a block.
JPEG_REDUCTIONS = (8, 4, 2, 1)


def read_rgb(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB; see :class:`ImageFile`."""
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


def read_channels(path: str, count: int = 0, max_pixels: int = MAX_PIXELS_LIMIT) -> np.ndarray:
    """Read the stored values of an image file, without changing their range.

    Args:
        count: number of channels that the file must have; 0 takes any. Where it is 1, of colours
            whose channels are equal one is taken.

    Returns:
        (H, W, C) float32, upright; colours in the order red, green, blue.

    Raises:
        OSError: not readable, another number of channels, or a TIFF file without ``tifffile``.
    """
    with decoder_errors(path, max_pixels):
        data = read_bytes(path, max_pixels)
        stored = stored_format_of(io.BytesIO(data))
        if stored:
            pixels = stored_pixels(data, stored, max_pixels)
        else:
            pixels = ImageFile(data, max_pixels).pixels()
        check_size(pixels.shape[0], pixels.shape[1], max_pixels)
        if count == 1 and pixels.shape[2] == 3 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., :1]
        if count and pixels.shape[2] != count:
            raise OSError(f"{pixels.shape[2]} channels instead of {count}")
        return np.ascontiguousarray(pixels, dtype=np.float32)


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


def preview(image: str | np.ndarray) -> np.ndarray:
    """Show any image as (H, W, 3) uint8 RGB.

    An image of more than three channels shows its first three, one of two its first. Values of more
    than 8 bits are scaled from their first to their 99th percentile.
    """
    try:
        if isinstance(image, str):
            if stored_format(image)[1] == 8:
                with suppress(OSError):  # several channels are no colours
                    return read_rgb(image, MAX_PIXELS_LIMIT)
            image = read_channels(image)
    except OSError as error:
        raise InputError(f"the image '{printable(str(image))}' cannot be read ({error}).") from None
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    low, high = np.percentile(shown, (1, 99))
    return (255 * np.clip((shown - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


def picture_size(path: str, channels: str = "") -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of an image file when it is upright, and as they are stored.

    Only the header is read, unless the file is odd. Files that cannot be read in the image format
    ``channels`` are refused; empty takes those that any format takes.

    Raises:
        OSError: the header shows that the file cannot be read; the text is the reason.
    """
    try:
        with open_regular(path) as file:
            image = open_picture(file)
            _check_mode(image)
            turned = orientation(image) in TURNED
    except Exception:
        # The reader knows files that Pillow refuses, and has its own words for the others.
        try:
            shape = ImageFile(path, MAX_PIXELS_LIMIT).shape
        except OSError:
            stored = _stored_format(path)
            as_colours = bool(channels) and not channels_of(channels)
            if stored is None or stored.is_plain or as_colours:
                raise
            shape = stored.size
        return shape, shape
    size = image.height, image.width
    if not turned:
        return size, size
    # Pillow gives the size of a TIFF file upright.
    return (size, size[::-1]) if image.format == "TIFF" else (size[::-1], size)


def _stored_format(path: str) -> StoredFormat | None:
    try:
        with decoder_errors(path), open_regular(path) as file:
            return stored_format_of(file)
    except OSError:
        return None


class ImageFile:
    """An image file whose size is known, and whose pixels can be decoded.

    It is upright as its EXIF data say. Of several frames the first is taken; transparency is put on
    white, as a viewer shows it, because the colour of a transparent pixel is arbitrary; of 16 bits
    the upper 8 of those that count are kept (:mod:`flsl_d2.images.stored_format`); CMYK is
    converted without its colour profile. The format is that of the content, not of the name.

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
            self._data = read_bytes(source, max_pixels) if isinstance(source, str) else source
            if not self._data:
                raise OSError("empty file")
            size = self._size = _plain_jpeg_size(self._data)
            self._decoded: np.ndarray | None = None
            self.reductions: tuple[int, ...] = JPEG_REDUCTIONS
            self.shape: tuple[int, int]
            if size is None:
                self._decoded, self.reductions = self._decode(max_pixels), (1,)
                self.shape = self._decoded.shape[0], self._decoded.shape[1]
            else:
                check_size(*size, max_pixels)
                self._orientation = _jpeg_orientation(self._data)
                self.shape = size[::-1] if self._orientation in TURNED else size

    def _decode(self, max_pixels: int) -> np.ndarray:
        """Decode an image that is no plain JPEG."""
        stored = stored_format_of(io.BytesIO(self._data))
        if stored and stored.bits == 16 and stored.is_plain:
            values = stored_pixels(self._data, stored, max_pixels)
            return _on_white(eight_bits(values, stored.significant, self._path))
        image = open_picture(self._data, max_pixels)
        pixels = _convert(image)
        # Pillow has turned images of some formats by now, and dropped their orientation.
        return upright(pixels, orientation(image))

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
            return upright(_decode_jpeg(self._data, *self._size, reduction), self._orientation)


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
        pixels = _convert(open_picture(data))  # an odd file that is not known to be damaged
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
    return orientation(image)


def _end_of_jpeg_header(data: bytes) -> int:
    """Offset of the first scan (ITU-T T.81, B.1.1); the end of the data where none is found."""
    place = 2
    while data[place : place + 1] == b"\xff":
        if data[place + 1 : place + 2] == b"\xda":
            return place
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _check_mode(image: Image.Image) -> None:
    # PPM and older versions of Pillow widen 16 bits to mode I.
    sixteen_bits = image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise OSError("32-bit pixels have no defined white level; convert to 8 or 16 bits")
    if image.mode == "LAB":  # Pillow would take its third band for transparency
        raise OSError("colours of the kind LAB; convert to RGB")


def _convert(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a Pillow image of any mode."""
    image.load()
    _check_mode(image)
    if image.mode.startswith("I"):
        return _on_white((np.asarray(image) >> 8).astype(np.uint8)[..., None])
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) of uint8 grey or RGB pixels with or without transparency."""
    if pixels.shape[2] in (1, 3):
        return np.ascontiguousarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2))
    return _convert(Image.fromarray(pixels, "LA" if pixels.shape[2] == 2 else "RGBA"))
