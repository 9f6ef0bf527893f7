"""Dense evaluations of an encoder."""

from flsl_d2.evaluation.features import TokenFeatures, extract_tokens
from flsl_d2.evaluation.measures import MEASURES, measure_all, measure_features

__all__ = ["MEASURES", "TokenFeatures", "extract_tokens", "measure_all", "measure_features"]
