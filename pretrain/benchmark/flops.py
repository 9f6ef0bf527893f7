"""Floating-point operations of a pre-training step, counted by hand.

A multiplication and an addition are two operations. Counted are matrix products and attention;
norms, activations and softmaxes are small beside them. Neither recomputed activations count nor
branches that stochastic depth leaves out, computed or not, so that the share of the peak (MFU,
arXiv 2204.02311) is that of useful work.
"""

from __future__ import annotations

from collections.abc import Sequence

from flsl_d2.modeling import FLSLViT
from pretrain.model import FLSL

__all__ = ["PEAK_TFLOPS", "encoder_flops", "peak_tflops", "step_flops"]

# Dense bf16 / fp16 peak of cards by a part of the name that PyTorch reports (vendor's data sheets).
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_tflops(device_name: str) -> float | None:
    """The peak of a card; None where it is not listed."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def encoder_flops(encoder: FLSLViT, num_tokens: int, training: bool = False) -> int:
    """Operations of one forward pass over an image of so many tokens.

    Args:
        encoder: the encoder.
        num_tokens: of the image.
        training: whether stochastic depth leaves branches out; then it is the mean.
    """
    width = encoder.embed_dim
    pixels = encoder.patch_embed.proj.in_channels * encoder.patch_size**2
    hidden = encoder.blocks[0].mlp.fc1.out_features
    linear = 2 * num_tokens * (4 * width * width + 2 * width * hidden)
    attention = 4 * num_tokens**2 * width
    dropped = sum(block.drop_path.probability for block in encoder.blocks) if training else 0
    blocks = (encoder.depth - dropped) * (linear + attention)
    return round(2 * num_tokens * pixels * width + blocks)


def step_flops(model: FLSL, view_tokens: Sequence[int], view_queries: Sequence[int]) -> int:
    """Operations of a step for one image.

    A backward pass costs twice its forward pass (gradients of inputs and of weights), so the
    student counts three times and the teacher once.

    Args:
        model: student and teacher.
        view_tokens: tokens of each view, the teacher's first.
        view_queries: queries of each student view.
    """
    encoder, head = model.student.backbone, model.student.head
    teacher_tokens, *student_tokens = view_tokens
    total = encoder_flops(encoder, teacher_tokens)
    for tokens, queries in zip(student_tokens, view_queries, strict=True):
        total += 3 * encoder_flops(encoder, tokens, training=True)
        shift = 4 * queries * encoder.embed_dim
        total += 3 * shift * tokens + shift * teacher_tokens
    weights = sum(p.numel() for p in head.mlp.parameters() if p.ndim == 2)
    weights += head.last_layer.weight_v.numel()
    return total + (3 + 1) * 2 * weights * sum(view_queries)
