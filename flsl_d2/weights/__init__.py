"""Weights: safe reading, encoders of other sources, and a checkpointer that reports."""

from flsl_d2.weights.checkpointer import FLSLCheckpointer
from flsl_d2.weights.loading import build_encoder, input_format, open_encoder
from flsl_d2.weights.reading import read_weights
from flsl_d2.weights.writing import encoder_file, write_encoder

__all__ = [
    "FLSLCheckpointer",
    "build_encoder",
    "encoder_file",
    "input_format",
    "open_encoder",
    "read_weights",
    "write_encoder",
]
