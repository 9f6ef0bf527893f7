"""Dense evaluations of an encoder."""

from flsl_d2.evaluation.features import TokenFeatures, extract_tokens

__all__ = ["TokenFeatures", "extract_tokens"]
