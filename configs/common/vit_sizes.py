"""Sizes of FLSLViT for pre-training and detection; see flsl_d2.modeling.VIT_SIZES."""

from flsl_d2.modeling import VIT_SIZES

tiny, small, base, large = (VIT_SIZES[name] for name in ("tiny", "small", "base", "large"))
