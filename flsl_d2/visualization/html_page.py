"""One self-contained HTML page: click a token and see what several encoders make of it.

The page's own parts lie in ``page/``. Tokens travel as float16, images as JPEG, all in the one
file; maps are computed in the browser, and compared there with those of Python.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np

from flsl_d2.evaluation.explained_variance import patch_colours
from flsl_d2.files import write_text
from flsl_d2.visualization.clusters import (
    attention_values,
    mode_similarity_values,
    pca_colours,
    position_r2,
)
from flsl_d2.visualization.described import DescribedEncoder
from flsl_d2.visualization.figures import palette
from flsl_d2.visualization.token_figures import chosen_token

_PARTS = Path(__file__).parent / "page"
_JPEG_QUALITY = 85
_NUM_COLOURS = 12


def write_page(
    path: str | os.PathLike[str],
    encoders: Sequence[DescribedEncoder],
    images: Sequence[np.ndarray],
    image_names: Sequence[str],
    points: Sequence[tuple[float, float]],
    scale: float = 1.0,
    num_iterations: int = 5,
    made: str = "",
) -> int:
    """Write the page.

    Args:
        path: the HTML file; it is written under another name first.
        encoders: of the same images, with clusters at the same scales.
        images: (H, W, 3) uint8 RGB each.
        image_names: shown below the images.
        points: for every image the token chosen at first, x and y as shares of width and height.
        scale: of attention and clusters at first, times sqrt(D); one of the encoders' scales.
        num_iterations: the most mean-shift steps of the slider.
        made: how the page was made, for its foot.

    Returns:
        Size of the file in bytes.
    """
    scales = list(encoders[0].labels)
    content = {
        "images": [
            {
                "name": name,
                "width": image.shape[1],
                "height": image.shape[0],
                "jpeg": _jpeg(image),
                "point": list(point),
            }
            for image, name, point in zip(images, image_names, points, strict=True)
        ],
        "encoders": [_encoder(each, points, scale, num_iterations) for each in encoders],
        "scales": scales,
        "chosenScale": scales.index(scale),
        "iterations": num_iterations,
        "turbo": _base64(_turbo()),
        "palette": _base64(palette(_NUM_COLOURS)),
        "colourPositionR2": _position_r2_of_colours(images),
        "made": made,
    }
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    # "<" could end the script element or open a comment in it; JSON may write it as \u003c.
    inserted = {
        "/*DATA*/": json.dumps(content, allow_nan=False).replace("<", "\\u003c"),
        "/*STYLE*/": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "/*MATHS*/": (_PARTS / "maths.js").read_text(encoding="utf-8"),
        "/*SCRIPT*/": (_PARTS / "page.js").read_text(encoding="utf-8"),
    }
    for mark, text in inserted.items():
        before, after = page.split(mark)
        page = before + text + after
    write_text(path, page)
    return Path(path).stat().st_size


def _encoder(
    encoder: DescribedEncoder,
    points: Sequence[tuple[float, float]],
    scale: float,
    num_iterations: int,
) -> dict[str, Any]:
    together = pca_colours(encoder.tokens)
    images = []
    for i, (tokens, grid) in enumerate(zip(encoder.tokens, encoder.grids, strict=True)):
        token = chosen_token(encoder, (i, *points[i]))
        kernel = scale / encoder.width**0.5
        attended = attention_values(tokens, grid, token, kernel)
        similarity = mode_similarity_values(tokens, grid, token, kernel, num_iterations)
        images.append(
            {
                "rows": grid[0],
                "columns": grid[1],
                "tokens": _base64(tokens.numpy().astype("<f2")),
                "labels": [_base64(labels[i].astype("<u2")) for labels in encoder.labels.values()],
                "pca": _base64(pca_colours([tokens])[0]),
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
            {
                "number": group.number,
                "count": group.count,
                "numImages": group.num_images,
                "patches": [list(patch) for patch in group.patches],
            }
            for group in encoder.groups
        ],
    }


def _position_r2_of_colours(images: Sequence[np.ndarray]) -> float | None:
    """How much of the images' own colours their layout explains, for comparison."""
    grids = [tuple(max(side // 16, 1) for side in image.shape[:2]) for image in images]
    colours = [patch_colours(image, grid) for image, grid in zip(images, grids, strict=True)]
    return position_r2(colours, grids)


def _turbo() -> np.ndarray:
    """The colour map of the figures, (256, 3) uint8."""
    return (matplotlib.colormaps["turbo"](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _jpeg(image: np.ndarray) -> str:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode("ascii")
