"""Interactive page: a click on a token shows its relation to others for several encoders.

The page is one HTML file: tokens travel as float16, images as JPEG. Maps are computed in the
browser, and compared there with those of Python.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np

from flsl_d2.evaluation import TokenFeatures
from flsl_d2.evaluation.explained_variance import patch_colours, position_r2
from flsl_d2.files import write_text
from flsl_d2.visualization.described import DescribedEncoder
from flsl_d2.visualization.figures import COLOUR_MAP, palette
from flsl_d2.visualization.html import render
from flsl_d2.visualization.maps import attention_values, mode_similarity_values, pca_colours
from flsl_d2.visualization.token_figures import chosen_token

_JPEG_QUALITY = 85
_NUM_COLOURS = 12
_CELL_PIXELS = 16  # side of the grid's cells for the position R2 of colours


def write_page(
    path: str | os.PathLike[str],
    encoders: Sequence[DescribedEncoder],
    image_names: Sequence[str],
    points: Sequence[tuple[float, float]],
    scale: float = 1.0,
    num_iterations: int = 5,
    made: str = "",
) -> int:
    """Write the page, and return its size in bytes.

    Args:
        encoders: with their tokens of the same images, and with clusters at the same scales.
        points: for every image the token chosen at first, x and y as shares of width and height.
        scale: first scale of attention and clusters, times sqrt(D); one of the encoders'.
        num_iterations: end of the slider of mean-shift steps.
        made: sentence about how the page was made, for its foot.
    """
    scales = list(encoders[0].labels)
    images = [features.image for features in encoders[0].features]
    turbo = matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255
    content = {
        "images": [
            {"name": name, "width": image.shape[1], "height": image.shape[0]}
            | {"jpeg": _jpeg(image), "point": list(point)}
            for image, name, point in zip(images, image_names, points, strict=True)
        ],
        "encoders": [_encoder(each, points, scale, num_iterations) for each in encoders],
        "scales": scales,
        "chosenScale": scales.index(scale),
        "iterations": num_iterations,
        "turbo": _base64(turbo.astype(np.uint8)),
        "palette": _base64(palette(_NUM_COLOURS)),
        "colourPositionR2": _position_r2_of_colours(images),
        "made": made,
    }
    write_text(
        Path(path), render("tokens.html.j2", title="What the encoder's tokens group", data=content)
    )
    return Path(path).stat().st_size


def _encoder(
    encoder: DescribedEncoder, points: Sequence[tuple[float, float]], scale: float, steps: int
) -> dict[str, Any]:
    together = pca_colours([each.tokens for each in encoder.features])
    kernel = scale / encoder.width**0.5
    images = []
    for i, each in enumerate(encoder.features):
        token = chosen_token(encoder, (i, *points[i]))
        attended = attention_values(each, token, kernel)
        similarity = mode_similarity_values(each, token, kernel, steps)
        images.append(
            {
                "rows": each.grid[0],
                "columns": each.grid[1],
                "tokens": _base64(each.tokens.numpy().astype("<f2")),
                "labels": [_base64(labels[i].astype("<u2")) for labels in encoder.labels.values()],
                "pca": _base64(pca_colours([each.tokens])[0]),
                "pcaAll": _base64(together[i]),
                "check": {
                    "token": token,
                    "attention": _base64(attended.astype("<f4")),
                    "similarity": _base64(similarity.astype("<f4")),
                },
            }
        )
    return {
        "name": encoder.name,
        "width": encoder.width,
        "images": images,
        "attended": list(encoder.attended.values()),
        "positionR2": encoder.position_r2,
        "colourR2": encoder.colour_r2,
        "groupsNote": encoder.groups_note,
        "groups": [
            {"number": g.number, "count": g.count, "numImages": g.num_images, "patches": g.patches}
            for g in encoder.groups
        ],
    }


def _position_r2_of_colours(images: Sequence[np.ndarray]) -> float | None:
    """Position R2 of the images' colours, to compare that of the tokens with."""
    colours = []
    for image in images:
        grid = (max(image.shape[0] // _CELL_PIXELS, 1), max(image.shape[1] // _CELL_PIXELS, 1))
        colours.append(TokenFeatures(patch_colours(image, grid), grid, image))
    return position_r2(colours)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _jpeg(image: np.ndarray) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(encoded.tobytes()).decode("ascii")
