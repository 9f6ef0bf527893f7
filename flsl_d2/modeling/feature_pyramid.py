"""The simple feature pyramid of ViTDet (arXiv 2203.16527, Sec. 3) and its nodes of YAML configs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling.vit import NO_VALUE, FLSLViT


class SimpleFeaturePyramid(Backbone):
    """Maps of several strides from the one map of a plain backbone.

    Parameter names are those of Detectron2's class of the same name, so its weights load. Two
    things differ: a scale may be any power of two, so that a map of stride 8 has all levels, and
    images are padded to the coarsest stride (Detectron2 misspells the key of that constraint, so
    its padding is skipped unless ``square_pad`` is set).

    Args:
        net: backbone that computes the map.
        in_feature: name of that map in the output of ``net``.
        out_channels: number of channels of every level.
        scale_factors: size of each level over the size of the map, falling; None for strides
            4, 8, 16 and 32 whatever the stride of ``net`` is.
        top_block: module that makes further levels from the last (p6 by max-pooling); it has
            ``num_levels`` and ``in_feature``.
        norm: name of the convolutions' normalisation, for Detectron2's ``get_norm``.
        square_pad: side in pixels of the squares that images are padded to; 0 pads to multiples of
            the coarsest stride.

    Raises:
        InputError: a scale is not a power of two.
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str = "last_feat",
        out_channels: int = 256,
        scale_factors: Sequence[float] | None = None,
        top_block: LastLevelMaxPool | None = None,
        norm: str = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        shape = net.output_shape()[in_feature]
        if scale_factors is None:
            scale_factors = [shape.stride / stride for stride in (4, 8, 16, 32)]
        strides = [int(shape.stride / scale) for scale in scale_factors]
        whole = all(math.log2(scale).is_integer() for scale in scale_factors)
        if not whole or any(stride < 1 or stride.bit_count() != 1 for stride in strides):
            given = [round(shape.stride / scale, 2) for scale in scale_factors]
            raise InputError(
                f"scale_factors {list(scale_factors)} on a map of stride {shape.stride} give "
                f"strides {given}; use powers of two that leave whole strides (an encoder with "
                "patches of 8 or 16 pixels does)."
            )
        self.stages: list[nn.Module] = []
        self._out_feature_strides = {}
        for scale, stride in zip(scale_factors, strides, strict=True):
            level = stride.bit_length() - 1
            stage = _level(shape.channels, out_channels, scale, norm)
            self.add_module(f"simfp_{level}", stage)
            self.stages.append(stage)
            self._out_feature_strides[f"p{level}"] = stride
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        if top_block is not None:
            for extra in range(1, top_block.num_levels + 1):
                self._out_feature_strides[f"p{level + extra}"] = strides[-1] * 2**extra
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._padding = {"size_divisibility": strides[-1], "square_size": square_pad}

    @property
    def size_divisibility(self) -> int:
        """Multiple in pixels of the sides of padded images."""
        return self._padding["size_divisibility"]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Multiples that Detectron2's ``ImageList`` must pad images to, under the keys it reads."""
        return self._padding

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to ``{"p2": (B, C, H / 4, W / 4), "p3": ..., ...}``."""
        bottom_up = self.net(images)
        features = [stage(bottom_up[self.in_feature]) for stage in self.stages]
        out = dict(zip(self._out_features, features, strict=False))
        if self.top_block is not None:
            source = str(self.top_block.in_feature)
            tops = self.top_block(bottom_up.get(source, out.get(source)))
            out.update(zip(self._out_features[len(features) :], tops, strict=True))
        return out


def _level(in_channels: int, out_channels: int, scale: float, norm: str) -> nn.Sequential:
    """Resample by ``scale`` (a power of two), then a 1 x 1 and a 3 x 3 convolution."""
    layers: list[nn.Module] = []
    channels = in_channels
    doublings = max(round(scale).bit_length() - 1, 0)
    for step in range(doublings):
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
        if step < doublings - 1:
            layers += [get_norm(norm, channels), nn.GELU()]
    if scale < 1:
        layers.append(nn.MaxPool2d(kernel_size=round(1 / scale), stride=round(1 / scale)))
    bias = norm == ""
    return nn.Sequential(
        *layers,
        Conv2d(channels, out_channels, 1, bias=bias, norm=get_norm(norm, out_channels)),
        Conv2d(
            out_channels, out_channels, 3, padding=1, bias=bias, norm=get_norm(norm, out_channels)
        ),
    )


def add_flsl_config(cfg: CfgNode) -> None:
    """Add the nodes that the backbones ``build_flsl_vit_sfp_backbone`` and ``FLSLViT`` read.

    Each key of ``MODEL.FLSL_VIT`` is the argument of :class:`flsl_d2.modeling.FLSLViT` of the same
    name, with its default; windows of 14 x 14 tokens and stochastic depth of 0.1 are detection's
    own. ``MODEL.TIMM`` belongs to :class:`flsl_d2.modeling.TimmBackbone`. Existing keys of ``cfg``
    are left alone, so this may be called twice.
    """
    model = cfg.MODEL
    if "FLSL_VIT" not in model:
        parameters = inspect.signature(FLSLViT.__init__).parameters.values()
        node = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        for name in ("in_chans", "pixel_adapter", "out_feature"):  # follow from the other nodes
            del node[name]
        node.update(NO_VALUE, window_size=14, drop_path_rate=0.1)
        model.FLSL_VIT = CfgNode({name.upper(): value for name, value in node.items()})
    if "FLSL_SFP" not in model:
        model.FLSL_SFP = CfgNode({"OUT_CHANNELS": 256, "NORM": "LN", "SQUARE_PAD": 0})
    if "TIMM" not in model:
        # timm's name of the model, options after "?", e.g. resnet50?pretrained=false.
        model.TIMM = CfgNode({"NAME": "", "FROZEN": False, "USE_ACT_CHECKPOINT": False})


@BACKBONE_REGISTRY.register()
def build_flsl_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build FLSLViT under a simple feature pyramid with p2 to p6, for R-CNN configs.

    Reads ``cfg.MODEL.FLSL_VIT`` and ``cfg.MODEL.FLSL_SFP``; see :func:`add_flsl_config`.
    """
    node = cfg.MODEL.FLSL_SFP
    return SimpleFeaturePyramid(
        FLSLViT(cfg, input_shape),
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        square_pad=node.SQUARE_PAD,
        top_block=LastLevelMaxPool(),
    )
