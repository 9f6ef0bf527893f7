"""FLSLViT: the one encoder that pre-training and detection share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import LayerScale, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flsl_d2.errors import InputError
from flsl_d2.modeling.attention import (
    Attention,
    PackedShapes,
    merge_windows,
    split_into_windows,
    window_key_mask,
)
from flsl_d2.modeling.encoder_state import fit_encoder_state
from flsl_d2.modeling.linear import Mlp
from flsl_d2.modeling.pixels import PixelAdapter
from flsl_d2.modeling.positions import resample_positions, sincos_positions
from flsl_d2.modeling.stochastic_depth import StochasticDepth

__all__ = ["Block", "FLSLViT", "evenly_spread_blocks"]


def evenly_spread_blocks(depth: int, count: int = 4) -> tuple[int, ...]:
    """Indexes of ``count`` global blocks, each the last of an equal share (ViTDet, Sec. 3)."""
    share = max(depth // count, 1)
    return tuple(range(share - 1, depth, share))


class Block(nn.Module):
    """Pre-norm transformer block whose attention sees the whole grid or windows of it.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over ``dim``.
        qkv_bias: bias in the query, key and value projections.
        drop_path: probability of leaving a residual branch out in training.
        skip_dropped: see :class:`flsl_d2.modeling.stochastic_depth.StochasticDepth`.
        window_size: side of the attention windows in tokens; 0 for global attention.
        rel_pos_size: token grid of the relative positions, None for none.
        mask_window_padding: leave the padding of windows out of attention. False attends to the
            padded zeros as well, as Detectron2's ViT does.
        layer_scale_init: start value of LayerScale (DINOv2); None for no LayerScale.
        recompute_gelu: see :class:`flsl_d2.modeling.linear.Mlp`.
        onednn_linear: see :func:`flsl_d2.modeling.linear.linear`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        skip_dropped: bool,
        window_size: int,
        rel_pos_size: int | None,
        mask_window_padding: bool,
        layer_scale_init: float | None,
        recompute_gelu: bool,
        onednn_linear: bool,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.mask_window_padding = mask_window_padding
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias,
            window_size if rel_pos_size and window_size else rel_pos_size,
            onednn_linear,
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), recompute_gelu, onednn_linear)
        self.drop_path = StochasticDepth(drop_path, skip_dropped)
        scaled = layer_scale_init is not None
        self.ls1 = LayerScale(dim, layer_scale_init) if scaled else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale_init) if scaled else nn.Identity()

    def forward(self, tokens: Tensor, shapes: PackedShapes | None = None) -> Tensor:
        """Tokens to tokens of the same shape.

        Args:
            tokens: (B, H, W, D); or, packed, (T, D) of images of several sizes.
            shapes: where packed, how many images of how many tokens follow each other.
        """
        tokens = self.drop_path(self._attention_branch, tokens, shapes)
        return self.drop_path(self._mlp_branch, tokens, shapes)

    def compile_branches(self, backend: str = "inductor") -> None:
        """Compile both branches for any number of images, as stochastic depth leaves some out."""
        for name in ("_attention_branch", "_mlp_branch"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True, backend=backend))

    def _attention_branch(self, tokens: Tensor, shapes: PackedShapes | None) -> Tensor:
        tokens = self.norm1(tokens)
        return self.ls1(
            self._attend(tokens) if shapes is None else self.attn.forward_packed(shapes, tokens)
        )

    def _mlp_branch(self, tokens: Tensor, _: PackedShapes | None) -> Tensor:
        return self.ls2(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        size = self.window_size
        if not size:
            return self.attn(tokens)
        batch, *grid, _ = tokens.shape
        windows, padded = split_into_windows(tokens, size)
        key_mask = None
        if self.mask_window_padding and list(padded) != grid:
            key_mask = window_key_mask(batch, tuple(grid), size, tokens.device)
        return merge_windows(self.attn(windows, key_mask), padded, tuple(grid))


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
        in_chans: channels of the image.
        embed_dim: width of the tokens; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        qkv_bias: bias in the query, key and value projections.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 in the first.
        skip_dropped: do not compute the branches that stochastic depth leaves out.
        window_size: side of attention windows in tokens; 0 for global attention everywhere.
        global_block_indexes: blocks that stay global when there are windows; None spreads four
            evenly (ViTDet).
        use_rel_pos: decomposed relative positions (ViTDet, MViTv2).
        final_norm: LayerNorm after the last block (FLSL has one, Detectron2's ViT has none).
        rel_pos_img_size: side in pixels that the relative positions of global blocks are made
            for; None takes ``img_size``. ViTDet's weights use 1024.
        position_offset: see :func:`flsl_d2.modeling.positions.resample_positions`.
        position_antialias: likewise.
        learned_positions: train the position table; otherwise it stays as initialised or loaded.
        mask_window_padding: leave the padding of windows out of attention (Detectron2 does not).
        layer_scale_init: start value of LayerScale; None for none. DINOv2's weights need it.
        num_prefix_tokens: learned tokens before those of the patches, with their positions in
            them: the class token and registers of other encoders. They take part in attention and
            are not in the output. Only for global attention, since no window holds them.
        frozen: whether the encoder is not trained: no parameter has a gradient, and it stays in
            evaluation mode, without stochastic depth.
        use_act_checkpoint: recompute each block in the backward pass to save memory.
        recompute_gelu: recompute the MLPs' GELUs there, a little of the time for a fifth of the
            memory; nothing is left to gain with ``use_act_checkpoint``.
        onednn_linear: on a CPU in fp32, multiply by oneDNN instead of MKL; see
            :func:`flsl_d2.modeling.linear.linear`.
        pixel_adapter: applied to the images first; see :class:`PixelAdapter`.
        out_feature: name of the output map.

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
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        skip_dropped: bool = True,
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
        recompute_gelu: bool = True,
        onednn_linear: bool = True,
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
                skip_dropped=skip_dropped,
                window_size=0 if i in global_block_indexes else window_size,
                rel_pos_size=rel_pos_img_size // patch_size if use_rel_pos else None,
                mask_window_padding=mask_window_padding,
                layer_scale_init=layer_scale_init,
                recompute_gelu=recompute_gelu and not use_act_checkpoint,
                onednn_linear=onednn_linear,
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
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict:
        """Constructor arguments from ``cfg.MODEL.FLSL_VIT`` (see ``add_flsl_config``)."""
        node = cfg.MODEL.FLSL_VIT
        arguments = {key.lower(): value for key, value in node.items()}
        arguments["global_block_indexes"] = node.GLOBAL_BLOCK_INDEXES or None
        arguments["rel_pos_img_size"] = node.REL_POS_IMG_SIZE or None
        arguments["layer_scale_init"] = node.LAYER_SCALE_INIT or None
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
                nn.init.constant_(module.gamma, self.layer_scale_init)
            elif isinstance(module, Attention) and module.use_rel_pos:
                nn.init.zeros_(module.rel_pos_h)
                nn.init.zeros_(module.rel_pos_w)
        side = round(self.pos_embed.shape[1] ** 0.5)
        self.pos_embed.copy_(sincos_positions(self.embed_dim, side))
        if self.num_prefix_tokens:
            nn.init.trunc_normal_(self.prefix_tokens, std=0.02)

    @property
    def architecture(self) -> dict[str, int | float | bool | list[int] | None]:
        """Constructor arguments that fix the shapes of the weights and what they compute."""
        first = self.blocks[0]
        known = {
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
        window_sizes = [block.window_size for block in self.blocks]
        if any(window_sizes):  # without windows, whoever takes the weights may add some
            known["window_size"] = max(window_sizes)
            known["global_block_indexes"] = [i for i, size in enumerate(window_sizes) if not size]
            known["mask_window_padding"] = first.mask_window_padding
        return known

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What Detectron2's ``ImageList`` must pad images to."""
        return {"size_divisibility": self.patch_size}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to ``{"last_feat": (B, D, H / patch, W / patch)}``."""
        return {self._out_features[0]: self._encode(images).permute(0, 3, 1, 2)}

    def forward_tokens(self, images: Tensor, num_blocks: int | None = None) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D), row-major.

        Args:
            images: normalised images; sides are multiples of the patch size.
            num_blocks: stop after this many blocks and leave the final norm out, for features of
                an intermediate level; None runs the whole encoder.
        """
        return self._encode(images, num_blocks).flatten(1, 2)

    def embed(self, images: Tensor) -> Tensor:
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
        return tokens + resample_positions(
            self.pos_embed, tuple(tokens.shape[1:3]), self.position_offset, self.position_antialias
        )

    def _encode(self, images: Tensor, num_blocks: int | None = None) -> Tensor:
        tokens = self.embed(images)
        grid = tuple(tokens.shape[1:3])
        if self.num_prefix_tokens:
            # Global attention does not mind the grid, so one long row holds all tokens.
            prefix = self.prefix_tokens.expand(len(tokens), -1, -1)
            tokens = torch.cat([prefix, tokens.flatten(1, 2)], dim=1)[:, None]  # (B, 1, P + N, D)
        for block in self.blocks[:num_blocks]:
            if self.use_act_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        if self.num_prefix_tokens:
            tokens = tokens[:, 0, self.num_prefix_tokens :].unflatten(1, grid)
        return tokens if num_blocks is not None else self.final_norm(tokens)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        """Refuse, through PyTorch's own error list, weights that do not cover the whole encoder."""
        fit_encoder_state(self, state_dict, prefix, errors)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


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
