"""Detect objects in images, folders and videos: ``python -m flsl_d2.detection.predict``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from flsl_d2.detection.predictor import Detections, Predictor
from flsl_d2.engine.command_line import add_option, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.images.listing import find_images
from flsl_d2.images.reader import preview
from flsl_d2.visualization.figures import enlarge

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
EXAMPLES = """examples:
  every image of a folder, with the detector of a training run:
    tools/predict.py --model output/mask_rcnn --input photos --output output/predictions
  small objects in large pictures:
    tools/predict.py --model output/mask_rcnn --input aerial.tif --slice 800 --overlap 0.2
  a video:
    tools/predict.py --model output/mask_rcnn --input street.mp4"""


def predict_images(
    predictor: Predictor, files: Sequence[str], output: str | Path, write_masks: bool = False
) -> int:
    """Write drawn pictures and a COCO results file of images.

    ``drawn/`` gets a PNG of each image, ``results.json`` the detections in COCO's results format,
    ``images.json`` the image of each ``image_id`` with the categories, and ``masks/`` a PNG of each
    object where asked for. An image that cannot be read is reported and left out.

    Args:
        predictor: the detector.
        files: image files.
        output: folder to write to.
        write_masks: write the masks, too.

    Returns:
        Number of images that could not be read.
    """
    output = Path(output).expanduser()
    (output / "drawn").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    failed = 0
    with tqdm(total=len(files), unit="image", disable=None) as progress:
        for start in range(0, len(files), predictor.batch_size):
            batch, pixels = [], []
            for file in files[start : start + predictor.batch_size]:
                try:
                    pixels.append(predictor.read(file))
                    batch.append(file)
                except InputError as error:
                    failed += 1
                    progress.write(f"left out: {error}")
            for file, image, found in zip(batch, pixels, predictor(pixels), strict=True):
                number = len(images) + 1
                height, width = image.shape[:2]
                images.append({"id": number, "file_name": file, "height": height, "width": width})
                results += found.coco_results(number, predictor.category_ids)
                name = f"{number:06d}_{Path(file).stem}"
                drawn = found.drawn_on(preview(image))
                Image.fromarray(drawn).save(output / "drawn" / f"{name}.png")
                if write_masks and found.masks is not None:
                    _write_masks(output / "masks", name, found)
            progress.update(len(files[start : start + predictor.batch_size]))
    write_text(output / "results.json", json.dumps(results))
    pairs = zip(predictor.category_ids, predictor.class_names, strict=False)
    categories = [{"id": id_, "name": name} for id_, name in pairs]
    content = {"images": images, "categories": categories, "failed": failed}
    write_text(output / "images.json", json.dumps(content, indent=1))
    return failed


def predict_video(predictor: Predictor, video: str | Path, output: str | Path) -> Path:
    """Write a video with the detections drawn into every frame.

    Args:
        predictor: the detector.
        video: file that OpenCV can decode.
        output: folder to write to.

    Returns:
        The MP4 file written.

    Raises:
        InputError: the video cannot be decoded, or this OpenCV cannot write MP4.
    """
    output = Path(output).expanduser()
    reader, frame = _open_video(video)
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{Path(video).stem}_detections.mp4"
    unfinished = file.with_suffix(".part.mp4")
    height, width = enlarge(frame)[0].shape[:2]
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    code = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(unfinished), code, rate, (width, height))
    if not writer.isOpened():
        raise InputError(f"OpenCV cannot write '{file}'; install an OpenCV with FFmpeg.")
    total = int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    try:
        with tqdm(total=total, unit="frame", disable=None) as progress:
            frames = [frame]
            while frames:
                images = [np.ascontiguousarray(each[..., ::-1]) for each in frames]
                for image, found in zip(images, predictor(images), strict=True):
                    writer.write(np.ascontiguousarray(found.drawn_on(image)[..., ::-1]))
                progress.update(len(frames))
                read = [reader.read() for _ in range(predictor.batch_size)]
                frames = [each for readable, each in read if readable]
        writer.release()
        unfinished.replace(file)
    finally:
        writer.release()
        unfinished.unlink(missing_ok=True)
    return file


def _open_video(video: str | Path) -> tuple[cv2.VideoCapture, np.ndarray]:
    """Open a video and decode its first frame, BGR."""
    path = Path(video).expanduser()
    if not path.is_file():
        raise InputError(f"input '{video}' does not exist; check the path.")
    reader = cv2.VideoCapture(str(path))
    readable, frame = reader.read()
    if not readable:
        raise InputError(f"video '{video}' cannot be decoded; convert it to MP4 with H.264.")
    return reader, frame


def _image_files(inputs: Sequence[str]) -> list[str]:
    """List the images of files and folders, each once."""
    files: list[str] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files += find_images(path)
        elif path.is_file():
            files.append(str(path))
        else:
            raise InputError(f"input '{text}' is neither a file nor a folder; check the path.")
    return list(dict.fromkeys(files))


def _write_masks(folder: Path, name: str, found: Detections) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    masks = [] if found.masks is None else list(found.masks)
    for index, (mask, label) in enumerate(zip(masks, found.names, strict=True)):
        safe = "".join(c if c.isalnum() else "_" for c in label)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}_{index:03d}_{safe}.png")


def _predict(args: argparse.Namespace) -> None:
    for name, value in (("--batch-size", args.batch_size), ("--slice", args.slice + 1)):
        if value < 1:
            raise InputError(f"{name} is {value - (name == '--slice')}; give a larger number.")
    videos = [text for text in args.input if text.lower().endswith(VIDEO_SUFFIXES)]
    files = _image_files([text for text in args.input if text not in videos])
    if not files and not videos:
        raise InputError(f"there is no image in {', '.join(args.input)}; name images or a video.")
    for video in videos:  # before the model is loaded and anything is written
        _open_video(video)[0].release()
    predictor = Predictor(
        args.model,
        args.weights,
        args.device,
        args.score_threshold,
        args.slice,
        args.overlap,
        args.short_side,
        args.batch_size,
    )
    if videos and predictor.channels:
        raise InputError(
            f"the detector takes images of {predictor.channels} channels, and a video has three; "
            "give images."
        )
    if files:
        failed = predict_images(predictor, files, args.output, args.masks)
        print(f"{len(files) - failed} images: {args.output}/drawn, {args.output}/results.json")
        if failed == len(files):
            raise InputError("none of the images could be read; see the lines above.")
    for video in videos:
        print(predict_video(predictor, video, args.output))


def main(arguments: Sequence[str] | None = None) -> None:
    """Detect as a command line describes."""
    parser = described_parser(
        "Detect objects in images, folders of images or videos, and draw them.", EXAMPLES
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder of a training run, or a config file")
    add_option(parser, "--weights", default="", help="detector weights (default: the run's best)")
    add("--input", nargs="+", required=True, metavar="PATH", help="images, folders, videos")
    add_option(parser, "--output", default="output/predictions")
    add_option(parser, "--device")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (%(default)s)")
    add_option(parser, "--score-threshold")
    add_option(
        parser, "--short-side", default=0, help="shorter side in pixels; 0: the config's test size"
    )
    add(
        *("--slice", "--tile"),
        type=int,
        default=0,
        metavar="PX",
        help="cut larger images into slices of this side, for small objects",
    )
    add(
        "--overlap",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of a slice that the next one sees, too (default: %(default)s)",
    )
    add("--masks", action="store_true", help="write the mask of each object as PNG")
    run_tool(_predict, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
