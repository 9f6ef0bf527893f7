"""Losses of methods without public code against nested loops over single numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_methods import (
    CLOSE,
    VALUES,
    cross_entropy,
    dot,
    softmax,
    step,
    tiny_method,
)

from pretrain.methods.navit import pooled_indexes


def attended(block, x: torch.Tensor, readers: list[list[int]]) -> torch.Tensor:
    """A block whose token n reads the tokens ``readers[n]``, head by head; x (n, D)."""
    width = x.shape[1] // block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).unflatten(1, (3, block.attn.num_heads, width))
    rows = []
    for n, readable in enumerate(readers):
        heads = []
        for h in range(block.attn.num_heads):
            keys = qkv[readable, 1, h]
            weights = softmax((keys @ qkv[n, 0, h] / math.sqrt(width)).tolist())
            heads.append(torch.tensor(weights) @ qkv[readable, 2, h])
        rows.append(torch.cat(heads))
    x = x + block.attn.proj(torch.stack(rows))
    return x + block.mlp(block.norm2(x))


def test_adclr():
    method = tiny_method("adclr")
    inputs = step(method, num_global=2, num_local=0)
    generator = torch.Generator().manual_seed(4)
    crops = [torch.rand(3, 3, 4, 4, generator=generator) * 255 for _ in range(2)]
    inputs.views += crops
    center = method.query_loss.center.normal_(generator=generator).flatten().tolist()
    outputs: dict[str, list] = {}
    readers = [list(range(16))] * 16 + [[*range(16), n] for n in (16, 17)]
    with torch.no_grad():
        for name in ("student", "teacher"):
            networks = getattr(method, name)
            backbone, outputs[name] = networks.backbone, []
            small = [backbone.embed(method.normalised(crop), "none")[:, 0, 0] for crop in crops]
            for view in inputs.views[:2]:
                patches = backbone.embed(method.normalised(view)).flatten(1, 2)
                of_view = []
                for b in range(3):
                    x = torch.stack([*patches[b], small[0][b], small[1][b]])
                    for block in backbone.blocks:
                        x = attended(block, x, readers)
                    x = backbone.final_norm(x)
                    of_view.append(networks.head(torch.stack([x[:16].mean(dim=0), *x[16:]])))
                outputs[name].append([rows.tolist() for rows in of_view])
    whole, query = 0.0, 0.0
    for a, v in ((0, 1), (1, 0)):
        for b in range(3):
            t, s = outputs["teacher"][a][b], outputs["student"][v][b]
            whole += cross_entropy(softmax(t[0], VALUES.teacher_temp), softmax(s[0], 0.1)) / 6
            for i in (1, 2):
                centred = [x - c for x, c in zip(t[i], center, strict=True)]
                target = softmax(centred, VALUES.teacher_temp)
                query += cross_entropy(target, softmax(s[i], 0.1)) / 12
    losses, _ = method(inputs, VALUES)
    assert losses["loss_global"].item() == pytest.approx(whole, **CLOSE)
    assert losses["loss_query"].item() == pytest.approx(query, **CLOSE)
    assert losses["loss"].item() == pytest.approx(whole + 0.5 * query, **CLOSE)


def test_navit():
    """Images are encoded one by one here, and attention is written out."""
    method = tiny_method("navit", "model.pack_tokens=20")
    inputs = step(method, num_global=2, num_local=1)
    inputs.grids = [
        np.array([[4, 4], [2, 4], [4, 3]]),
        np.array([[3, 4], [4, 4], [1, 4]]),
        np.array([[2, 2], [1, 2], [2, 2]]),
    ]
    np.random.seed(7)
    rng = np.random.default_rng(np.random.randint(2**31))
    student, teacher = method.student, method.teacher
    rows: list[list[torch.Tensor]] = [[], [], []]
    with torch.no_grad():

        def tokens_of_image(networks, view: int, image: int) -> torch.Tensor:
            height, width = 4 * inputs.grids[view][image]
            pixels = method.normalised(inputs.views[view])[image, :, :height, :width]
            return networks.backbone.forward_tokens(pixels[None])[0]

        for view, window in ((1, 3), (2, 2)):
            for image in range(3):
                z = tokens_of_image(student, view, image)
                keys = tokens_of_image(teacher, 0, image)
                for i in pooled_indexes(rng, inputs.grids[view][image], window).tolist():
                    rows[0].append(z[i])
                    for out, tokens, s in (
                        (rows[1], z, VALUES.self_scale),
                        (rows[2], keys, VALUES.cross_scale),
                    ):
                        weights = softmax([s / 4 * dot(z[i], token) for token in tokens])
                        out.append(sum(w * t for w, t in zip(weights, tokens, strict=True)))
        points, modes, cross_modes = map(torch.stack, rows)
        expected, _ = method.loss(
            points,
            modes,
            student.head(modes),
            teacher.head(cross_modes),
            intra_weight=VALUES.intra_weight,
            teacher_temp=VALUES.teacher_temp,
        )
    np.random.seed(7)
    losses, _ = method(inputs, VALUES)
    for name, value in expected.items():
        # The modes are summed in another order in float32, and a temperature magnifies it.
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("grid", [(5, 7), (1, 4), (2, 2), (9, 3)])
def test_pooled_indexes_have_one_token_of_each_window(grid):
    for seed in range(10):
        found = pooled_indexes(np.random.default_rng(seed), np.array(grid), 3).tolist()
        high, wide = min(3, grid[0]), min(3, grid[1])
        assert len(found) == len(set(found)) == (grid[0] // high) * (grid[1] // wide)
        assert all(0 <= i < grid[0] * grid[1] for i in found)
        # With the strip on one side or the other, no two tokens lie in one window.
        corners = [(top, left) for top in (0, grid[0] % high) for left in (0, grid[1] % wide)]
        assert any(
            len({((i // grid[1] - y) // high, (i % grid[1] - x) // wide) for i in found})
            == len(found)
            for y, x in corners
        )
