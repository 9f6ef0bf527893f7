"""Clusters of the tokens of a whole data set, matched with its classes.

The protocol of Leopart (arXiv 2204.13101, https://github.com/MkuuWaUjinga/leopart) and NeCo (arXiv
2408.11054), whose figures it reproduces from the same tokens: k-means and PCA are faiss's, and
their draws with them.
"""

from __future__ import annotations

from copy import copy

import numpy as np

from flsl_d2.engine.progress import progress
from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import IGNORED
from flsl_d2.evaluation.samples import Measure, Task, encode_square, resize_labels, square_side
from flsl_d2.evaluation.segmentation import Confusion, check_pixel_classes, patch_distributions

_SIDE, _SCORED_SIDE = 448, 100  # pixels
_PCA_WIDTH, _ITERATIONS, _RESTARTS = 50, 100, 5


class Clustering(Measure):
    """Mean IoU of k-means clusters of all validation tokens, mean over seeds.

    No label is learned from; ``foreground_*`` clusters and counts the foreground alone.
    """

    name = "clustering"
    prepares_images = True
    without_direction = tuple(
        f"{part}mIoU{kind}_std" for part in ("", "foreground_") for kind in ("", "_many")
    )

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.classes = check_pixel_classes(task.val)
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise InputError(
                "clusters of a data set need faiss; pip install 'flsl-d2[evaluation]'."
            ) from error
        self.side = square_side(task.encoder, task.options.side or _SIDE)

    def results(self) -> dict[str, float]:
        """Return ``mIoU`` (one to one), ``mIoU_many`` (many to one), and their deviations."""
        encoder, images = self.task.encoder, self.task.val.images
        tokens, truths, inside = [], [], []
        cells = self.side // encoder.patch_size
        for image in progress(map(copy, images), "encoding", len(images)):
            pixels = image.read(encoder.input_format)
            tokens.append(encode_square(encoder, pixels, self.side).cpu().numpy())
            # Twice: the references resize to the input before they resize to 100 pixels.
            labels = resize_labels(image.semantic, self.side)
            truths.append(resize_labels(labels, _SCORED_SIDE))
            shares, labelled = patch_distributions(labels, (cells, cells), len(self.classes))
            inside.append((shares.argmax(axis=1) > 0) & labelled)
        return self.score(np.stack(tokens), np.stack(truths), np.stack(inside))

    def score(self, tokens: np.ndarray, truths: np.ndarray, inside: np.ndarray) -> dict[str, float]:
        """Cluster tokens (I, N, D) of I images and match the clusters with classes (I, H, W).

        Tokens of the foreground are (I, N) bool.
        """
        scores = self._part("", tokens, truths, np.ones_like(inside))
        if self.classes[0] == "background" and inside.any():
            truths = np.where(truths == 0, IGNORED, truths)
            scores |= self._part("foreground_", tokens, truths, inside)
        return scores

    def _part(
        self, part: str, tokens: np.ndarray, truths: np.ndarray, inside: np.ndarray
    ) -> dict[str, float]:
        points, scores = reduce_width(tokens[inside]), {}
        cells, side = round(inside.shape[1] ** 0.5), truths.shape[1]
        num_classes = len(self.classes) - bool(part)
        for kind, count in (("", num_classes), ("_many", self.options.num_clusters)):
            values = []
            for seed in range(self.options.cluster_seeds):
                clusters = np.full(inside.shape, count)  # one more: what is not clustered
                clusters[inside] = cluster_points(points, count, seed)
                confusion = Confusion(len(self.classes), count + 1)
                for truth, labels in zip(truths, clusters, strict=True):
                    confusion.add(truth, resize_labels(labels.reshape(cells, cells), side))
                matched = match_clusters(confusion, one_to_one=not kind)
                values.append(matched.mean_iou(self.options.as_reference))
            scores[f"{part}mIoU{kind}"] = float(np.mean(values))
            scores[f"{part}mIoU{kind}_std"] = float(np.std(values))
        return scores


def reduce_width(tokens: np.ndarray) -> np.ndarray:
    """Standardise the channels of tokens (T, D), and project them to at most 50 by PCA."""
    import faiss

    deviation = tokens.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1
    tokens = ((tokens - tokens.mean(axis=0, dtype=np.float64)) / deviation).astype(np.float32)
    if tokens.shape[1] <= _PCA_WIDTH:
        return tokens
    pca = faiss.PCAMatrix(tokens.shape[1], _PCA_WIDTH)
    pca.train(tokens)
    return pca.apply(tokens)


def cluster_points(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Cluster points (T, D) by faiss's k-means, which learns from at most 256 a cluster: (T,)."""
    import faiss

    if len(points) < count:
        raise InputError(f"{len(points)} tokens cannot form {count} clusters; use more images.")
    settings = {"niter": _ITERATIONS, "nredo": _RESTARTS, "seed": seed}
    kmeans = faiss.Kmeans(points.shape[1], count, min_points_per_centroid=1, **settings)
    kmeans.train(points)
    return kmeans.index.search(points, 1)[1][:, 0]


def match_clusters(confusion: Confusion, one_to_one: bool) -> Confusion:
    """Give every cluster a class, and count the pixels by true and by given class.

    Either each class has one cluster (Hungarian, by IoU) and those left over count as class 0, or
    each cluster goes to the class of the most of its pixels. The last one, which is no cluster,
    stays class 0.
    """
    from scipy.optimize import linear_sum_assignment

    counts = confusion.counts
    given = np.zeros(counts.shape[1], dtype=np.int64)
    if one_to_one:
        classes, clusters = linear_sum_assignment(-confusion.iou()[:, :-1])
        given[clusters] = classes
    else:
        given[:-1] = counts[:, :-1].argmax(axis=0)
    matched = Confusion(len(counts))
    np.add.at(matched.counts.T, given, counts.T)
    return matched
