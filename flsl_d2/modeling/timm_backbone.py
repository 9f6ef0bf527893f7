"""Any timm model that gives dense maps, as a Detectron2 backbone.

timm's ``forward_intermediates`` gives the maps; this module finds their strides, adapts the
pixels, and refuses models whose maps cannot be used.
"""

from __future__ import annotations

import ast
import difflib
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from omegaconf import ListConfig
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from flsl_d2.errors import InputError
from flsl_d2.modeling.feature_pyramid import SimpleFeaturePyramid
from flsl_d2.modeling.pixels import IMAGENET_MEAN, IMAGENET_STD, InputFormat, PixelAdapter

TIMM_PREFIX = "timm:"
# Bound of the wait for an answer of the Hugging Face Hub.
_NETWORK_SECONDS = 5.0
# Arguments by which timm's families take images of any size, in the order in which they are tried.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False, "dynamic_mask": True},
    {"strict_img_size": False},
    {},
)


class TimmBackbone(Backbone):
    """A timm model whose outputs are maps.

    A model whose maps all have one stride (a plain ViT) gives its last map as ``last_feat``, for
    :class:`~flsl_d2.modeling.SimpleFeaturePyramid`; others (ConvNeXt, Swin, ResNet) give the last
    map of each stride from 4 on as ``res2``, ``res3``, ..., for Detectron2's ``FPN``.

    Args:
        name: timm's name of the model, with its tag if wanted; ``hf-hub:OWNER/NAME`` as timm takes
            it.
        pretrained: load timm's published weights (needs a network or timm's cache).
        weights: file of the model's own weights, in timm's layout, that must cover every map.
        use_act_checkpoint: recompute blocks in the backward pass to save memory.
        frozen: train nothing; the model stays in evaluation mode.
        pixel_mean: mean that the images fed here were normalised with, red, green and blue, on the
            scale of 0 to 255.
        pixel_std: standard deviation, likewise. From these to the model's own normalisation there
            is an exact change, so the detector's config stays as it is.
        bgr: the images fed are BGR; ``pixel_mean`` and ``pixel_std`` are then in that order.
        **model_args: further arguments of ``timm.create_model``, e.g. ``drop_path_rate``,
            ``img_size`` or ``patch_size``.

    Raises:
        InputError: no such model (the closest names are given), a model without dense maps or of a
            fixed image size, or weights that do not cover it.
    """

    model: Any  # timm's models have no common type

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        weights: str = "",
        use_act_checkpoint: bool = False,
        frozen: bool = False,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        bgr: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__()
        self.name, self.frozen = name, frozen
        self.input_format = InputFormat(mean=tuple(pixel_mean), std=tuple(pixel_std), stated=True)
        # Lists of a LazyConfig are no lists to PyTorch.
        model_args = {
            k: tuple(v) if isinstance(v, ListConfig) else v for k, v in model_args.items()
        }
        self.model = _create(name, pretrained and not weights, model_args)
        if weights:
            _load(self.model, weights)
        self.pixel_adapter = _pixel_adapter(self.model, pixel_mean, pixel_std, bgr)
        self._indices, strides = _levels(self.model, name)
        names = [f"res{stride.bit_length() - 1}" for stride in strides]
        self.is_plain = len(strides) == 1
        self._out_features = ["last_feat"] if self.is_plain else names
        channels = self._try_out(strides)
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict(zip(self._out_features, channels, strict=True))
        # What dense evaluations read: tokens are the positions of the last map.
        self.patch_size, self.embed_dim = strides[-1], channels[-1]
        if use_act_checkpoint:
            self._recompute()
        if frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode like ``nn.Module.train``, except that a frozen model stays in evaluation."""
        return super().train(mode and not self.frozen)

    def layer_factors(self, decay_rate: float) -> dict[str, float]:
        """Learning rate factor of each weight by its name, as timm groups the model's layers.

        It is 1 for the last layer; ``decay_rate`` leads to the one before (BEiT, arXiv 2106.08254).
        """
        matcher = self.model.group_matcher(coarse=False)
        layers = timm.models.group_parameters(self.model, matcher, reverse=True)
        last = max(layers.values())
        return {f"model.{name}": decay_rate ** (last - layer) for name, layer in layers.items()}

    def _recompute(self) -> None:
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise InputError(
                f"timm's '{self.name}' cannot recompute its blocks in the backward pass; set "
                "use_act_checkpoint=False."
            ) from error

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Multiple that Detectron2's ``ImageList`` must pad the sides of images to."""
        return {"size_divisibility": max(self._out_feature_strides.values())}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to the map (B, C, H / stride, W / stride) of each output."""
        return dict(zip(self._out_features, self._maps(images), strict=True))

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Positions of the last map as tokens (B, N, D), row-major."""
        return self._maps(images)[-1].flatten(2).transpose(1, 2)

    @torch.enable_grad()
    def _try_out(self, strides: list[int]) -> list[int]:
        """Find the channels of the maps, with an image higher than usual that is not square.

        Parameters that no map depends on, such as the classification head, are frozen, because
        ``DistributedDataParallel`` refuses parameters that get no gradient.
        """
        stride = strides[-1]
        usual = resolve_model_data_config(self.model)["input_size"][1]
        height, width = (usual // stride + 3) * stride, 5 * stride
        self.model.eval()
        try:
            maps = self._intermediates(torch.zeros(1, 3, height, width))
        except (RuntimeError, AssertionError, LookupError, ValueError, TypeError) as error:
            raise InputError(
                f"timm's '{self.name}' does not take images of any size (at {height} x {width}: "
                f"{_reason(error)}); choose a model that does."
            ) from error
        finally:
            self.model.train()
        shapes = [tuple(map_.shape[-2:]) for map_ in maps]
        expected = [(height // stride, width // stride) for stride in strides]
        if shapes != expected:
            raise InputError(
                f"timm's '{self.name}' gives maps of {shapes} for an image of {height} x {width} "
                f"pixels, where strides {strides} give {expected}; choose another model."
            )
        torch.stack([map_.sum() for map_ in maps]).sum().backward()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        return [map_.shape[1] for map_ in maps]

    def _maps(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        stride = max(self._out_feature_strides.values())
        if height % stride or width % stride:
            raise InputError(
                f"an image of {height} x {width} pixels does not fit timm's '{self.name}', whose "
                f"stride is {stride}; pad or resize its sides to multiples of {stride}."
            )
        if self.pixel_adapter is not None:
            images = self.pixel_adapter(images)
        return self._intermediates(images)

    def _intermediates(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(
            images, indices=self._indices, norm=self.is_plain, intermediates_only=True
        )


def parse_timm_name(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``timm:NAME?key=value&key=value`` into the name and the arguments.

    Values are Python literals (``img_size=224``), ``true`` and ``false``, or text.
    """
    name, _, options = text.removeprefix(TIMM_PREFIX).partition("?")
    arguments: dict[str, Any] = {}
    for part in filter(None, options.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(
                f"'{part}' in '{text}' is no option; write timm:NAME?key=value&key=value, e.g. "
                "timm:vit_small_patch16_dinov3?pretrained=false."
            )
        arguments[key] = {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(arguments[key], str):
            with suppress(ValueError, SyntaxError):
                arguments[key] = ast.literal_eval(value)
    return name, arguments


def build_timm_backbone(text: str, **arguments: Any) -> TimmBackbone:
    """Build the model that ``timm:NAME?key=value`` names; ``arguments`` come on top."""
    name, options = parse_timm_name(text)
    return TimmBackbone(name, **{**options, **arguments})


def timm_pyramid(
    net: TimmBackbone, out_channels: int = 256, norm: str = "LN", square_pad: int = 0
) -> Backbone:
    """Put the pyramid that fits around a timm model: simple for one stride, FPN for several.

    Args:
        norm: normalisation of the pyramid, a name that Detectron2's ``get_norm`` knows.
        square_pad: pad images to squares of this side in pixels; simple pyramid only.

    Returns:
        A backbone with levels p2 to p6.
    """
    top = LastLevelMaxPool()
    if net.is_plain:
        return SimpleFeaturePyramid(
            net, out_channels=out_channels, norm=norm, square_pad=square_pad, top_block=top
        )
    return FPN(net, list(net.output_shape()), out_channels, norm=norm, top_block=top)


@BACKBONE_REGISTRY.register()
def build_timm_pyramid(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build a timm model with its pyramid from a YAML config.

    Reads ``cfg.MODEL.TIMM``, ``cfg.MODEL.FLSL_SFP`` (channels and norm of the pyramid), and the
    pixel statistics and channel order of the config.
    """
    node, pyramid = cfg.MODEL.TIMM, cfg.MODEL.FLSL_SFP
    net = build_timm_backbone(
        node.NAME,
        use_act_checkpoint=node.USE_ACT_CHECKPOINT,
        frozen=node.FROZEN,
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        bgr=cfg.INPUT.FORMAT == "BGR",
    )
    return timm_pyramid(net, pyramid.OUT_CHANNELS, pyramid.NORM, pyramid.SQUARE_PAD)


def _create(name: str, pretrained: bool, model_args: dict[str, Any]) -> nn.Module:
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and not timm.is_model(name.split(".")[0]):
        known = timm.list_models()
        close = difflib.get_close_matches(name.split(".")[0], known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()."
        raise InputError(f"timm {timm.__version__} has no model '{name}'; {hint}")
    if pretrained:
        _check_network(name)
    errors: list[str] = []
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(name, pretrained=pretrained, **{**any_size, **model_args})
        except TypeError as error:  # an argument that this family does not take
            errors.append(str(error))
        except (RuntimeError, OSError, ValueError) as error:
            what = "; for random weights add ?pretrained=false" if pretrained else ""
            raise InputError(f"timm cannot build '{name}' ({_reason(error)}){what}.") from error
    raise InputError(f"timm cannot build '{name}' ({errors[-1]}); check the options after '?'.")


def _check_network(name: str) -> None:
    """Ask once for the Hugging Face Hub, which timm and its library ask for most of a minute."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    repository = config.hf_hub_id if config else re.sub("^hf[-_]hub:", "", name)
    if not repository or name.startswith("local-dir:"):
        return
    own = config.hf_hub_filename if config else None
    files = (own or "model.safetensors", "model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        return
    try:
        request = urllib.request.Request(HF_ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_NETWORK_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers
    except OSError as error:
        raise InputError(
            f"the weights of timm's '{name}' are not in this machine's cache, and {HF_ENDPOINT} "
            f"cannot be reached ({_reason(error)}); download them where there is a network, give "
            "?weights=FILE, or add ?pretrained=false for random weights."
        ) from error


def _load(model: nn.Module, path: str) -> None:
    """Load a file of the model's own weights; only what no map needs may be missing."""
    if not Path(path).is_file():
        raise InputError(f"weights '{path}' do not exist; check the path.")
    try:
        timm.models.load_checkpoint(model, path, strict=False, weights_only=True)
        state = timm.models.load_state_dict(path, weights_only=True)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise InputError(f"timm cannot load weights '{path}' ({_reason(error)}).") from error
    own = set(model.state_dict())
    found = {key.removeprefix("module.") for key in state}
    missing = sorted(key for key in own - found if not key.startswith(_HEADS))
    if missing:
        raise InputError(
            f"weights '{path}' lack {len(missing)} of the {len(own)} tensors of the model, first "
            f"'{missing[0]}'; give weights of the same timm model."
        )


def _reason(error: Exception) -> str:
    """First line of an error, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Parts of timm's models that turn maps into classes.
_HEADS = ("head", "fc.", "fc_norm", "classifier", "attn_pool", "last_linear", "num_batches")


def _levels(model: Any, name: str) -> tuple[list[int], list[int]]:
    """Indexes and strides of the maps to return: the last of each stride from 4 on."""
    if not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"timm's '{name}' has no forward_intermediates, so it gives no dense maps; choose "
            "another model."
        )
    last = {entry["reduction"]: index for index, entry in enumerate(model.feature_info)}
    strides = sorted(last)
    if len(strides) > 1:
        strides = [stride for stride in strides if stride >= 4]
        if any(stride.bit_count() != 1 for stride in strides):
            raise InputError(
                f"timm's '{name}' has maps of strides {strides}; a pyramid needs powers of two."
            )
    return [last[stride] for stride in strides], strides


def _pixel_adapter(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], bgr: bool
) -> PixelAdapter | None:
    """Build the change from the pixels fed to those that the model was trained on, if any."""
    config = resolve_model_data_config(model)
    own_mean = [255 * value for value in config["mean"]]
    own_std = [255 * value for value in config["std"]]
    adapter = PixelAdapter(list(mean), list(std), bgr, own_mean, own_std)
    return None if adapter.is_identity else adapter
