"""Evaluations of a frozen encoder: measures of its features, and DAVIS."""

from flsl_d2.evaluation.features import TokenFeatures, extract_tokens
from flsl_d2.evaluation.measures import MEASURES, Measure, measure_all, measure_features

__all__ = [
    "MEASURES",
    "Measure",
    "TokenFeatures",
    "extract_tokens",
    "measure_all",
    "measure_features",
]
