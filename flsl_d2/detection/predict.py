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

from flsl_d2.data.image_files import find_images
from flsl_d2.detection.predictor import Detections, Predictor
from flsl_d2.engine.command_line import add_option, described_parser, run_tool
from flsl_d2.errors import InputError
from flsl_d2.files import write_text
from flsl_d2.visualization.detections import DrawnObjects, draw_objects
from flsl_d2.visualization.figures import enlarge

__all__ = ["main", "predict_images", "predict_video"]

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
EXAMPLES = """examples:
  every image of a folder, with the detector of a training run:
    tools/predict.py --model output/mask_rcnn --input photos --output output/predictions
  small objects in large pictures:
    tools/predict.py --model output/mask_rcnn --input aerial.tif --tile 800
  a video:
    tools/predict.py --model output/mask_rcnn --input street.mp4"""


def predict_images(
    predictor: Predictor,
    inputs: Sequence[str],
    output: str | Path,
    batch_size: int = 1,
    write_masks: bool = False,
) -> int:
    """Write drawn pictures and a COCO results file of images.

    ``drawn/`` gets a PNG of each image, ``results.json`` the detections in COCO's results format,
    ``images.json`` the image of each ``image_id``, and ``masks/`` a PNG of each object where asked
    for. An image that cannot be read is reported and left out.

    Args:
        predictor: the detector.
        inputs: image files and folders of them.
        output: folder to write to.
        batch_size: images of a forward pass.
        write_masks: write the masks, too.

    Returns:
        Number of images that could not be read.

    Raises:
        InputError: no image at all.
    """
    files = _image_files(inputs)
    output = Path(output).expanduser()
    (output / "drawn").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    failed = 0
    progress = tqdm(total=len(files), unit="image", disable=None)
    for start in range(0, len(files), batch_size):
        batch, pixels = [], []
        for file in files[start : start + batch_size]:
            try:
                pixels.append(predictor.read(file))
                batch.append(file)
            except InputError as error:
                failed += 1
                progress.write(f"left out: {error}")
        for file, rgb, found in zip(batch, pixels, predictor(pixels), strict=True):
            number = len(images) + 1
            images.append(
                {"id": number, "file_name": file, "height": rgb.shape[0], "width": rgb.shape[1]}
            )
            results += found.coco_results(number)
            name = f"{number:06d}_{Path(file).stem}"
            Image.fromarray(_drawn(rgb, found)).save(output / "drawn" / f"{name}.png")
            if write_masks and found.masks is not None:
                _write_masks(output / "masks", name, found)
        progress.update(len(files[start : start + batch_size]))
    progress.close()
    write_text(output / "results.json", json.dumps(results))
    write_text(output / "images.json", json.dumps({"images": images, "failed": failed}, indent=1))
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
    reader = cv2.VideoCapture(str(Path(video).expanduser()))
    readable, frame = reader.read()
    if not readable:
        raise InputError(f"video '{video}' cannot be decoded; convert it to MP4 with H.264.")
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{Path(video).stem}_detections.mp4"
    height, width = enlarge(frame)[0].shape[:2]
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    if not writer.isOpened():
        raise InputError(f"OpenCV cannot write '{file}'; install an OpenCV with FFmpeg.")
    total = int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    with tqdm(total=total, unit="frame", disable=None) as progress:
        while readable:
            rgb = np.ascontiguousarray(frame[..., ::-1])
            writer.write(np.ascontiguousarray(_drawn(rgb, predictor(rgb)[0])[..., ::-1]))
            progress.update()
            readable, frame = reader.read()
    writer.release()
    return file


def _image_files(inputs: Sequence[str]) -> list[str]:
    files: list[str] = []
    for text in inputs:
        path = Path(text).expanduser()
        if path.is_dir():
            files += find_images(path)
        elif path.is_file():
            files.append(str(path))
        else:
            raise InputError(f"input '{text}' is neither a file nor a folder; check the path.")
    return files


def _drawn(rgb: np.ndarray, found: Detections) -> np.ndarray:
    masks: list[np.ndarray | None] = [None] * len(found)
    if found.masks is not None:
        masks = list(found.masks)
    objects = DrawnObjects(found.boxes, masks, found.classes.tolist(), found.scores.tolist())
    return draw_objects(np.ascontiguousarray(rgb), objects, list(found.class_names))


def _write_masks(folder: Path, name: str, found: Detections) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    masks = [] if found.masks is None else list(found.masks)
    for index, (mask, label) in enumerate(zip(masks, found.names, strict=True)):
        safe = "".join(c if c.isalnum() else "_" for c in label)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}_{index:03d}_{safe}.png")


def _predict(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; use 1 or more.")
    videos = [text for text in args.input if text.lower().endswith(VIDEO_SUFFIXES)]
    pictures = [text for text in args.input if text not in videos]
    files = _image_files(pictures)
    if not files and not videos:
        raise InputError(f"there is no image in {', '.join(args.input)}; name images or a video.")
    predictor = Predictor(
        args.model, args.weights, args.device, args.score_threshold, args.tile, args.short_side
    )
    if files:
        failed = predict_images(predictor, files, args.output, args.batch_size, args.masks)
        print(f"{len(files) - failed} images: {args.output}/drawn, {args.output}/results.json")
        if failed == len(files):
            raise InputError("none of the images could be read; see the lines above.")
    for video in videos:
        print(predict_video(predictor, video, args.output))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, or that of the process."""
    parser = described_parser(
        "Detect objects in images, folders of images or videos, and draw them.", EXAMPLES
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder of a training run, or a config file")
    add_option(parser, "--weights", default="", help="detector weights (default: the run's last)")
    add("--input", nargs="+", required=True, metavar="PATH", help="images, folders, videos")
    add_option(parser, "--output", default="output/predictions")
    add_option(parser, "--device")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (%(default)s)")
    add(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="leave out detections with a lower score (default: %(default)s)",
    )
    add_option(
        parser, "--short-side", default=0, help="shorter side in pixels; 0: the config's test size"
    )
    add("--tile", type=int, default=0, metavar="PIXELS", help="cut images into tiles of this side")
    add("--masks", action="store_true", help="write the mask of each object as PNG")
    run_tool(_predict, parser.parse_args(arguments))


if __name__ == "__main__":
    main()
