"""The protocol between a pre-training method and the loop that trains it.

A method is an ``nn.Module`` that holds its networks and turns the views of a step into losses.
Everything else belongs to the loop and is the same for all methods: reading images, cutting views,
schedules, mixed precision, accumulation, clipping, the optimiser, checkpoints, and hooks.
:class:`pretrain.methods.base.BaseMethod` has what methods share, and
:class:`pretrain.methods.dino.DINO` is a short example. A config names the method under ``model``,
and its constructor arguments are the keys of that node.

Shape suffixes: K centroids.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.timm_backbone import TimmBackbone
from pretrain.schedules import StepValues
from pretrain.step_inputs import StepInputs as StepInputs

Losses: TypeAlias = dict[str, Tensor]
Monitored: TypeAlias = dict[str, Tensor]


class Method(Protocol):
    """What the loop asks of a method.

    Attributes:
        needs_crops: whether ``StepInputs.crops`` is wanted.
        num_centroids: number K of clusters, prototypes or outputs that views are assigned to; 0
            for a method without.
    """

    needs_crops: bool
    num_centroids: int

    def check_run(self, views: object, images: int) -> None:
        """Check that views and batch fit the method, before the run starts.

        Args:
            images: number of images that a process works off at a time.

        Raises:
            InputError: they do not fit.
        """
        ...

    def __call__(self, inputs: StepInputs, values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the losses of a step.

        Returns:
            The losses: ``loss`` is what is minimised, other names (``loss_...``) are its terms,
            unweighted. And what is monitored, without gradient: scalars are logged under their
            names; ``assigned`` (K,) int64, the number of queries that the teacher assigns to each
            centroid, ``mean_assignment`` (K,), its mean probabilities, and the scalar
            ``feature_std`` feed the indicators of collapse, each of which is left out without its
            values. Over
            accumulated parts of a step integers are summed and other numbers averaged.
        """
        ...

    def start_from(self, encoder: FLSLViT) -> None:
        """Copy the weights of a trained encoder of the same architecture, before the first step."""
        ...

    def frozen_parameters(self, values: StepValues) -> Iterable[nn.Parameter]:
        """Return the parameters that the optimiser leaves alone in this step."""
        ...

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher after the optimiser's step; a method without one does nothing."""
        ...

    def exported_encoder(self) -> FLSLViT | TimmBackbone:
        """Return the encoder that is measured, pictured and written for downstream use."""
        ...

    def compile_blocks(self, backend: str = "inductor", mode: str = "default") -> None:
        """Compile the transformer blocks in place."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return all parameters, like ``nn.Module``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all weights by name, like ``nn.Module``."""
        ...
