"""Pictures: detections, what an encoder's tokens group, and the curves of a run."""

from flsl_d2.visualization.clusters import (
    attention_map,
    cluster_labels,
    cluster_overlay,
    colour_r2,
    mode_similarity_map,
    pca_rgb,
    position_r2,
    token_at,
)
from flsl_d2.visualization.curves import loss_curves
from flsl_d2.visualization.described import DescribedEncoder, describe_encoder
from flsl_d2.visualization.detections import detections_beside_ground_truth
from flsl_d2.visualization.html_page import write_page
from flsl_d2.visualization.token_figures import encoder_figure

__all__ = [
    "DescribedEncoder",
    "attention_map",
    "cluster_labels",
    "cluster_overlay",
    "colour_r2",
    "describe_encoder",
    "detections_beside_ground_truth",
    "encoder_figure",
    "loss_curves",
    "mode_similarity_map",
    "pca_rgb",
    "position_r2",
    "token_at",
    "write_page",
]
