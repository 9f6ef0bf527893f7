"""FLSLViT: the one encoder that pre-training and detection share.

Shape suffixes: B images of one size, N tokens of an image, T tokens of all images, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers.layer_scale import LayerScale
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flsl_d2.errors import InputError
from flsl_d2.modeling.attention import Attention, PackedShapes
from flsl_d2.modeling.blocks import Block, KeptImages, draw_kept_images
from flsl_d2.modeling.encoder import VIT_SIZES
from flsl_d2.modeling.encoder_state import fit_encoder_state
from flsl_d2.modeling.pixels import InputFormat, PixelAdapter
from flsl_d2.modeling.positions import resample_positions, sincos_positions

# Positions that a pass may add to the patches: those of the table, or none.
POSITIONS = ("own", "none")

# A child of Detectron2's logger, so that the line appears in projects that only set up that one.
logger = logging.getLogger("detectron2.flsl_d2")

# Arguments of FLSLViT that may be None, and what stands for None in a YAML node.
NO_VALUE = {"global_block_indexes": [], "rel_pos_img_size": 0, "layer_scale_init": 0.0}


def evenly_spread_blocks(depth: int, count: int = 4) -> tuple[int, ...]:
    """Indexes of ``count`` global blocks, each the last of an equal share (ViTDet, Sec. 3)."""
    share = max(depth // count, 1)
    return tuple(range(share - 1, depth, share))


@BACKBONE_REGISTRY.register()
class FLSLViT(Backbone):
    """A plain vision transformer whose output is a map of patches, as a Detectron2 backbone.

    The defaults are ViT-S/16 as FLSL pre-trains it: global attention, fixed sine-cosine positions
    and a LayerNorm after the last block. Detection adds windows; see
    ``flsl_d2.modeling.SimpleFeaturePyramid`` for the pyramid around it.

    Args:
        img_size: side in pixels of the square images that the position table is made for (the
            pre-training resolution); other sizes resample the table.
        patch_size: side of a patch in pixels; divides ``img_size``.
        in_chans: number of channels of the image.
        embed_dim: width of the tokens; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        qkv_bias: whether the query, key and value projections have a bias.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.
        window_size: side of attention windows in tokens; 0 for global attention everywhere.
        global_block_indexes: blocks that stay global when there are windows; None spreads four
            evenly (ViTDet).
        use_rel_pos: whether there are decomposed relative positions (ViTDet, MViTv2).
        final_norm: whether a LayerNorm follows the last block (FLSL has one, Detectron2's ViT has
            none).
        rel_pos_img_size: side in pixels that the relative positions of global blocks are made
            for; None takes ``img_size``. ViTDet's weights use 1024.
        position_offset: see :func:`flsl_d2.modeling.positions.resample_positions`.
        position_antialias: see :func:`flsl_d2.modeling.positions.resample_positions`.
        learned_positions: whether the position table is trained; otherwise it stays as it was
            initialised or loaded.
        mask_window_padding: whether attention leaves out the padding of windows (Detectron2's does
            not).
        layer_scale_init: start value of LayerScale; None for none. DINOv2's weights need it.
        num_prefix_tokens: number of learned tokens before those of the patches: the class token
            and registers of other encoders, positions included. They take part in attention and
            are not in the output. Windows have no place for them.
        frozen: whether the encoder is not trained: no parameter has a gradient, and it stays in
            evaluation mode, without stochastic depth.
        use_act_checkpoint: whether each block is computed again in the backward pass, to save
            memory.
        pixel_adapter: module applied to the images first; see :class:`PixelAdapter`.
        out_feature: name of the output map.

    Attributes:
        input_format: pixels that the encoder was trained on, which its file states.

    Raises:
        InputError: sizes that do not divide, a block index out of range, or prefix tokens with
            windows or relative positions.
    """

    @configurable
    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = VIT_SIZES["small"]["embed_dim"],
        depth: int = VIT_SIZES["small"]["depth"],
        num_heads: int = VIT_SIZES["small"]["num_heads"],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        window_size: int = 0,
        global_block_indexes: Sequence[int] | None = None,
        use_rel_pos: bool = False,
        final_norm: bool = True,
        rel_pos_img_size: int | None = None,
        position_offset: float = 0.1,
        position_antialias: bool = False,
        learned_positions: bool = False,
        mask_window_padding: bool = False,
        layer_scale_init: float | None = None,
        num_prefix_tokens: int = 0,
        frozen: bool = False,
        use_act_checkpoint: bool = False,
        pixel_adapter: PixelAdapter | None = None,
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        rel_pos_img_size = rel_pos_img_size or img_size
        _check_sizes(img_size, rel_pos_img_size, patch_size, embed_dim, num_heads)
        if global_block_indexes is None:
            global_block_indexes = evenly_spread_blocks(depth)
        if any(not 0 <= i < depth for i in global_block_indexes):
            raise InputError(
                f"global_block_indexes is {list(global_block_indexes)}, but a ViT of depth "
                f"{depth} has blocks 0 to {depth - 1}; name blocks in that range."
            )
        if num_prefix_tokens and (window_size or use_rel_pos):
            raise InputError(
                f"num_prefix_tokens is {num_prefix_tokens}, but windows and relative positions "
                "have no place for such tokens; set num_prefix_tokens=0, or window_size=0 and "
                "use_rel_pos=False."
            )
        self.input_format = InputFormat.default(in_chans)
        self.patch_size, self.embed_dim, self.depth = patch_size, embed_dim, depth
        self.num_prefix_tokens = num_prefix_tokens
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.rel_pos_img_size = rel_pos_img_size
        self.layer_scale_init = layer_scale_init
        self.use_act_checkpoint = use_act_checkpoint
        self.pixel_adapter = pixel_adapter
        self.patch_embed = PatchEmbed(
            None, patch_size, in_chans, embed_dim, flatten=False, output_fmt="NHWC"
        )
        self.pos_embed = nn.Parameter(
            torch.empty(1, (img_size // patch_size) ** 2, embed_dim),
            requires_grad=learned_positions,
        )
        if num_prefix_tokens:
            self.prefix_tokens = nn.Parameter(torch.empty(1, num_prefix_tokens, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                window_size=0 if i in global_block_indexes else window_size,
                rel_pos_size=rel_pos_img_size // patch_size if use_rel_pos else None,
                mask_window_padding=mask_window_padding,
                layer_scale_init=layer_scale_init,
                recompute_gelu=not use_act_checkpoint,
            )
            for i in range(depth)
        )
        # Named apart from every other module of a detector: Detectron2 matches the weights of a
        # pre-trained encoder by the end of their names, and pyramids and heads have a "norm" too.
        self.final_norm = nn.LayerNorm(embed_dim, eps=1e-6) if final_norm else nn.Identity()
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self.reset_parameters()
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> FLSLViT:
        """Set training mode, except that a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Return constructor arguments from ``cfg.MODEL.FLSL_VIT`` (see ``add_flsl_config``)."""
        arguments = {key.lower(): value for key, value in cfg.MODEL.FLSL_VIT.items()}
        for name in NO_VALUE:
            arguments[name] = arguments[name] or None
        arguments["in_chans"] = input_shape.channels if input_shape else len(cfg.MODEL.PIXEL_MEAN)
        arguments["pixel_adapter"] = PixelAdapter.from_config(cfg)
        return arguments

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter: truncated normal (0.02) linear layers, sine-cosine table."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self.layer_scale_init or 0.0)
            elif isinstance(module, Attention) and module.use_rel_pos:
                nn.init.zeros_(module.rel_pos_h)
                nn.init.zeros_(module.rel_pos_w)
        side = round(self.pos_embed.shape[1] ** 0.5)
        self.pos_embed.copy_(sincos_positions(self.embed_dim, side))
        if self.num_prefix_tokens:
            nn.init.trunc_normal_(self.prefix_tokens, std=0.02)

    @property
    def architecture(self) -> dict[str, int | float | bool | list[int] | None]:
        """Constructor arguments that decide the shapes of the weights and what they compute."""
        blocks = self._typed_blocks()
        first = blocks[0]
        known: dict[str, int | float | bool | list[int] | None] = {
            "img_size": round(self.pos_embed.shape[1] ** 0.5) * self.patch_size,
            "patch_size": self.patch_size,
            "in_chans": self.patch_embed.proj.in_channels,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": first.attn.num_heads,
            "mlp_ratio": first.mlp.fc1.out_features / self.embed_dim,
            "qkv_bias": first.attn.qkv.bias is not None,
            "use_rel_pos": first.attn.use_rel_pos,
            "final_norm": isinstance(self.final_norm, nn.LayerNorm),
            "position_offset": self.position_offset,
            "position_antialias": self.position_antialias,
            "layer_scale_init": self.layer_scale_init,
            "num_prefix_tokens": self.num_prefix_tokens,
        }
        if first.attn.use_rel_pos:
            known["rel_pos_img_size"] = self.rel_pos_img_size
        window_sizes = [block.window_size for block in blocks]
        if any(window_sizes):  # an encoder without windows may be given some later
            known["window_size"] = max(window_sizes)
            known["global_block_indexes"] = [i for i, size in enumerate(window_sizes) if not size]
            known["mask_window_padding"] = first.mask_window_padding
        return known

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Multiples that Detectron2's ``ImageList`` must pad images to."""
        return {"size_divisibility": self.patch_size}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to ``{"last_feat": (B, D, H / patch, W / patch)}``."""
        return {self._out_features[0]: self._encode(images).permute(0, 3, 1, 2)}

    def forward_tokens(
        self, images: Tensor, num_blocks: int | None = None, positions: str = "own"
    ) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D), row-major.

        Args:
            images: normalised images; sides are multiples of the patch size.
            num_blocks: number of blocks to run, without the final norm, for features of an
                intermediate level; None runs the whole encoder.
            positions: positions that are added to the patches, one of :data:`POSITIONS`.
        """
        return self._encode(images, num_blocks, positions).flatten(1, 2)

    def forward_packed(
        self,
        batches: Sequence[Tensor],
        num_blocks: int | None = None,
        positions: str = "own",
        kept: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """``[self.forward_tokens(images, ...) for images in batches]`` in one pass.

        The tokens of all images lie in one list, as NaViT packs patches (arXiv 2307.06304): linear
        layers, norms and MLPs run once over the list, and attention runs for each size on its part
        of it. Small views alone do not keep the hardware busy; together with large ones they do.
        The result is equal up to rounding; stochastic depth draws other images, with the same
        probability.

        Args:
            batches: normalised images (B, 3, H, W); each entry has another size.
            num_blocks: see :meth:`forward_tokens`.
            positions: see :meth:`forward_tokens`.
            kept: for each entry the indexes (B, M) of the tokens that are encoded, the others being
                dropped before the first block; None for all.

        Returns:
            (B, N, D) for each entry; (B, M, D) where tokens are dropped.

        Raises:
            InputError: the encoder has windows or relative positions.
        """
        blocks = self._typed_blocks()
        windows = any(block.window_size for block in blocks)
        if windows or blocks[0].attn.use_rel_pos:
            raise InputError(
                "images of several sizes can be packed only for an encoder with window_size=0 and "
                "use_rel_pos=False; set those, or encode size by size."
            )
        parts = [self.embed(images, positions).flatten(1, 2) for images in batches]
        if kept is not None:
            parts = [
                part if indexes is None else gather_tokens(part, indexes)
                for part, indexes in zip(parts, kept, strict=True)
            ]
        parts = [self._with_prefix(part) for part in parts]
        shapes = tuple((part.shape[0], part.shape[1]) for part in parts)
        tokens = torch.cat([part.flatten(0, 1) for part in parts])  # (T, D)
        tokens = self._run_blocks(tokens, num_blocks, shapes)
        sizes = [count * length for count, length in shapes]
        return [
            part.view(*shape, -1)[:, self.num_prefix_tokens :]
            for part, shape in zip(tokens.split(sizes), shapes, strict=True)
        ]

    def embed(self, images: Tensor, positions: str = "own") -> Tensor:
        """Images (B, 3, H, W) to patches with positions (B, H / patch, W / patch, D)."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(
                f"an image of {height} x {width} pixels cannot be cut into patches of "
                f"{self.patch_size}; pad or resize its sides to multiples of {self.patch_size}."
            )
        if self.pixel_adapter is not None:
            images = self.pixel_adapter(images)
        # The convolution leaves the width outermost; all that follows would inherit its strides.
        tokens = self.patch_embed(images).contiguous()  # (B, H, W, D)
        grid = (tokens.shape[1], tokens.shape[2])
        if positions == "none":
            return tokens.to(self.pos_embed.dtype)  # as precise as the sum with positions
        return tokens + self.positions_of(grid)

    def positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions (1, rows, columns, D) that a grid of patches gets."""
        return resample_positions(
            self.pos_embed, grid, self.position_offset, self.position_antialias
        )

    def forward_embedded(self, tokens: Tensor, num_blocks: int | None = None) -> Tensor:
        """Run the blocks on tokens (B, N, D) of :meth:`embed`, of which some may be left out.

        Global attention does not depend on their places.
        """
        return self._run_blocks(tokens[:, None], num_blocks)[:, 0]

    def compile_blocks(self, backend: str = "inductor", mode: str = "default") -> None:
        """Compile the blocks in place; see :meth:`.Block.compile_in_place`."""
        for block in self._typed_blocks():
            block.compile_in_place(backend, mode)

    def _typed_blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def _encode(
        self, images: Tensor, num_blocks: int | None = None, positions: str = "own"
    ) -> Tensor:
        tokens = self.embed(images, positions)
        grid = tokens.shape[1:3]
        if self.num_prefix_tokens:
            # Global attention does not depend on the grid, so one row holds all tokens.
            tokens = self._with_prefix(tokens.flatten(1, 2))[:, None]  # (B, 1, P + N, D)
        tokens = self._run_blocks(tokens, num_blocks)
        if self.num_prefix_tokens:
            tokens = tokens[:, 0, self.num_prefix_tokens :].unflatten(1, grid)
        return tokens

    def _with_prefix(self, tokens: Tensor) -> Tensor:
        """Put the prefix tokens, if any, before the patches (B, N, D)."""
        if not self.num_prefix_tokens:
            return tokens
        prefix = self.prefix_tokens.expand(tokens.shape[0], -1, -1)  # len() is no symbol
        return torch.cat([prefix, tokens], dim=1)

    def _run_blocks(
        self, tokens: Tensor, num_blocks: int | None, shapes: PackedShapes | None = None
    ) -> Tensor:
        """Run the blocks, and the final norm where ``num_blocks`` is None."""
        blocks = self._typed_blocks()[:num_blocks]
        kept = self._draw_kept(blocks, tokens, shapes)
        for block in blocks:
            images = (next(kept), next(kept)) if block.drop_path.probability else (None, None)
            if self.use_act_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, shapes, images, use_reentrant=False)
            else:
                tokens = block(tokens, shapes, images)
        return tokens if num_blocks is not None else self.final_norm(tokens)

    def _draw_kept(
        self, blocks: Sequence[Block], tokens: Tensor, shapes: PackedShapes | None
    ) -> Iterator[KeptImages | None]:
        """Images of stochastic depth of all branches of the blocks that have it."""
        rates = [block.drop_path.probability for block in blocks for _ in range(2)]
        rates = [rate for rate in rates if rate]
        if not (self.training and rates):
            return repeat(None)
        return iter(draw_kept_images(rates, len(tokens), shapes, tokens.device))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Check the encoder's part of a state dict, and refuse it through PyTorch's error list."""
        try:
            logger.info(fit_encoder_state(self, state_dict, prefix).line())
        except InputError as error:
            errors.append(str(error))
            state_dict.clear()  # so that no part of it adds a line for each of its tensors
            return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


def gather_tokens(tokens: Tensor, indexes: Tensor) -> Tensor:
    """Tokens (B, N, D) at ``indexes`` (B, M): (B, M, D)."""
    return tokens.gather(1, indexes[..., None].expand(-1, -1, tokens.shape[-1]))


def _check_sizes(
    img_size: int, rel_pos_img_size: int, patch_size: int, embed_dim: int, num_heads: int
) -> None:
    for name, size in (("img_size", img_size), ("rel_pos_img_size", rel_pos_img_size)):
        if size % patch_size:
            raise InputError(
                f"{name} is {size}, which patches of {patch_size} do not divide; "
                f"use {size // patch_size * patch_size or patch_size} or another multiple."
            )
    if embed_dim % num_heads:
        raise InputError(
            f"embed_dim is {embed_dim}, which {num_heads} heads do not divide; "
            "change embed_dim or num_heads."
        )
