"""Quality of clusters of an encoder's tokens: how well they match the objects of an image."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import IGNORED
from flsl_d2.evaluation.partitions import boundary_f_score, enlarge_labels, kmeans
from flsl_d2.evaluation.samples import Measure, Sample, Task, global_attention
from flsl_d2.evaluation.segmentation import check_pixel_classes, patch_distributions
from flsl_d2.mean_shift import cluster
from flsl_d2.modeling.attention import Attention

_NUM_TUNING_IMAGES = 8


class ClusterQuality(Measure):
    """Adjusted Rand index and boundary F-score of clusters against ground-truth segments.

    Clusters are by mean-shift, by k-means and of the last block's attention weights. Parameters are
    chosen on a few training images, by the adjusted Rand index, and kept for all validation images.
    Images without any instance are left out.
    """

    name = "cluster_quality"
    without_direction = (
        *("clusters", "kernel_width", "tuned_clusters"),
        *("ari_token_limit", "ari_foreground_token_limit", "boundary_f_token_limit"),
    )

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        for dataset in (task.train, task.val):
            check_pixel_classes(dataset)
        self.attention = global_attention(task.encoder)
        order = np.random.default_rng(task.seed).permutation(len(task.train.images))
        self.tuning_indices = set(order[:_NUM_TUNING_IMAGES].tolist())
        self.tuning_samples: list[Sample] = []
        self.token_sum, self.num_tokens = torch.zeros(1, dtype=torch.float64), 0
        self.scores: dict[str, list[float]] = defaultdict(list)

    def observe_train(self, sample: Sample) -> None:
        self.token_sum = sample.tokens.double().sum(dim=0) + self.token_sum.to(sample.tokens.device)
        self.num_tokens += len(sample.tokens)
        if sample.index in self.tuning_indices and (sample.image.segments > 0).any():
            self.tuning_samples.append(sample)

    def fit(self) -> None:
        if not self.tuning_samples:
            raise InputError(
                "none of the training images drawn to choose the kernel's width on has a mask; "
                "use more images."
            )
        self.mean = (self.token_sum / self.num_tokens).float()
        widths = dict.fromkeys(self.options.kernel_widths, 0.0)
        counts = dict.fromkeys(self.options.cluster_counts, 0.0)
        for sample in self.tuning_samples:
            tokens = self._normalised(sample.tokens)
            for width in widths:
                widths[width] += _rand_index(_pixels(_mean_shift(tokens, width), sample), sample)
            for count in counts:
                labels = kmeans(tokens, count, [self.task.seed, sample.index])
                counts[count] += _rand_index(_pixels(labels, sample), sample)
        self.tuning_samples.clear()
        self.width = max(widths, key=lambda width: widths[width])
        self.tuned_count = max(counts, key=lambda count: counts[count])

    def observe_val(self, sample: Sample) -> None:
        truth = sample.image.segments
        if not (truth > 0).any():
            return
        tokens = self._normalised(sample.tokens)
        mean_shifted = _mean_shift(tokens, self.width)
        count, seed = int(mean_shifted.max()) + 1, [self.task.seed, sample.index]
        shares, _ = patch_distributions(np.maximum(truth, 0), sample.grid, int(truth.max()) + 1)
        ways = {
            "mean_shift": mean_shifted,
            "k_means": kmeans(tokens, count, seed),
            "k_means_tuned": kmeans(tokens, self.tuned_count, seed),
        }
        if self.attention is not None and sample.attended is not None:
            rows = attention_rows(self.attention, sample.attended, len(tokens))
            ways["attention"] = kmeans(rows.sqrt(), count, seed)
        ways["token_limit"] = torch.from_numpy(shares.argmax(axis=1))
        self.scores["clusters"].append(count)
        for way, labels in ways.items():
            self._score(way, labels, sample)

    def results(self) -> dict[str, float]:
        if not self.scores:
            raise InputError("no validation image has a mask; use others, or more.")
        means = {name: float(np.mean(values)) for name, values in self.scores.items()}
        return {**means, "kernel_width": self.width, "tuned_clusters": self.tuned_count}

    def _normalised(self, tokens: Tensor) -> Tensor:
        centred = tokens - self.mean
        # Tokens that agree up to rounding hold nothing but noise once they are centred.
        if centred.norm(dim=1).amax() <= 1e-5 * tokens.norm(dim=1).amax():
            return torch.ones_like(tokens)
        return F.normalize(centred, dim=1) * tokens.shape[1] ** 0.5

    def _score(self, way: str, labels: Tensor, sample: Sample) -> None:
        from sklearn.metrics import adjusted_rand_score

        truth, predicted = sample.image.segments, _pixels(labels, sample)
        self.scores[f"ari_{way}"].append(100 * _rand_index(predicted, sample))
        inside = truth > 0
        if truth[inside].min() < truth[inside].max():
            score = adjusted_rand_score(truth[inside], predicted[inside])
            self.scores[f"ari_foreground_{way}"].append(100 * score)
        self.scores[f"boundary_f_{way}"].append(100 * boundary_f_score(truth, predicted))


def _pixels(labels: Tensor, sample: Sample) -> np.ndarray:
    return enlarge_labels(labels.cpu().numpy().reshape(sample.grid), sample.image.segments.shape)


def _rand_index(predicted: np.ndarray, sample: Sample) -> float:
    from sklearn.metrics import adjusted_rand_score  # takes a second to import

    truth = sample.image.segments
    known = truth != IGNORED
    return adjusted_rand_score(truth[known], predicted[known])


def _mean_shift(tokens: Tensor, width: float) -> Tensor:
    """Cluster tokens (N, D) of norm sqrt(D) by mean-shift with ``exp(width * cosine)``: (N,)."""
    return cluster(tokens, width / tokens.shape[1])[0]


@torch.inference_mode()
def attention_rows(attention: Attention, attended: Tensor, num_tokens: int) -> Tensor:
    """Compute the attention weights between patches, averaged over heads: (N, N), rows sum to 1.

    The input of the block is that of :class:`Sample`; the share of prefix tokens is left out.
    """
    _, height, width, _ = attended.shape
    qkv = attention.qkv(attended).view(1, height * width, 3, attention.num_heads, -1)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (1, heads, P + N, C)
    scale = attention.scale
    if attention.use_rel_pos:
        q, k = attention._append_relative_positions(q, k, (height, width))
        scale = 1.0
    weights = (scale * q @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)[0]
    weights = weights[-num_tokens:, -num_tokens:]
    return weights / weights.sum(dim=1, keepdim=True)
