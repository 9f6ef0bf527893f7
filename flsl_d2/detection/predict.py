"""Detect objects in images, folders and videos: ``python -m flsl_d2.detection.predict``."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flsl_d2.detection.detections import Detections
from flsl_d2.detection.predictor import Predictor
from flsl_d2.engine.command_line import add_defaults, add_option, described_parser, run_tool
from flsl_d2.engine.log_lines import start_log
from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.files import OutputNames, write_text
from flsl_d2.images.listing import find_images
from flsl_d2.images.opening import MAX_PIXELS_LIMIT, holds_image, printable
from flsl_d2.images.reader import preview
from flsl_d2.images.video import Frame, Video, is_video, written_video

EXAMPLES = """examples:
  every image of a folder, with the detector of a training run:
    tools/predict.py --model output/mask_rcnn --input photos --output output/predictions
  small objects in large pictures:
    tools/predict.py --model output/mask_rcnn --input aerial.tif --slice 800 --overlap 0.2
  a video:
    tools/predict.py --model output/mask_rcnn --input street.mp4

A folder's detector is built from its model.json, which holds names and numbers alone. The config
of a folder without one may run any code, and is used with --trust-config alone."""

_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".ts")
logger = logging.getLogger(__name__)


def predict_images(
    predictor: Predictor,
    files: Sequence[str],
    output: str | Path,
    write_masks: bool = False,
    names: OutputNames | None = None,
) -> int:
    """Write drawn pictures and a COCO results file of images; return how many cannot be read.

    ``drawn/`` gets a PNG of each image, ``results.json`` the detections in COCO's results format,
    ``images.json`` the image of each ``image_id`` with the categories, and ``masks/`` a PNG of each
    object where asked for. An image that cannot be read is reported and left out; one that cannot
    be drawn is reported, and its detections are written all the same.

    Args:
        predictor: the detector.
        files: image files or URLs.
        output: folder to write to.
        write_masks: write the masks, too.
        names: names of the output folder that are taken.
    """
    output, names = Path(output).expanduser(), names or OutputNames()
    for folder in ("drawn", *["masks"] * write_masks):
        (output / folder).mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    failed: list[str] = []

    def read() -> Iterator[tuple[str, np.ndarray]]:
        for file in files:
            try:
                yield file, predictor.read(file)
            except InputError as error:
                failed.append(file)
                logger.warning("left out: %s", error)

    pictures = progress(read(), "predicting", len(files))
    while batch := list(islice(pictures, predictor.batch_size)):
        found = predictor([pixels for _, pixels in batch])
        for (file, pixels), each in zip(batch, found, strict=True):
            number = len(images) + 1
            height, width = pixels.shape[:2]
            images.append({"id": number, "file_name": file, "height": height, "width": width})
            results += each.coco_results(number, predictor.category_ids)
            name = names.free(f"{number:06d}_{Path(file).stem}", "")
            path = output / "drawn" / f"{name}.png"
            _drawn(lambda: Image.fromarray(each.drawn_on(preview(pixels))).save(path), file)  # noqa: B023
            if write_masks and each.masks is not None:
                _write_masks(output / "masks", name, each)
    write_text(output / "results.json", json.dumps(results))
    pairs = zip(predictor.category_ids, predictor.class_names, strict=False)
    categories = [{"id": id_, "name": name} for id_, name in pairs]
    content = {"images": images, "categories": categories, "failed": len(failed)}
    write_text(output / "images.json", json.dumps(content, indent=1))
    logger.info("%d detections in %d images.", len(results), len(images))
    return len(failed)


def predict_video(
    predictor: Predictor, video: str | Path, output: str | Path, names: OutputNames | None = None
) -> Path:
    """Write a video (MP4) with the detections drawn in, and a file of the detections.

    ``NAME_detections.mp4`` has the times of the video's own frames. ``NAME_detections.jsonl`` has a
    line of JSON for each frame: its number, its time in seconds, and COCO's results. Frames that
    are damaged are counted in a line of the log.

    Raises:
        InputError: the video cannot be decoded, or this FFmpeg cannot write MP4.
    """
    output, source = Path(output).expanduser(), Video(video)
    output.mkdir(parents=True, exist_ok=True)
    name = (names or OutputNames()).free(f"{Path(video).stem}_detections", ".mp4")
    size = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)).drawn_on(
        np.zeros((*source.size, 3), np.uint8)
    )
    count = objects = 0
    lines = output / f"{name}.jsonl"
    with (
        written_video(output / f"{name}.mp4", size.shape, source.rate) as writer,
        lines.open("w", encoding="utf-8") as table,
    ):
        frames = progress(source, f"predicting {printable(name)}", source.total or None, "frame")
        while batch := list(islice(frames, predictor.batch_size)):
            found = predictor([frame.pixels for frame in batch])
            for frame, each in zip(batch, found, strict=True):
                table.write(_frame_line(predictor, frame, each))
                drawn = _drawn(lambda: each.drawn_on(frame.pixels), f"frame {frame.number}")  # noqa: B023
                writer.write(size if drawn is None else drawn, frame.time)
                count, objects = count + 1, objects + len(each)
    logger.info("%s: %d detections in %d frames.", printable(name), objects, count)
    if source.damaged:
        text = "%s: %d damaged parts were passed over; %d frames could be decoded."
        logger.warning(text, printable(str(video)), source.damaged, count)
    return output / f"{name}.mp4"


def _frame_line(predictor: Predictor, frame: Frame, found: Detections) -> str:
    results = found.coco_results(frame.number, predictor.category_ids)
    for result, name in zip(results, found.names, strict=True):
        result["category"] = name
    line = {"frame": frame.number, "time": round(frame.time, 6), "detections": results}
    return json.dumps(line) + "\n"


def _drawn(draw: Callable[[], Any], what: str) -> Any:
    """Draw; None and a line of the log where that fails, because results are worth more."""
    try:
        return draw()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning("'%s' could not be drawn (%s); its results stay.", printable(what), reason)
        return None


def _write_masks(folder: Path, name: str, found: Detections) -> None:
    names = OutputNames()
    for index, (mask, label) in enumerate(zip(found.masks or (), found.names, strict=True)):
        file = names.free(f"{name}_{index:03d}_{label}", ".png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{file}.png")


def _inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sort files, folders and URLs into images and videos, each once, by their content."""
    images: list[str] = []
    videos: list[str] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            images += find_images(path)
        elif "://" in text:
            images.append(text)
        elif not path.is_file():
            raise InputError(f"input '{printable(text)}' does not exist; check the path.")
        elif holds_image(str(path)) or not (path.suffix.lower() in _VIDEOS or is_video(str(path))):
            images.append(str(path))
        else:
            videos.append(str(path))
    if not images and not videos:
        raise InputError(f"there is no image in {', '.join(inputs)}; name images or a video.")
    return list(dict.fromkeys(images)), list(dict.fromkeys(videos))


