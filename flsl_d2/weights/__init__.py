"""Weights: safe reading, encoders of other sources, and a checkpointer that reports."""

from flsl_d2.weights.checkpointer import FLSLCheckpointer
from flsl_d2.weights.loading import build_encoder, open_encoder
from flsl_d2.weights.reading import read_weights

__all__ = ["FLSLCheckpointer", "build_encoder", "open_encoder", "read_weights"]
