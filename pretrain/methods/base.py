"""What pre-training methods share: student and teacher, pixels, export, checks before a run.

Shape suffixes: B images, N tokens, D width, S side of a view in pixels.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD
from flsl_d2.modeling.projection_head import FLSLHead
from flsl_d2.modeling.timm_backbone import TimmBackbone
from pretrain.methods.protocol import Losses, Monitored, StepInputs
from pretrain.multi_crop import MultiCropViews
from pretrain.schedules import StepValues

_Self = TypeVar("_Self", bound="BaseMethod")


class Networks(nn.Module):
    """An encoder and the modules that are trained with it, as student or teacher.

    Args:
        head: module behind the encoder; None for a method without one.
    """

    def __init__(self, backbone: FLSLViT, head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


class BaseMethod(nn.Module):
    """Student, teacher and everything that does not depend on the objective.

    A subclass adds ``forward``, the objective; see :class:`pretrain.methods.protocol.Method`.

    Args:
        student: the trained networks; ``student.backbone`` is the encoder.
        has_teacher: whether a moving average of the student is kept as ``teacher``, which is then
            the encoder that is exported.

    Attributes:
        student: the trained networks.
        teacher: their moving average, without gradient; None for a method without.
        views_type: class of views that the method takes.
        min_global: least number of global views.
        min_images: least number of images that a process works off at a time.
        masks_tokens: whether the encoder gets tokens that are masked or dropped, which only
            ``FLSLViT`` takes.
        changes_shapes: whether shapes change from step to step, so that no code can be compiled
            once for all.
        needs_crops: see :class:`pretrain.methods.protocol.Method`.
        num_centroids: see :class:`pretrain.methods.protocol.Method`.
    """

    views_type: ClassVar[type] = MultiCropViews
    min_global: ClassVar[int] = 1
    min_images: ClassVar[int] = 1
    masks_tokens: ClassVar[bool] = False
    changes_shapes: ClassVar[bool] = False
    needs_crops: bool = False
    num_centroids: int = 0

    def __init__(self, student: Any, has_teacher: bool = False) -> None:
        super().__init__()
        if self.masks_tokens:
            self._check_plain_vit(student.backbone)
        self.student = student
        self.teacher: Any = None
        if has_teacher:
            self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), False)

    def train(self: _Self, mode: bool = True) -> _Self:
        """Like ``nn.Module.train``, except that no layer of the teacher is left out at random.

        Its batch norm takes the statistics of the batch, as the student's does: DINO, MoCo v3 and
        DenseCL never put their teachers into evaluation mode.
        """
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            for module in self.teacher.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train(mode)
        return self

    def check_run(self, views: object, images: int) -> None:
        """Check that views and batch fit the method, before the run starts.

        Args:
            images: number of images that a process works off at a time.

        Raises:
            InputError: they do not fit.
        """
        name = type(self).__name__
        if not isinstance(views, self.views_type):
            raise InputError(
                f"{name} takes the views of {self.views_type.__name__}, and the config's views are "
                f"{type(views).__name__}; use the views of its recipe in configs/pretrain."
            )
        count = getattr(views, "num_global", self.min_global)
        if count < self.min_global:
            raise InputError(
                f"views.num_global is {count}, and {name} compares {self.min_global} global views "
                f"of an image; set views.num_global={self.min_global}."
            )
        if images < self.min_images:
            raise InputError(
                f"a process works off {images} image(s) at a time, and {name} needs at least "
                f"{self.min_images}; raise dataloader.total_batch_size, or lower "
                "train.accumulation_steps."
            )

    def start_from(self, encoder: FLSLViT) -> None:
        """Copy the weights of an encoder into the student and the teacher."""
        for networks in (self.student, self.teacher):
            if networks is not None:
                networks.backbone.load_state_dict(encoder.state_dict())

    def last_layers(self) -> Sequence[nn.Module]:
        """Return the layers that the schedule freezes at first: the centroids of ``FLSLHead``."""
        head = self.student.head
        return [head.last_layer] if isinstance(head, FLSLHead) else []

    def frozen_parameters(self, values: StepValues) -> Iterable[nn.Parameter]:
        """Return the parameters of :meth:`last_layers` and of the encoder while they are frozen."""
        frozen = self.last_layers() if values.last_layer_frozen else []
        encoder = [self.student.backbone] if values.encoder_frozen else []
        return [parameter for part in (*frozen, *encoder) for parameter in part.parameters()]

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Exponential moving average: ``teacher = momentum * teacher + (1 - momentum) * student``.

        Fixed positions are averaged as well, which leaves them unchanged. Running statistics of
        batch norm are those of the teacher's own passes.
        """
        if self.teacher is None:
            return
        own, other = (list(each.parameters()) for each in (self.teacher, self.student))
        torch._foreach_lerp_(own, other, 1 - momentum)

    def exported_encoder(self) -> FLSLViT | TimmBackbone:
        """Return the teacher's encoder, or the student's where there is no teacher."""
        networks = self.student if self.teacher is None else self.teacher
        return networks.backbone

    def compile_blocks(self, backend: str = "inductor", mode: str = "default") -> None:
        """Compile the transformer blocks of student and teacher (``torch.compile``).

        All blocks of an encoder share their code, so it is compiled once for each size of view,
        during the first steps; the rest of the step is small beside them.

        Args:
            backend: backend of ``torch.compile``.
            mode: its mode, for blocks of fixed sizes.

        Raises:
            InputError: the encoder has no transformer blocks.
        """
        for networks in (self.student, self.teacher):
            if networks is None:
                continue
            if not hasattr(networks.backbone, "compile_blocks"):
                raise InputError(
                    f"train.compile is True, and {type(networks.backbone).__name__} has no blocks "
                    "that are compiled one by one; set train.compile=False."
                )
            networks.backbone.compile_blocks(backend, mode)

    def normalised(self, images: Tensor) -> Tensor:
        """Images in 0 to 255 to what the encoder takes, float32."""
        return (images.float() - self.pixel_mean) / self.pixel_std

    def _check_plain_vit(self, backbone: nn.Module) -> None:
        name = type(self).__name__
        if not isinstance(backbone, FLSLViT):
            raise InputError(
                f"{name} masks or drops tokens, and {type(backbone).__name__} has none before its "
                "first layer; use an encoder of class FLSLViT."
            )
        windows = any(getattr(block, "window_size", 0) for block in backbone.blocks)
        if windows or backbone.num_prefix_tokens or backbone.architecture["use_rel_pos"]:
            raise InputError(
                f"{name} masks or drops tokens, which an encoder with windows, relative positions "
                "or prefix tokens does not take; set window_size=0, use_rel_pos=False and "
                "num_prefix_tokens=0 in model.backbone."
            )