def _predict(args: argparse.Namespace) -> None:
    for name, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--slice", args.slice, 0),
        ("--max-pixels", args.max_pixels, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; give {least} or more.")
    start_log(None, 0, ["flsl_d2"])
    files, videos = _inputs(args.input)
    for video in videos:  # before the model is loaded and anything is written
        Video(video)
    names = ["model", "weights", "device", "score_threshold", "overlap", "short_side"]
    names += ["batch_size", "trust_config", "max_pixels"]
    options = {name: getattr(args, name) for name in names}
    predictor = Predictor(slice_side=args.slice, **options)
    if videos and predictor.channels:
        raise InputError(
            f"the detector takes images of {predictor.channels} channels, and a video has three; "
            "give images."
        )
    taken = OutputNames()
    if files:
        failed = predict_images(predictor, files, args.output, args.masks, taken)
        print(f"{len(files) - failed} images: {args.output}/drawn, {args.output}/results.json")
        if failed == len(files):
            raise InputError("none of the images could be read; see the lines above.")
    for video in videos:
        written = predict_video(predictor, video, args.output, taken)
        print(f"{written}, {written.with_suffix('.jsonl')}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = described_parser(
        "Detect objects in images, folders of images or videos, and draw them.", EXAMPLES
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder of a training run, or a config file")
    add_option(parser, "--weights", default="", help="detector weights (default: the run's best)")
    add("--input", nargs="+", required=True, metavar="PATH", help="images, folders, videos, URLs")
    add_option(parser, "--output", default="output/predictions")
    add_option(parser, "--device")
    add_defaults(parser, ("--batch-size", 1, "images at a time"))
    add_option(parser, "--score-threshold")
    add_option(
        parser, "--short-side", default=0, help="shorter side in pixels; 0: the config's test size"
    )
    add_defaults(
        parser,
        ("--slice", 0, "side in pixels of slices of larger images, for small objects; 0: none"),
        ("--overlap", 0.2, "share of a slice that the next one sees, too"),
        ("--max-pixels", MAX_PIXELS_LIMIT, "larger images are left out; a pixel takes 3 bytes"),
    )
    add("--masks", action="store_true", help="write the mask of each object as PNG")
    add(
        "--trust-config",
        action="store_true",
        help="run the LazyConfig of a folder without model.json; it may run any code",
    )
    run_tool(_predict, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
