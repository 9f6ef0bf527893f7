"""Cluster quality on tokens that know the instances, or nothing."""

from __future__ import annotations

import pytest
import torch
from labelled_rectangles import GRID, WIDTH, dataset, run

from flsl_d2.errors import InputError
from flsl_d2.evaluation.cluster_quality import ClusterQuality, attention_rows
from flsl_d2.evaluation.measures import measure_features
from flsl_d2.evaluation.samples import global_attention
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.attention import Attention


def test_tokens_of_their_instance_reach_the_limit_of_the_patches() -> None:
    scores = run(ClusterQuality)
    assert scores["clusters"] == 3
    for score in ("ari", "ari_foreground", "boundary_f"):
        limit = scores[f"{score}_token_limit"]
        assert limit > 90
        for way in ("mean_shift", "k_means", "k_means_tuned"):
            assert scores[f"{score}_{way}"] == pytest.approx(limit)
    assert scores["tuned_clusters"] == 3


def test_without_corners_they_are_perfect() -> None:
    scores = run(ClusterQuality, data=dataset(rectangles=[((2, 0, 4, 6), 0), ((6, 0, 8, 6), 0)]))
    for score in ("ari", "ari_foreground", "boundary_f"):
        assert scores[f"{score}_mean_shift"] == 100


def test_tokens_that_are_all_the_same_are_one_cluster() -> None:
    scores = run(ClusterQuality, lambda image: 0.3 * torch.ones(GRID[0] * GRID[1], WIDTH))
    assert scores["clusters"] == 1
    for way in ("mean_shift", "k_means", "attention"):
        assert scores[f"ari_{way}"] == 0
        assert scores[f"ari_foreground_{way}"] == 0
        assert scores[f"boundary_f_{way}"] == 0


def test_norm_and_offset_of_the_tokens_do_not_matter() -> None:
    torch.manual_seed(2)
    noise = torch.randn(GRID[0] * GRID[1], WIDTH)
    offset = torch.randn(WIDTH)
    torch.manual_seed(0)
    first = run(ClusterQuality, lambda image: noise)
    torch.manual_seed(0)
    second = run(ClusterQuality, lambda image: 40 * (noise + offset))
    assert first == pytest.approx(second)


def test_crowds_do_not_count() -> None:
    data = dataset(rectangles=[((2, 0, 4, 6), 0), ((6, 0, 8, 6), 0), ((0, 0, 1, 6), 1)])
    for image in data.images:
        image.record["annotations"][2]["iscrowd"] = 1

    def blind_to_the_crowd(image):
        columns = torch.arange(GRID[1]).repeat(GRID[0])
        group = torch.where((columns == 2) | (columns == 3), 1, 0)
        group = torch.where(columns >= 6, 2, group)
        return torch.eye(WIDTH)[group]

    assert run(ClusterQuality, blind_to_the_crowd, data)["ari_mean_shift"] == 100


def test_images_without_masks_are_a_sentence() -> None:
    with pytest.raises(InputError, match="has a mask"):
        run(ClusterQuality, lambda image: torch.randn(48, WIDTH), dataset(rectangles=[]))
    data = dataset()
    del data.images[0].record["annotations"][0]["segmentation"]
    with pytest.raises(InputError, match="without masks"):
        run(ClusterQuality, lambda image: torch.randn(48, WIDTH), data)


@pytest.mark.parametrize("rel_pos", [None, 6])
def test_attention_rows_are_those_of_the_block(rel_pos: int | None) -> None:
    """Weighing the values with them, head by head, is only possible with a single head."""
    attention = Attention(16, 1, rel_pos_size=rel_pos)
    if rel_pos:
        torch.nn.init.normal_(attention.rel_pos_h)
        torch.nn.init.normal_(attention.rel_pos_w)
    tokens = torch.randn(1, *GRID, 16)
    with torch.no_grad():
        rows = attention_rows(attention, tokens, GRID[0] * GRID[1])
        values = attention.qkv(tokens).flatten(1, 2)[0, :, 32:]
        expected = attention(tokens).flatten(1, 2)[0]
        # Rounding of float32 in sums over a grid of tokens.
        assert torch.allclose(attention.proj(rows @ values), expected, atol=1e-5)
    assert torch.allclose(rows.sum(dim=1), torch.ones(len(rows)), atol=1e-5)


def test_raw_attention_is_left_out_where_the_last_block_has_no_global_attention() -> None:
    tiny = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    assert global_attention(FLSLViT(**tiny)) is not None
    assert global_attention(FLSLViT(**tiny, window_size=3, global_block_indexes=[0])) is None
    without = run(ClusterQuality, with_attention=False)
    everything = {k: v for k, v in run(ClusterQuality).items() if not k.endswith("_attention")}
    assert everything == without


def test_an_encoder_with_prefix_tokens(datasets_root) -> None:
    encoder = FLSLViT(img_size=48, embed_dim=32, depth=1, num_heads=2, num_prefix_tokens=2)
    scores = measure_features(
        encoder,
        *("pennfudan_train", "pennfudan_val", ["cluster_quality"]),
        **{"max_images": 2, "short_side": 64, "kernel_widths": (8.0,), "cluster_counts": (3,)},
    )
    assert "cluster_quality/ari_attention" in scores
