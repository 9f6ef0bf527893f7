"""Pictures: detections, what an encoder's tokens group, and the curves of a run."""

from flsl_d2.visualization.clusters import (
    attention_map,
    cluster_labels,
    cluster_overlay,
    mode_similarity_map,
    pca_rgb,
    token_at,
)
from flsl_d2.visualization.curves import loss_curves
from flsl_d2.visualization.detections import detections_beside_ground_truth
from flsl_d2.visualization.encoder import encoder_figure

__all__ = [
    "attention_map",
    "cluster_labels",
    "cluster_overlay",
    "detections_beside_ground_truth",
    "encoder_figure",
    "loss_curves",
    "mode_similarity_map",
    "pca_rgb",
    "token_at",
]
