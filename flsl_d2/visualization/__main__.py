"""Pictures of encoders, as PNG files and a page: ``python -m flsl_d2.visualization``."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flsl_d2.engine.command_line import (
    add_defaults,
    add_option,
    described_parser,
    named_weights,
    run_tool,
)
from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import (
    RANDOM,
    extract_tokens,
    frozen_encoder,
    read_for,
    usable_device,
)
from flsl_d2.files import plain_line, writable_folder
from flsl_d2.images.listing import find_images, image_files
from flsl_d2.images.reader import preview
from flsl_d2.modeling import Encoder, FLSLViT
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX
from flsl_d2.visualization.described import (
    CLUSTER_SCALES,
    DescribedEncoder,
    describe_encoder,
    read_head,
)
from flsl_d2.visualization.token_figures import (
    Point,
    chosen_token,
    comparison_figure,
    encoder_figure,
    groups_figure,
    modes_figure,
    nearest_figure,
)
from flsl_d2.visualization.token_page import write_page

DESCRIPTION = """Draw what the tokens of encoders group: attention, modes, clusters, principal
components, nearest patches and centroids, as PNG files and as one page, index.html, in which any
token can be clicked."""
EXAMPLES = """examples:
  a pre-trained encoder beside an untrained one, on 8 images of a folder:
    tools/visualize.py --weights output/pretrain/teacher_backbone.pth random --images photos
  the centroids as well, which only checkpoints hold, on images of COCO, larger:
    tools/visualize.py --weights flsl=output/pretrain/model_final.pth --dataset coco_2017_val \\
      --short-side 640
  one image, seen from two of its tokens:
    tools/visualize.py --weights FILE --images street.jpg --token 210,140 --token 33,300

