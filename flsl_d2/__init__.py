"""FLSL for Detectron2: ``import flsl_d2`` registers the backbones.

A YAML project adds ``flsl_d2.add_flsl_config(cfg)``; a LazyConfig project uses the classes of
``flsl_d2.modeling``.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flsl_d2 extends Detectron2, which is not installed in this Python environment; run "
        "`python tools/install_detectron2.py` from a checkout of flsl-d2, or follow "
        "https://detectron2.readthedocs.io/en/latest/tutorials/install.html."
    ) from error

from typing import TYPE_CHECKING, Any

from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid, add_flsl_config

if TYPE_CHECKING:
    from flsl_d2.detection.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["FLSLViT", "Predictor", "SimpleFeaturePyramid", "add_flsl_config"]


def __getattr__(name: str) -> Any:
    """Import :class:`Predictor` when it is used, because a project may need the backbones alone."""
    if name == "Predictor":
        from flsl_d2.detection.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'flsl_d2' has no attribute {name!r}")
