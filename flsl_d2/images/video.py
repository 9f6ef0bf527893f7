"""Frames of a video with their times, and videos that browsers play, by PyAV (FFmpeg)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flsl_d2.errors import InputError
from flsl_d2.images.opening import printable

# Encoders by preference: H.264 is played by every browser, MPEG-4 by few.
_ENCODERS = ("libx264", "libopenh264", "h264_videotoolbox", "mpeg4")
_TICKS = 90_000  # units of time of a second
_USUAL_RATE = 25.0

logger = logging.getLogger(__name__)


class Frame(NamedTuple):
    """A decoded frame: its number among those decoded, seconds from the start, RGB pixels."""

    number: int
    time: float
    pixels: np.ndarray


class Video:
    """Frames of a video file, upright, at their times.

    Attributes:
        rate: average number of frames a second, for a progress bar and a missing time.
        total: number of frames as the file states it; 0 where it does not.
        damaged: number of packets that could not be decoded, and of frames that lack a part.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.damaged = str(Path(path).expanduser()), 0
        if not Path(self.path).is_file():
            raise InputError(f"input '{printable(str(path))}' does not exist; check the path.")
        try:
            with _av().open(self.path) as container:
                stream = container.streams.video[0]
                self.rate = float(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
                self.total = int(stream.frames or 0)
            first = next(iter(self), None)
        except (_av().error.FFmpegError, IndexError, OSError):
            first = None
        if first is None:
            raise InputError(
                f"video '{printable(str(path))}' cannot be decoded; convert it to MP4 with H.264."
            )
        self.size = first.pixels.shape[:2]

    def __iter__(self) -> Iterator[Frame]:
        self.damaged = 0
        last = start = None
        for number, frame in enumerate(self._decoded()):
            self.damaged += bool(frame.is_corrupt)
            time = frame.time
            if time is None:
                time = 0.0 if last is None else last + 1 / self.rate
            start = time if start is None else start
            # Clocks of cameras that are set back must not stop the video.
            last = time if last is None else max(time, last + 1 / _TICKS)
            pixels = frame.to_ndarray(format="rgb24")
            turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
            yield Frame(number, last - start, np.ascontiguousarray(np.rot90(pixels, turns)))

    def _decoded(self) -> Iterator[Any]:
        error = _av().error.FFmpegError
        with _av().open(self.path) as container:
            packets = container.demux(container.streams.video[0])
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except error:  # the file ends in the middle of a packet
                    self.damaged += 1
                    return
                try:
                    frames = packet.decode()
                except error:
                    self.damaged += 1
                else:
                    yield from frames


def is_video(path: str) -> bool:
    """Whether FFmpeg finds moving pictures in a file, whatever its name is."""
    try:
        Video(path)
    except InputError:
        return False
    return True


class VideoWriter:
    """An MP4 file that gets frames of one size with their times.

    An odd height or width loses a row or column. ``rate`` is the usual number of frames a second.
    """

    def __init__(self, path: Path, size: tuple[int, ...], rate: float) -> None:
        av = _av()
        codec = next((name for name in _ENCODERS if name in av.codecs_available), None)
        if codec is None:
            raise InputError(f"'{path}' cannot be written: this FFmpeg has no encoder for MP4.")
        if codec == _ENCODERS[-1]:
            logger.warning(
                "This FFmpeg has no encoder of H.264 (libx264), so browsers may not play %s.", path
            )
        self.height, self.width = (max(side // 2 * 2, 2) for side in size[:2])
        options = {"movflags": "faststart"}
        self.container = av.open(str(path), "w", format="mp4", options=options)
        shown = Fraction(max(rate, 1.0)).limit_denominator(1000)
        self.stream = self.container.add_stream(codec, rate=shown)
        self.stream.width, self.stream.height = self.width, self.height
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, _TICKS)
        self.last = -1

    def write(self, pixels: np.ndarray, time: float) -> None:
        """Append an RGB frame that is shown from a time on, in seconds."""
        cut = np.ascontiguousarray(pixels[: self.height, : self.width])
        frame = _av().VideoFrame.from_ndarray(cut, format="rgb24")
        self.last = max(round(time * _TICKS), self.last + 1)
        frame.pts, frame.time_base = self.last, Fraction(1, _TICKS)
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Write the last frames."""
        self.container.mux(self.stream.encode(None))
        self.container.close()


@contextmanager
def written_video(path: Path, size: tuple[int, ...], rate: float) -> Iterator[VideoWriter]:
    """Open a video for writing, which appears under its name once it is complete."""
    unfinished = path.with_name(f"{path.stem}.part.mp4")
    try:
        writer = VideoWriter(unfinished, size, rate)
        yield writer
        writer.close()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError(
            "videos need the package av, which is not installed; run pip install 'flsl-d2[video]'."
        ) from error
    return av
