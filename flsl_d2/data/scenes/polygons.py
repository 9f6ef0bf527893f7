"""A mask as COCO polygons that give the same mask again.

Detectron2's default mask format is polygons, and its data mapper refuses anything else there.
"""

from __future__ import annotations

import cv2
import numpy as np

# A contour goes through the centres of the border pixels, half a pixel inside the mask. On a mask
# enlarged by this factor that loss is 1/4 px, which no rasteriser rounds to a whole pixel.
_ENLARGE = 2


def _split_at_holes(mask: np.ndarray) -> list[np.ndarray]:
    """Cut a mask (H, W) uint8 with vertical lines until no part has a hole.

    COCO's polygons are united, so a hole cannot be a polygon of its own.
    """
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if tree is None:
        return []
    holes = [c for c, (*_, parent) in zip(contours, tree[0], strict=True) if parent >= 0]
    if not holes:
        return [mask]
    # A hole's contour lies on the pixels around it, so the mean column is inside the hole.
    column = round(float(holes[0][:, 0, 0].min() + holes[0][:, 0, 0].max()) / 2)
    left, right = mask.copy(), mask.copy()
    left[:, column:] = 0
    right[:, :column] = 0
    return _split_at_holes(left) + _split_at_holes(right)


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Trace a mask.

    Args:
        mask: (H, W) bool.

    Returns:
        Polygons `[x0, y0, x1, y1, ...]` in COCO's convention (pixel (i, j) covers [j, j + 1) x
        [i, i + 1)), none with fewer than three points, whose union is the mask. Empty for an empty
        mask.
    """
    rows, columns = np.any(mask, axis=1).nonzero()[0], np.any(mask, axis=0).nonzero()[0]
    if len(rows) == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    tight = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(np.uint8)
    polygons = []
    for part in _split_at_holes(tight):
        fine = part.repeat(_ENLARGE, axis=0).repeat(_ENLARGE, axis=1)
        contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        for contour in contours:
            points = (contour[:, 0] + 0.5) / _ENLARGE + (left, top)
            polygons.append([float(x) for x in points.ravel()])
    return polygons
