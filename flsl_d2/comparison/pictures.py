"""The same images, seen by each encoder and each detector of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from flsl_d2.checkpoint import build_encoder
from flsl_d2.evaluation import extract_tokens
from flsl_d2.visualization import (
    cluster_labels,
    cluster_overlay,
    detections_beside_ground_truth,
    pca_rgb,
)
from flsl_d2.visualization.detections import choose_records
from flsl_d2.visualization.figure_files import new_figure, save_figure, show_image

__all__ = ["detection_pictures", "token_pictures"]

# Of the mean-shift that makes the clusters, times sqrt(D): wide kernels merge everything.
_SCALE = 1.0
# Tokens on the shorter side: as fine as eyes want it, and clustered within seconds.
_TOKENS = 32
_PANEL_INCHES = 2.5


def token_pictures(encoders: Mapping[str, str], dataset: str, num_images: int, path: Path) -> None:
    """Rows of images; a column for the image, and two for each encoder: components and clusters.

    Args:
        encoders: weight files by name.
        dataset: registered name; the images are spread evenly over those with objects.
        num_images: rows.
        path: the PNG to write.
    """
    records = choose_records(DatasetCatalog.get(dataset), num_images)
    images = [read_image(record["file_name"], "RGB") for record in records]
    heights = [_PANEL_INCHES * image.shape[0] / image.shape[1] + 0.25 for image in images]
    figure = new_figure(_PANEL_INCHES * (1 + 2 * len(encoders)), 0.5 + sum(heights))
    axes = figure.subplots(
        len(images), 1 + 2 * len(encoders), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    axes[0, 0].set_title("image", fontsize=10)
    for row, image in zip(axes, images, strict=True):
        show_image(row[0], image)
    for place, (name, file) in enumerate(encoders.items()):
        encoder = build_encoder(file)
        axes[0, 1 + 2 * place].set_title(f"{name}: components", fontsize=10)
        axes[0, 2 + 2 * place].set_title(f"{name}: clusters", fontsize=10)
        for row, image in zip(axes, images, strict=True):
            tokens, grid, seen = extract_tokens(encoder, image, _TOKENS * encoder.patch_size)
            labels = cluster_labels(tokens, grid, _SCALE / encoder.embed_dim**0.5)
            show_image(row[1 + 2 * place], pca_rgb(tokens, grid, seen.shape[:2]))
            count = f"{labels.max() + 1} clusters"
            show_image(row[2 + 2 * place], cluster_overlay(seen, labels, grid), count)
    save_figure(figure, path)


def detection_pictures(
    dataset: str, folders: Mapping[str, Path], num_images: int, output: Path
) -> dict[str, Path]:
    """Detections beside the ground truth, a picture for each detector, of the same images.

    Args:
        dataset: registered name of what was evaluated on.
        folders: of the runs, by label.
        num_images: rows of each picture.
        output: folder of the pictures.

    Returns:
        The pictures by label.
    """
    drawn = {}
    for label, folder in folders.items():
        results = folder / "inference" / "coco_instances_results.json"
        if results.is_file():
            path = output / f"{folder.name}.png"
            detections_beside_ground_truth(dataset, str(results), path, num_images)
            drawn[label] = path
    return drawn