docs/VISUALIZATION.md says what the pictures show and how to read them."""

_LARGE_PAGE = 25e6  # bytes
_PROBE = 112  # pixels of the image that is timed
_SIDES = (448, 384, 320, 256, 224, 192, 160, 128)
_SECONDS = 35.0  # for tokens; drawing comes on top


class NamedEncoder(NamedTuple):
    """An encoder, its name on pages, and its projection head where the file has one."""

    name: str
    encoder: Encoder
    head: FLSLHead | None


def chosen_images(images: Sequence[str], dataset: str, max_images: int) -> list[str]:
    """Choose image files: those named, and ``max_images`` of each folder and of a data set.

    Raises:
        InputError: there is no image, or a path or data set does not exist.
    """
    if not images and not dataset:
        raise InputError("there are no images to draw; give --images or --dataset.")
    files = []
    for path in (str(Path(image).expanduser()) for image in images):
        if not Path(path).exists():
            raise InputError(f"--images {path!r} does not exist; give image files or folders.")
        if not Path(path).is_dir():
            files.append(path)
            continue
        try:
            files += _evenly(find_images(path), max_images, path)
        except InputError:
            raise InputError(
                f"--images {path!r} is a folder without image files; give one that holds some."
            ) from None
    if dataset:
        found = image_files(name=dataset)
        if not found:
            raise InputError(f"the data set {dataset!r} has no images; give another --dataset.")
        files += _evenly(found, max_images, dataset)
    return files


def _evenly(files: list[str], count: int, source: str) -> list[str]:
    """Choose at most ``count`` files, spread evenly; always the same ones."""
    if len(files) <= count:
        return files
    print(f"{count} of the {len(files)} images of {source}; --max-images takes more")
    return [files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int)]


def chosen_points(
    points: Sequence[tuple[float, float]], images: Sequence[np.ndarray], files: Sequence[str]
) -> list[list[tuple[float, float]]]:
    """Convert points (x, y) in pixels to shares of each image's size; without any, the middle.

    Raises:
        InputError: a point lies outside an image.
    """
    shares = []
    for image, file in zip(images, files, strict=True):
        height, width = image.shape[:2]
        for x, y in points:
            if not (0 <= x < width and 0 <= y < height):
                raise InputError(
                    f"--token {x:g},{y:g} lies outside {file!r}, which is {width} x {height} "
                    "pixels; give X from 0 on to the right and Y from 0 on downwards."
                )
        shares.append([(x / width, y / height) for x, y in points] or [(0.5, 0.5)])
    return shares


def chosen_encoders(
    weights: Sequence[str], names: Sequence[str], device: str
) -> list[NamedEncoder]:
    """Build the encoders of weight files, on a device, with names that differ.

    Args:
        weights: files, ``timm:NAME``, and as in comparisons ``random``, which has the architecture
            of the first file, and ``random:NAME`` with that of the file of this name.
        names: names of the encoders; empty ones stand for those of the files and their folders.

    Raises:
        InputError: weights or device cannot be used.
    """
    names = names or [""] * len(weights)
    names = [name or _name(path) for name, path in zip(names, weights, strict=True)]
    place = usable_device(device)
    built = {i: frozen_encoder(w) for i, w in enumerate(weights) if not _is_random(w)}
    own = {names[i]: e.architecture for i, e in built.items() if isinstance(e, FLSLViT)}
    encoders = []
    for i, (name, path) in enumerate(zip(names, weights, strict=True)):
        unique = name if names.count(name) == 1 else f"{name} ({i + 1})"
        like = path.partition(":")[2]
        if i not in built and like and like not in own:
            known = ", ".join(own) or "none, so write random"
            raise InputError(f"{path!r} names none of the encoders; choose from {known}.")
        architecture = own[like] if like in own else next(iter(own.values()), None)
        encoder = built.get(i) or frozen_encoder(RANDOM, architecture=architecture)
        head = None if i not in built or path.startswith(TIMM_PREFIX) else read_head(path)
        encoders.append(NamedEncoder(unique, encoder.to(place), head))
    return encoders


def _is_random(path: str) -> bool:
    return path == RANDOM or path.startswith(f"{RANDOM}:")


def _name(path: str) -> str:
    """Name a file after itself and its folder, because many files have the same name."""
    if path.startswith(TIMM_PREFIX):
        return path.removeprefix(TIMM_PREFIX).partition("?")[0]
    return path if _is_random(path) else "/".join(Path(path).with_suffix("").parts[-2:])


def visualize(
    weights: Sequence[str],
    images: Sequence[str] = (),
    dataset: str = "",
    output: str = "output/pictures",
    points: Sequence[tuple[float, float]] = (),
    names: Sequence[str] = (),
    short_side: int | None = None,
    scale: float = 1.0,
    iterations: int = 5,
    max_images: int = 8,
    device: str = "cpu",
) -> None:
    """Write ``index.html`` and the PNG files, and print what they hold.

    The arguments are the options of the command line; ``points`` are those of ``--token`` and
    ``names`` those before the weights. Without ``short_side``, :func:`fitting_side` chooses it.

    Raises:
        InputError: weights, images or numbers cannot be used; nothing is written then.
    """
    if not 0 < scale < float("inf"):
        raise InputError(f"--scale is {scale:g}; give a positive number.")
    if iterations < 1:
        raise InputError(f"--iterations is {iterations}; give 1 or more.")
    if names and len(names) != len(weights):
        raise InputError(f"{len(names)} names for {len(weights)} weights; give one for each.")
    files = chosen_images(images, dataset, max_images)
    originals = [preview(file) for file in files]
    shares = chosen_points(points, originals, files)
    encoders = chosen_encoders(weights, names, device)
    folder = writable_folder(output, "--output")
    scales = sorted({*CLUSTER_SCALES, scale})
    if short_side is None:
        short_side = fitting_side(encoders, originals[0], len(originals), scales)
        print(f"images have a shorter side of {short_side} pixels, for about a minute's work; "
              "--short-side chooses another", flush=True)  # fmt: skip
    described: list[DescribedEncoder] = []
    for name, encoder, head in encoders:
        features = [
            extract_tokens(encoder, read_for(encoder.input_format, file), short_side or None)
            for file in progress(files, f"encoding with {plain_line(name)}")
        ]
        described.append(describe_encoder(name, features, scales, head, scale))
    rows = [(i, *share) for i in range(len(files)) for share in shares[i]]
    _write_figures(folder, described, rows, scale, iterations)
    made = f"Weights: {', '.join(weights)}. Shorter side of the images: " + (
        f"{short_side} pixels." if short_side else "as it is."
    )
    page, first = folder / "index.html", [share[0] for share in shares]
    image_names = [Path(file).name for file in files]
    size = write_page(page, described, image_names, first, scale, iterations, made)
    for each in described:
        print(_summary(each, scale))
    print(f"page: {page} ({size / 1e6:.1f} MB); PNG files beside it")
    if size > _LARGE_PAGE:
        print("the page is large: a smaller --short-side or --max-images makes it lighter")


def fitting_side(
    encoders: Sequence[NamedEncoder], image: np.ndarray, count: int, scales: Sequence[float]
) -> int:
    """Choose the shorter side of images with which pictures take at most about a minute.

    A small image is timed; encoding grows a little faster than the number of tokens, and what is
    computed from all pairs of tokens with its square.
    """
    encoding = pairs = 0.0
    for _, encoder, head in encoders:
        channels = encoder.input_format.channels  # any values take the same time
        probe = image if channels == 3 else np.repeat(image[..., :1], channels, axis=2)
        extract_tokens(encoder, probe, _PROBE)  # the first call is slower
        start = time.monotonic()
        features = extract_tokens(encoder, probe, _PROBE)
        middle = time.monotonic()
        describe_encoder("", [features], scales, head)
        encoding, pairs = encoding + middle - start, pairs + time.monotonic() - middle

    def seconds(side: int) -> float:
        factor = side / _PROBE
        return count * (encoding * factor**2.5 + pairs * factor**4)

    return next((side for side in _SIDES if seconds(side) < _SECONDS), _SIDES[-1])


def _write_figures(
    folder: Path,
    encoders: Sequence[DescribedEncoder],
    rows: Sequence[Point],
    scale: float,
    iterations: int,
) -> None:
    several = len(encoders) > 1
    for i, encoder in enumerate(progress(encoders, "drawing", unit="encoder")):
        plain = re.sub(r"[^A-Za-z0-9]+", "_", encoder.name).strip("_")
        start = f"{i + 1}_{plain}_" if several else ""
        encoder_figure(
            [encoder.features[row[0]] for row in rows],
            folder / f"{start}overview.png",
            [chosen_token(encoder, row) for row in rows],
            scale / encoder.width**0.5,
            iterations,
            title=f"What the encoder's tokens group: {encoder.name}, scale {scale:g} / sqrt(D)",
        )
        modes_figure(encoder, rows, folder / f"{start}modes.png", scale, iterations)
        if len(encoder.features) > 1:
            nearest_figure(encoder, rows, folder / f"{start}nearest_patches.png")
        groups_figure(encoder, folder / f"{start}centroids.png")
    if several:
        comparison_figure(encoders, rows, folder / "comparison.png", scale, iterations)


def _summary(encoder: DescribedEncoder, scale: float) -> str:
    labels = encoder.labels[scale]
    counts = [int(each.max()) + 1 for each in labels]
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    largest = np.mean([(each == 0).mean() for each in labels])
    r2 = [encoder.position_r2, encoder.colour_r2]
    position, colour = ("n/a" if value is None else f"{value:.2f}" for value in r2)
    return (
        f"{plain_line(encoder.name)}: {number} clusters an image, the largest "
        f"{largest:.0%} of it; a token attends to {encoder.attended[scale]:.0%} of the image; "
        f"position R^2 {position}; colour R^2 {colour}; {encoder.groups_note}"
    )


def point(text: str) -> tuple[float, float]:
    """Pixel of an image, written as X,Y."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not X,Y, such as 120,80") from None
    return x, y


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the encoders that a command line names."""
    parser = described_parser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add_option(
        parser,
        "--weights",
        type=named_weights,
        action="extend",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="encoders to show side by side, and their names on the pages: files or URLs of any "
        "known layout, timm:NAME, or 'random' for untrained weights of the first file's shape",
    )
    images = "image files, folders of images"
    add("--images", nargs="+", default=[], metavar="PATH", help=images)
    most = "most images of each folder and data set (default: %(default)s)"
    add_option(parser, "--max-images", default=8, help=most)
    add_option(parser, "--output", default=Path("output/pictures"))
    token = "token to look from, in pixels of the image; may be repeated (default: the middle)"
    add("--token", type=point, action="append", default=[], metavar="X,Y", help=token)
    side = "shorter side of images in pixels; 0 keeps their size (default: what takes a minute)"
    add_option(parser, "--short-side", help=side, default=None)
    add_option(parser, "--device")
    scale = (
        "scale of attention and mean-shift, times sqrt(D); larger values give more, smaller "
        "clusters, and pre-training uses 0.1"
    )
    add_defaults(
        parser,
        ("--scale", 1.0, scale),
        ("--iterations", 5, "mean-shift steps"),
        ("--dataset", "", "data set registered in Detectron2"),
    )
    given = vars(parser.parse_args(arguments))
    pairs = given.pop("weights")
    given |= {"weights": [w for _, w in pairs], "names": [name for name, _ in pairs]}
    given["points"] = given.pop("token")
    run_tool(lambda: visualize(**given))


if __name__ == "__main__":
    main()