class TwoViewMethod(BaseMethod):
    """A method whose ``loss`` compares the global outputs of two views of each image.

    Attributes:
        views_apart: whether batch norm sees each view by itself.
    """

    min_global = 2
    min_images = 2
    views_apart: ClassVar[bool] = False
    loss: nn.Module

    def forward(self, inputs: StepInputs, _values: StepValues) -> tuple[Losses, Monitored]:
        """Compute the loss of a step; see :class:`pretrain.methods.protocol.Method`."""
        views = [self.normalised(view) for view in inputs.views[:2]]
        tokens = encode_views(self.student.backbone, views, self.views_apart)
        parts = 2 if self.views_apart else 1
        outputs = by_parts(self.student.head, global_output(tokens), parts).float()
        with full_precision(outputs):
            loss = self.loss(*outputs.chunk(2))
        return {"loss": loss}, {"feature_std": feature_std(tokens[0])}


def encode_views(
    backbone: Any, views: Sequence[Tensor], apart: bool = False, num_blocks: int | None = None
) -> list[Tensor]:
    """Encode views of several sizes, in one pass where the encoder can pack them.

    Args:
        views: normalised images (B, 3, S, S); views of the same size follow each other.
        apart: whether batch norm in the encoder sees each view by itself; otherwise it sees those
            of one size that follow each other together.
        num_blocks: see :meth:`flsl_d2.modeling.FLSLViT.forward_tokens`; only for that class.

    Returns:
        Tokens (B, N, D) of each view.
    """
    if not isinstance(backbone, FLSLViT) and apart:
        return [backbone.forward_tokens(view) for view in views]
    groups = [list(group) for _, group in groupby(views, key=lambda view: view.shape[-1])]
    batches = [torch.cat(group) for group in groups]
    if not isinstance(backbone, FLSLViT):
        encoded = [backbone.forward_tokens(images) for images in batches]
    elif len(batches) == 1:
        encoded = [backbone.forward_tokens(batches[0], num_blocks)]
    else:
        encoded = backbone.forward_packed(batches, num_blocks)
    tokens: list[Tensor] = []
    for group, part in zip(groups, encoded, strict=True):
        tokens += part.chunk(len(group))
    return tokens


def global_output(tokens: Sequence[Tensor]) -> Tensor:
    """Mean of the tokens of each view, (V * B, D): there is no class token."""
    return torch.cat([view.mean(dim=1) for view in tokens])


def by_parts(module: nn.Module, inputs: Tensor, count: int) -> Tensor:
    """Apply a module to each of ``count`` equal parts, which batch norm then sees by themselves."""
    return torch.cat([module(part) for part in inputs.chunk(count)])


def mlp(*widths: int, norm: type[nn.Module] | None = None, last_bias: bool = True) -> nn.Sequential:
    """Build linear layers with a norm and ReLU between them.

    Args:
        widths: width of the input, of each hidden layer and of the output.
        norm: norm of the hidden layers; None for none.
        last_bias: whether the last layer has a bias. A layer before batch norm has none, because
            batch norm would subtract it.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=norm is not nn.BatchNorm1d))
        layers += [norm(after)] if norm else []
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=last_bias))


def full_precision(like: Tensor) -> torch.autocast:
    """Context in which the losses of a device's tensors are computed without half precision."""
    return torch.autocast(like.device.type, enabled=False)


@torch.no_grad()
def feature_std(tokens: Tensor) -> Tensor:
    """Spread of the features, an indicator of collapse.

    The standard deviation over tokens (B, N, D) of the L2-normalised features, times sqrt(D):
    about 1 for features that fill the space, 0 when all are the same.
    """
    unit = F.normalize(tokens.float().flatten(0, 1), dim=-1)
    return unit.std(dim=0).mean() * unit.shape[-1] ** 0.5


def import_extra(module: str) -> Any:
    """Import a module of the extra ``methods``.

    Raises:
        InputError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this method needs the package {module.split('.')[0]} ({error}); install it with "
            "pip install 'flsl-d2[methods]'."
        ) from None
