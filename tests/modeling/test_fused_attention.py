"""Attention goes through fused kernels everywhere, on CPUs and, by the rules for GPUs, there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flsl_d2.mean_shift import mean_shift
from flsl_d2.modeling import FLSLViT

FEW = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
WINDOWS = {"window_size": 3, "global_block_indexes": [1], "mask_window_padding": True}


@pytest.fixture
def shapes(monkeypatch):
    """Of queries, keys and values of every attention; those that are not fused are an error."""
    seen, original = [], F.scaled_dot_product_attention

    def recording(q, k, v, *args, **kwargs):
        seen.append((q.shape, k.shape, v.shape))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield seen


def fits_gpus(shapes) -> bool:
    """Check what fused attention on GPUs asks for; otherwise the attention matrix is stored.

    Four dimensions, and for half precision channels in multiples of 8 (``sdp_utils.cpp``).
    """
    return all(len(shape) == 4 and shape[-1] % 8 == 0 for each in shapes for shape in each)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"num_prefix_tokens": 5}, (64, 64)),
        ({"use_rel_pos": True}, (64, 64)),
        ({"use_rel_pos": True}, (56, 88)),
        ({"use_rel_pos": True, **WINDOWS}, (56, 72)),
        (WINDOWS, (56, 72)),
    ],
)
def test_in_every_kind_of_block(options, size, shapes):
    encoder = FLSLViT(**FEW, **options)
    encoder(torch.randn(2, 3, *size))["last_feat"].sum().backward()
    assert len(shapes) == 2
    assert fits_gpus(shapes)


def test_in_packed_views(shapes):
    FLSLViT(**FEW).forward_packed([torch.randn(2, 3, 64, 64), torch.randn(4, 3, 32, 32)])
    assert len(shapes) == 4
    assert fits_gpus(shapes)


def test_in_mean_shift(shapes):
    tokens = torch.randn(2, 16, 24, requires_grad=True)
    mean_shift(tokens[:, :4], tokens, 0.1, num_iterations=3).sum().backward()
    assert len(shapes) == 3
    assert fits_gpus(shapes)
