"""Pictures: detections, what an encoder's tokens group, and the curves of a run."""

from flsl_d2.visualization.curves import loss_curves
from flsl_d2.visualization.described import DescribedEncoder, describe_encoder
from flsl_d2.visualization.detections import detections_beside_ground_truth
from flsl_d2.visualization.maps import (
    attention_map,
    cluster_labels,
    cluster_overlay,
    mode_similarity_map,
    pca_rgb,
    token_at,
)
from flsl_d2.visualization.token_figures import comparison_figure, encoder_figure
from flsl_d2.visualization.token_page import write_page

__all__ = [
    "DescribedEncoder",
    "attention_map",
    "cluster_labels",
    "cluster_overlay",
    "comparison_figure",
    "describe_encoder",
    "detections_beside_ground_truth",
    "encoder_figure",
    "loss_curves",
    "mode_similarity_map",
    "pca_rgb",
    "token_at",
    "write_page",
]
