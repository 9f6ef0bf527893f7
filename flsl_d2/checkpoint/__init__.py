"""Weights: safe reading, encoders of other sources, and a checkpointer that reports."""

from flsl_d2.checkpoint.build import build_encoder, open_encoder
from flsl_d2.checkpoint.checkpointer import FLSLCheckpointer
from flsl_d2.checkpoint.reading import read_weights

__all__ = ["FLSLCheckpointer", "build_encoder", "open_encoder", "read_weights"]
