"""Pictures of one or several encoders for some images: PNG files and a page to click in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from yaml import YAMLError

from flsl_d2.checkpoint import build_encoder
from flsl_d2.checkpoint.reading import split_weights_path
from flsl_d2.errors import InputError
from flsl_d2.evaluation import extract_tokens
from flsl_d2.evaluation.frozen_encoder import RANDOM, frozen_encoder, usable_device
from flsl_d2.modeling import FLSLViT
from flsl_d2.visualization import encoder_figure
from flsl_d2.visualization.described import CLUSTER_SCALES, DescribedEncoder, describe_encoder
from flsl_d2.visualization.html_page import write_page
from flsl_d2.visualization.token_figures import (
    chosen_token,
    comparison_figure,
    groups_figure,
    modes_figure,
    nearest_figure,
)
from pretrain.centroids import assign_centroids, read_head
from pretrain.images import find_images, image_files, read_rgb
from pretrain.model import FLSLHead

__all__ = ["visualize"]

_LARGE_PAGE = 25e6


class _Encoder(NamedTuple):
    name: str
    backbone: FLSLViT
    head: FLSLHead | None


def visualize(
    weights: Sequence[str],
    images: Sequence[str] = (),
    dataset: str = "",
    output: str = "output/pictures",
    points: Sequence[tuple[float, float]] = (),
    names: Sequence[str] = (),
    short_side: int = 448,
    scale: float = 1.0,
    num_iterations: int = 5,
    max_images: int = 8,
    device: str = "cpu",
) -> None:
    """Write ``index.html`` and the PNG files, and print what they hold.

    Args:
        weights: files or URLs that :func:`flsl_d2.checkpoint.build_encoder` reads, or ``random``
            for an untrained ViT-S/16.
        images: files, and folders of which ``max_images`` are taken.
        dataset: a data set registered in Detectron2, of which ``max_images`` are taken.
        output: folder of all files.
        points: tokens to look from, (x, y) in pixels of the original image; each is taken in every
            image. The middle of the image by default.
        names: of the encoders on the pages; by default those of the files and their folders.
        short_side: pixels that the shorter side of images is resized to; 0 keeps their size.
        scale: of attention and clusters, times sqrt(D).
        num_iterations: mean-shift steps from a token to its mode.
        max_images: of each folder and data set.
        device: to run the encoders on.

    Raises:
        InputError: weights, images or numbers that cannot be used; nothing is written then.
    """
    _check_numbers(short_side, scale, num_iterations, max_images)
    if names and len(names) != len(weights):
        raise InputError(f"{len(names)} names for {len(weights)} weights; give one for each.")
    files = _image_files(images, dataset, max_images)
    originals = [_read(file) for file in files]
    shares = _shares(points, originals, files)
    encoders = _encoders(weights, names, device)
    folder = _output_folder(output)
    scales = sorted({*CLUSTER_SCALES, scale})
    described, shown = [], []
    for encoder in encoders:
        size = short_side or None
        progress = tqdm(originals, f"encoding {encoder.name}", unit="image")
        features = [extract_tokens(encoder.backbone, image, size) for image in progress]
        described.append(_describe(encoder, features, scales, scale))
        shown = shown or [each.image for each in features]
    rows = [(i, *share) for i in range(len(files)) for share in shares[i]]
    made = f"Weights: {', '.join(weights)}. Shorter side of the images: " + (
        f"{short_side} pixels." if short_side else "as it is."
    )
    _write_figures(folder, described, shown, rows, scale, num_iterations)
    first = [share[0] for share in shares]
    size = write_page(
        folder / "index.html",
        described,
        shown,
        [Path(file).name for file in files],
        first,
        scale,
        num_iterations,
        made,
    )
    for each in described:
        print(_summary(each, scale))
    print(f"page: {folder / 'index.html'} ({size / 1e6:.1f} MB); PNG files beside it")
    if size > _LARGE_PAGE:
        print("the page is large: a smaller --short-side or --max-images makes it lighter")


def _check_numbers(short_side: int, scale: float, num_iterations: int, max_images: int) -> None:
    if short_side < 0:
        raise InputError(f"--short-side is {short_side}; give pixels, or 0 to keep the size.")
    if not 0 < scale < float("inf"):
        raise InputError(f"--scale is {scale:g}; give a positive number.")
    if num_iterations < 1:
        raise InputError(f"--iterations is {num_iterations}; give 1 or more.")
    if max_images < 1:
        raise InputError(f"--max-images is {max_images}; give 1 or more.")


def _image_files(images: Sequence[str], dataset: str, max_images: int) -> list[str]:
    if not images and not dataset:
        raise InputError("there are no images to draw; give --images or --dataset.")
    files = []
    for path in images:
        if not Path(path).exists():
            raise InputError(f"--images {path!r} does not exist; give image files or folders.")
        if not Path(path).is_dir():
            files.append(path)
            continue
        try:
            found = find_images(path)
        except InputError:
            raise InputError(
                f"--images {path!r} is a folder without image files; give one that holds some."
            ) from None
        files += _evenly(found, max_images, path)
    if dataset:
        found = image_files(name=dataset)
        if not found:
            raise InputError(f"the data set {dataset!r} has no images; give another --dataset.")
        files += _evenly(found, max_images, dataset)
    return files


def _evenly(files: list[str], count: int, source: str) -> list[str]:
    """At most `count` files, spread over all; always the same ones."""
    if len(files) <= count:
        return files
    print(f"{count} of the {len(files)} images of {source}; --max-images takes more")
    return [files[i] for i in np.linspace(0, len(files) - 1, count).round().astype(int)]


def _read(file: str) -> np.ndarray:
    try:
        return read_rgb(file)
    except OSError:
        raise InputError(
            f"the image {file!r} cannot be read as one; repair it or leave it out."
        ) from None


def _shares(
    points: Sequence[tuple[float, float]], images: Sequence[np.ndarray], files: Sequence[str]
) -> list[list[tuple[float, float]]]:
    """Of each image the points as shares of its width and height."""
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


def _encoders(weights: Sequence[str], names: Sequence[str], device: str) -> list[_Encoder]:
    names = list(names) or [_name(path) for path in weights]
    place = usable_device(device)
    encoders = []
    for i, (name, path) in enumerate(zip(names, weights, strict=True)):
        unique = name if names.count(name) == 1 else f"{name} ({i + 1})"
        head = None if path == RANDOM else read_head(path)
        encoders.append(_Encoder(unique, _backbone(path, head).to(place), head))
    return encoders


def _backbone(path: str, head: FLSLHead | None) -> FLSLViT:
    """The encoder of a file.

    Checkpoints of a run (those with a projection head) need not tell their number of attention
    heads, and another number gives other features: the config beside them tells it.
    """
    config = Path(split_weights_path(path)[0]).parent / "config.yaml"
    if head is None or not config.is_file():
        return frozen_encoder(path)
    try:
        num_heads = OmegaConf.select(OmegaConf.load(config), "model.backbone.num_heads")
    except (OSError, YAMLError, OmegaConfBaseException):
        num_heads = None
    if not isinstance(num_heads, int):
        return frozen_encoder(path)
    return build_encoder(path, num_heads=num_heads).requires_grad_(False)


def _name(path: str) -> str:
    """A file by its name and that of its folder, since many are called alike."""
    if path == RANDOM:
        return "random ViT-S/16"
    return "/".join(Path(path).with_suffix("").parts[-2:])


def _output_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "index.html.part").touch()
    except OSError as error:
        raise InputError(
            f"--output '{output}' cannot be written ({error.strerror}); give a folder of yours."
        ) from None
    return folder


def _describe(
    encoder: _Encoder, features: Sequence, scales: Sequence[float], scale: float
) -> DescribedEncoder:
    tokens = [each.tokens.cpu() for each in features]
    grids, images = [each.grid for each in features], [each.image for each in features]
    assigned, num_centroids = None, 0
    if encoder.head is not None:
        assigned = assign_centroids(encoder.head, tokens, scale / tokens[0].shape[1] ** 0.5)
        num_centroids = len(encoder.head.last_layer.weight_v)
    return describe_encoder(encoder.name, tokens, grids, images, scales, assigned, num_centroids)


def _write_figures(
    folder: Path,
    encoders: Sequence[DescribedEncoder],
    images: Sequence[np.ndarray],
    rows: Sequence[tuple[int, float, float]],
    scale: float,
    num_iterations: int,
) -> None:
    several = len(encoders) > 1
    total = 4 * len(encoders) + several
    progress = tqdm(total=total, desc="drawing", unit="page")
    for i, encoder in enumerate(encoders):
        start = f"{i + 1}_{_plain(encoder.name)}_" if several else ""
        encoder_figure(
            [images[row[0]] for row in rows],
            [encoder.tokens[row[0]] for row in rows],
            [encoder.grids[row[0]] for row in rows],
            folder / f"{start}overview.png",
            [chosen_token(encoder, row) for row in rows],
            scale / encoder.width**0.5,
            num_iterations,
            title=f"What the encoder's tokens group: {encoder.name}, scale {scale:g} / sqrt(D)",
        )
        progress.update()
        modes_figure(encoder, images, rows, folder / f"{start}modes.png", scale, num_iterations)
        progress.update()
        if len(images) > 1:
            nearest_figure(encoder, images, rows, folder / f"{start}nearest_patches.png")
        progress.update()
        groups_figure(encoder, images, folder / f"{start}centroids.png")
        progress.update()
    if several:
        comparison_figure(encoders, images, rows, folder / "comparison.png", scale, num_iterations)
        progress.update()
    progress.close()


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _summary(encoder: DescribedEncoder, scale: float) -> str:
    labels = encoder.labels[scale]
    counts = [int(each.max()) + 1 for each in labels]
    largest = np.mean([(each == 0).mean() for each in labels])
    r2 = [encoder.position_r2, encoder.colour_r2]
    position, colour = ("n/a" if value is None else f"{value:.2f}" for value in r2)
    return (
        f"{encoder.name}: {min(counts)} to {max(counts)} clusters an image, the largest "
        f"{largest:.0%} of it; a token attends to {encoder.attended[scale]:.0%} of the image; "
        f"position R^2 {position}; colour R^2 {colour}; {encoder.groups_note}"
    )
