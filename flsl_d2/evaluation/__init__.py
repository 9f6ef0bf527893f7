"""Evaluations of a frozen encoder: measures of its features, and DAVIS."""

from flsl_d2.evaluation.features import TokenFeatures, extract_tokens
from flsl_d2.evaluation.measures import MEASURES, measure_all, measure_features
from flsl_d2.evaluation.samples import Measure

__all__ = [
    "MEASURES",
    "Measure",
    "TokenFeatures",
    "extract_tokens",
    "measure_all",
    "measure_features",
]
