"""Object discovery: a box around one object of an image, without labels.

LOST (arXiv 2109.14279, https://github.com/valeoai/LOST) and TokenCut (arXiv 2202.11539,
https://github.com/YangtaoWANG95/TokenCut) find it in the keys (N, D) of the last block; their boxes
are reproduced from the same keys. Beside them stands the box of FLSL's own clusters.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.features import encode_images, resize_pixels
from flsl_d2.evaluation.samples import Measure, Task, attention_inputs, global_attention
from flsl_d2.mean_shift import cluster

_LOST_SEEDS = 100
_TOKENCUT_THRESHOLD, _TOKENCUT_EDGE = 0.2, 1e-5
_KERNEL_WIDTH = 8.0  # of mean-shift: exp(8 * cosine) at the first step
_MAX_SIDE = 1024  # pixels; no image of VOC or COCO is larger


class Discovery(Measure):
    """CorLoc: share of the images in which the box found has IoU 0.5 or more with an object.

    Only the validation images count; those without a box are left out.
    """

    name = "discovery"
    prepares_images = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.attention = global_attention(task.encoder)
        if self.attention is None:
            raise InputError(
                "keys are read from an FLSLViT whose last block looks at all tokens, and this "
                "encoder has none; load its weights into an FLSLViT."
            )
        self.images = [image for image in task.val.images if image.boxes]
        if not self.images:
            raise InputError(f"no image of {task.val.name!r} has a box; use a data set with boxes.")

    def results(self) -> dict[str, float]:
        """Return ``corloc_lost``, ``corloc_tokencut`` and ``corloc_mean_shift`` in percent."""
        encoder, hits = self.task.encoder, {"lost": 0, "tokencut": 0, "mean_shift": 0}
        for image in progress(self.images, "discovering objects"):
            pixels = image.read(encoder.input_format)
            size = pixels.shape[0], pixels.shape[1]
            scale = min(_MAX_SIDE / max(size), 1.0)
            if scale < 1:
                small = round(size[0] * scale), round(size[1] * scale)
                pixels = resize_pixels(pixels, small, cv2.INTER_AREA)
            patch = encoder.patch_size
            grid = (-(-pixels.shape[0] // patch), -(-pixels.shape[1] // patch))
            keys, tokens = self._encode(pixels)
            # COCO's boxes are rounded to pixels, as in the references; VOC's are whole.
            true = np.round([each.box for each in image.boxes])
            for name, cells in zip(hits, find_objects(keys, tokens, grid), strict=True):
                hits[name] += overlaps(cells_to_box(cells, patch / scale, size), true)
        return {f"corloc_{name}": 100 * count / len(self.images) for name, count in hits.items()}

    def _encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        assert self.attention is not None
        with attention_inputs(self.task.encoder) as inputs, torch.inference_mode():
            tokens = encode_images(self.task.encoder, pixels[None], pad=True)[0]
            keys = self.attention.qkv(inputs[0]).flatten(0, 2).chunk(3, dim=1)[1]
        return keys[-len(tokens) :].float(), tokens


def find_objects(keys: Tensor, tokens: Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Find the cells (rows, columns) bool of an object by LOST, TokenCut and mean-shift."""
    affinity = keys @ keys.T
    seed, lost = expand_seed(affinity)
    width = tokens.shape[1]
    centred = F.normalize(tokens - tokens.mean(dim=0), dim=1) * width**0.5
    labels = cluster(centred, _KERNEL_WIDTH / width)[0]
    own = (labels == labels[seed]).cpu().numpy()
    cut, cut_seed = normalised_cut(keys)
    parts = ((lost, seed), (cut, cut_seed), (own, seed))
    return tuple(component(*part, grid) for part in parts)


def expand_seed(affinity: Tensor) -> tuple[int, np.ndarray]:
    """LOST: return the token with the fewest positive affinities (N, N), and what is like it.

    The seeds are those of the 100 tokens of lowest degree that are like the first; an object has
    all tokens whose affinities to the seeds have a positive sum.
    """
    positive = affinity > 0
    positive.fill_diagonal_(False)
    # The reference sorts in descending order of -degree, and ties as PyTorch leaves them.
    order = (-positive.sum(dim=1).float()).argsort(descending=True)
    seeds = order[:_LOST_SEEDS]
    seeds = seeds[affinity[order[0], seeds] > 0]
    return int(order[0]), (affinity[seeds].sum(dim=0) > 0).cpu().numpy()


def normalised_cut(keys: Tensor) -> tuple[np.ndarray, int]:
    """TokenCut: return the foreground (N,) bool of the tokens' normalised cut, and its seed."""
    from scipy.linalg import eigh

    unit = F.normalize(keys, dim=1)
    linked = (unit @ unit.T > _TOKENCUT_THRESHOLD).cpu().numpy()
    weights = np.where(linked, 1.0, _TOKENCUT_EDGE)
    degrees = np.diag(weights.sum(axis=1))
    vector = eigh(degrees - weights, degrees, subset_by_index=[1, 1])[1][:, 0]
    foreground, seed = vector > vector.mean(), int(np.abs(vector).argmax())
    return (foreground if foreground[seed] else ~foreground), seed


def component(cells: np.ndarray, seed: int, grid: tuple[int, int]) -> np.ndarray:
    """Return the 4-connected part of cells (N,) bool that holds the seed, (rows, columns) bool."""
    parts = cv2.connectedComponents(cells.reshape(grid).astype(np.uint8), connectivity=4)[1]
    return parts == parts.flat[seed]


def cells_to_box(
    cells: np.ndarray, patch_size: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box x0, y0, x1, y1 in pixels around cells, within an image (H, W)."""
    rows, columns = np.nonzero(cells)
    x0, y0 = columns.min() * patch_size, rows.min() * patch_size
    x1, y1 = (columns.max() + 1) * patch_size, (rows.max() + 1) * patch_size
    return x0, y0, min(x1, size[1]), min(y1, size[0])


def overlaps(box: tuple[float, float, float, float], others: np.ndarray) -> bool:
    """Whether the IoU of a box and one of others (n, 4) is at least 0.5."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = sides.clip(min=0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    union = (box[2] - box[0]) * (box[3] - box[1]) + areas - common
    return bool((common / union >= 0.5).any())
