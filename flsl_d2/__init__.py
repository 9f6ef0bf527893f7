"""FLSL for Detectron2: ``import flsl_d2`` registers the backbones.

A YAML project adds ``flsl_d2.add_flsl_config(cfg)``; a LazyConfig project uses the classes of
``flsl_d2.modeling``.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # Threads of OpenMP spin for milliseconds by default, which slows a CPU run down as soon as
    # another process wants a core. The library reads this when PyTorch is loaded; here flsl_d2 is
    # the program, and its child processes inherit it.
    os.environ.setdefault("GOMP_SPINCOUNT", "300")

try:
    import detectron2  # noqa: F401
except ImportError as error:  # the doctor and the installer start nevertheless
    _failure: ImportError | None = error
else:
    _failure = None
    from flsl_d2.modeling import FLSLViT, SimpleFeaturePyramid, add_flsl_config

if TYPE_CHECKING:
    from flsl_d2.detection.predictor import Predictor
    from flsl_d2.weights.configure import configure_from_weights

__version__ = "0.2.0"
__all__ = [
    "FLSLViT",
    "Predictor",
    "SimpleFeaturePyramid",
    "add_flsl_config",
    "configure_from_weights",
]


def __getattr__(name: str) -> Any:
    """Import what a project may do without when it is used: prediction, and reading weights.

    Raises:
        ImportError: Detectron2 is not installed, and a name of this package is used.
    """
    if name in __all__ and _failure is not None:
        raise ImportError(
            "flsl_d2 extends Detectron2, which cannot be imported in this Python environment "
            f"({_failure}); run `flsl-d2 install-detectron2`, or follow "
            "https://detectron2.readthedocs.io/en/latest/tutorials/install.html."
        ) from _failure
    if name == "Predictor":
        from flsl_d2.detection.predictor import Predictor

        return Predictor
    if name == "configure_from_weights":
        from flsl_d2.weights.configure import configure_from_weights

        return configure_from_weights
    raise AttributeError(f"module 'flsl_d2' has no attribute {name!r}")
