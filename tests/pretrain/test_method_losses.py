"""Losses of the methods against slow implementations: nested loops over single numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from tiny_methods import (
    CLOSE,
    VALUES,
    cross_entropy,
    dot,
    outputs_of,
    softmax,
    step,
    tiny_config,
    tiny_method,
    tokens_of,
    unit,
)

from flsl_d2.errors import InputError
from flsl_d2.modeling.positions import sincos_positions
from pretrain.methods.base import global_output
from pretrain.methods.masking import block_masks, random_split
from pretrain.methods.navit import pooled_indexes


def dino_by_loops(method, inputs, student_views=None) -> float:
    student, teacher = [], []
    with torch.no_grad():
        for views, networks, outputs in (
            (student_views or inputs.views, method.student, student),
            (inputs.views[: inputs.num_global], method.teacher, teacher),
        ):
            for tokens in tokens_of(networks.backbone, method, views):
                outputs.append(networks.head(global_output([tokens])).tolist())
    center = method.loss.center.flatten().tolist()
    total, pairs = 0.0, 0
    for t, targets in enumerate(teacher):
        for s, outputs in enumerate(student):
            if s == t:
                continue
            pairs += 1
            for b, row in enumerate(outputs):
                centred = [x - c for x, c in zip(targets[b], center, strict=True)]
                target = softmax(centred, VALUES.teacher_temp)
                total += cross_entropy(target, softmax(row, 0.1)) / len(outputs)
    return total / pairs


def test_dino():
    method = tiny_method("dino")
    inputs = step(method, num_local=2)
    method.loss.center.normal_(generator=torch.Generator().manual_seed(2))
    expected = dino_by_loops(method, inputs)
    losses, monitored = method(inputs, VALUES)
    assert losses["loss"].item() == pytest.approx(expected, **CLOSE)
    assert monitored["assigned"].sum() == 2 * 3


def teacher_and_student_patches(method, inputs, student_tokens):
    """Outputs of the heads for each token of the global views, as lists."""
    images = torch.cat([method.normalised(view) for view in inputs.views[: inputs.num_global]])
    with torch.no_grad():
        teacher = method.teacher.head(method.teacher.backbone.forward_tokens(images))
        return teacher.tolist(), method.student.head(student_tokens).tolist()


def test_ibot(monkeypatch):
    method = tiny_method("ibot")
    inputs = step(method, num_local=1)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(6, 4, 4, generator=generator) < 0.4
    mask[2] = False
    monkeypatch.setattr("pretrain.methods.ibot.block_masks", lambda *_: mask)
    center = method.patch_loss.center.center.normal_(generator=generator).flatten().tolist()
    images = torch.cat([method.normalised(view) for view in inputs.views[:2]])
    with torch.no_grad():
        backbone = method.student.backbone
        patches = backbone.embed(images, "none")
        for b, row, column in mask.nonzero().tolist():
            patches[b, row, column] = method.student.mask_token
        tokens = (patches.flatten(1, 2) + backbone.pos_embed)[:, None]
        for block in backbone.blocks:
            tokens = block(tokens)
        tokens = backbone.final_norm(tokens)[:, 0]
        local = tokens_of(backbone, method, inputs.views[2:])
        globals_ = [tokens[:3], tokens[3:], *local]
        student = [method.student.head(view.mean(dim=1)).tolist() for view in globals_]
    teacher, patch_outputs = teacher_and_student_patches(method, inputs, tokens)
    patch = 0.0
    for b in range(6):
        masked = mask[b].flatten().nonzero()[:, 0].tolist()
        for i in masked:
            centred = [x - c for x, c in zip(teacher[b][i], center, strict=True)]
            target = softmax(centred, VALUES.teacher_temp)
            patch += cross_entropy(target, softmax(patch_outputs[b][i], 0.1)) / len(masked) / 6
    whole = 0.0
    for t, view in enumerate(tokens_of(method.teacher.backbone, method, inputs.views[:2])):
        with torch.no_grad():
            targets = method.teacher.head(view.mean(dim=1)).tolist()
        for s, outputs in enumerate(student):
            for b in range(3 if s != t else 0):
                target = softmax(targets[b], VALUES.teacher_temp)
                whole += cross_entropy(target, softmax(outputs[b], 0.1)) / 3 / 4
    losses, _ = method(inputs, VALUES)
    assert losses["loss_patch"].item() == pytest.approx(patch, **CLOSE)
    assert losses["loss_global"].item() == pytest.approx(whole, **CLOSE)
    assert losses["loss"].item() == pytest.approx(patch + whole, **CLOSE)


def test_block_masks_cover_their_share():
    torch.manual_seed(0)
    masks = block_masks(8, 14, 0.5, 0.1, 0.5)
    covered = masks.flatten(1).float().mean(dim=1)
    assert int((covered > 0).sum()) == 4
    assert covered.max() <= 0.5
    with pytest.raises(InputError, match="less than one"):
        block_masks(8, 2, 0.5, 0.1, 0.5)


@pytest.mark.parametrize("normalised", [True, False])
def test_mae(normalised):
    method = tiny_method("mae", f"model.normalise_pixels={normalised}")
    inputs = step(method, num_global=1)
    torch.manual_seed(5)
    visible, masked = random_split(3, 16, 0.75, torch.device("cpu"))
    assert masked.shape == (3, 12)
    images = method.normalised(inputs.views[0])
    backbone, decoder = method.student.backbone, method.decoder
    expected = 0.0
    with torch.no_grad():
        for b in range(3):
            seen = backbone.embed(images[b : b + 1]).flatten(1, 2)[:, visible[b]]
            for block in backbone.blocks:
                seen = block(seen[:, None])[:, 0]
            seen = decoder.embed(backbone.final_norm(seen))
            full = [method.mask_token] * 16
            for place, token in zip(visible[b].tolist(), seen[0], strict=True):
                full[place] = token
            output = decoder(torch.stack(full)[None] + sincos_positions(8, 4))[0]
            for i in masked[b].tolist():
                row, column = divmod(i, 4)
                pixels = images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                x = pixels.flatten().tolist()
                mean = sum(x) / len(x) if normalised else 0.0
                variance = sum((value - mean) ** 2 for value in x) / (len(x) - 1)
                scale = math.sqrt(variance + 1e-6) if normalised else 1.0
                for y, value in zip(output[i].tolist(), x, strict=True):
                    expected += (y - (value - mean) / scale) ** 2 / (3 * 12 * 48)
    torch.manual_seed(5)
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def test_simclr():
    method = tiny_method("simclr")
    inputs = step(method)
    z = [unit(row) for row in outputs_of(method, inputs).tolist()]
    expected = 0.0
    for i in range(6):
        total = sum(math.exp(dot(z[i], z[k]) / 0.1) for k in range(6) if k != i)
        expected -= math.log(math.exp(dot(z[i], z[(i + 3) % 6]) / 0.1) / total) / 6
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def vicreg_by_loops(x, y, halved_covariance: bool = False) -> float:
    """VICReg's loss of two lists of rows."""
    count, width = len(x), len(x[0])
    invariance = sum(
        (x[b][f] - y[b][f]) ** 2 / (count * width) for b in range(count) for f in range(width)
    )
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        means = [sum(row[f] for row in z) / count for f in range(width)]

        def c(f, g, z=z, means=means):
            return sum((row[f] - means[f]) * (row[g] - means[g]) for row in z) / (count - 1)

        for f in range(width):
            variance += max(0.0, 1 - math.sqrt(c(f, f) + 1e-4)) / width / 2
            covariance += sum(c(f, g) ** 2 for g in range(width) if g != f) / width
    return 25 * invariance + 25 * variance + covariance * (0.5 if halved_covariance else 1.0)


def test_vicreg():
    method = tiny_method("vicreg")
    inputs = step(method)
    outputs = outputs_of(method, inputs).tolist()
    expected = vicreg_by_loops(outputs[:3], outputs[3:])
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def nearest(a, b, distance, count):
    """The ``count`` best pairs (i, j) of rows of a with their nearest rows of b."""
    pairs = []
    for i in range(len(a)):
        j = min(range(len(b)), key=lambda j: distance(i, j))
        pairs.append((distance(i, j), i, j))
    return [(i, j) for _, i, j in sorted(pairs)[:count]]


def vicregl_local(z, places, a, b, by_place: bool) -> float:
    total = 0.0
    for first, second, count in ((a, b, 3), (b, a, 2)):
        matched: list[list] = [[], []]
        where = places if by_place else z
        for image in range(len(z[0])):
            p, q = where[first][image], where[second][image]
            pairs = nearest(p, q, lambda i, j, p=p, q=q: math.dist(p[i], q[j]), count)
            matched[0].append([z[first][image][i] for i, _ in pairs])
            matched[1].append([z[second][image][j] for _, j in pairs])
        for m in range(count):
            x, y = ([rows[m] for rows in side] for side in matched)
            total += 0.5 * vicreg_by_loops(x, y, halved_covariance=True) / count
    return total


def test_vicregl():
    method = tiny_method("vicregl")
    inputs = step(method, num_local=1)
    inputs.places[1][0] *= torch.tensor([1, 1, 1, -1])  # mirrored
    tokens = tokens_of(method.student.backbone, method, inputs.views)
    outputs = outputs_of(method, inputs).tolist()
    whole = [outputs[0:3], outputs[3:6], outputs[6:9]]
    with torch.no_grad():
        z = [method.student.local_head(view).tolist() for view in tokens]
    places = []
    for view, place in zip(tokens, inputs.places, strict=True):
        side = math.isqrt(view.shape[1])
        places.append(
            [
                [
                    (
                        left + (n % side + 0.5) / side * width,
                        top + (n // side + 0.5) / side * height,
                    )
                    for n in range(side**2)
                ]
                for top, left, height, width in place.tolist()
            ]
        )
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)]
    local = sum(
        vicregl_local(z, places, a, b, by_place) / 4 for a, b in pairs for by_place in (0, 1)
    )
    # Invariance over pairs, and the other two terms over views.
    statistics = sum(vicreg_by_loops(view, view, halved_covariance=True) / 3 for view in whole)
    invariance = 0.0
    for a, b in pairs:
        for x, y in zip(whole[a], whole[b], strict=True):
            invariance += 25 * sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / 18 / 4
    expected = 0.75 * (invariance + statistics) + 0.25 * local
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)


def test_densecl():
    method = tiny_method("densecl")
    inputs = step(method)
    inputs.views[1] = inputs.views[0].flip(-1)
    z = tokens_of(method.student.backbone, method, inputs.views[:1])[0]
    y = tokens_of(method.teacher.backbone, method, inputs.views[1:])[0]
    with torch.no_grad():
        q, r = method.student.head(z.mean(dim=1)), method.student.dense_head(z)
        k, s = method.teacher.head(y.mean(dim=1)), method.teacher.dense_head(y)
    queue, dense_queue = method.queue.keys.tolist(), method.dense_queue.keys.tolist()

    def term(query, key, negatives):
        positive = math.exp(dot(unit(query), unit(key)) / 0.2)
        others = sum(math.exp(dot(unit(query), other) / 0.2) for other in negatives)
        return -math.log(positive / (positive + others))

    contrast = sum(term(q[b], k[b], queue) for b in range(3)) / 3
    dense = 0.0
    for b in range(3):
        for i in range(16):
            j = max(range(16), key=lambda j, b=b, i=i: dot(unit(z[b][i]), unit(y[b][j])))
            dense += term(r[b][i], s[b][j], dense_queue) / 48
    losses, _ = method(inputs, VALUES)
    assert losses["loss_global"].item() == pytest.approx(contrast, **CLOSE)
    assert losses["loss_dense"].item() == pytest.approx(dense, **CLOSE)
    assert losses["loss"].item() == pytest.approx((contrast + dense) / 2, **CLOSE)
    # The newest keys took the place of the oldest.
    for row, old in zip(method.queue.keys[3:].tolist(), queue[3:], strict=True):
        assert row == old
    for row, new in zip(method.queue.keys[:3].tolist(), k.tolist(), strict=True):
        # Coordinates of unit vectors in float32, whose steps are at most 6e-8.
        assert row == pytest.approx(unit(new), abs=1e-6)


def test_a_queue_smaller_than_a_batch_is_refused():
    method = tiny_method("densecl", "model.queue_length=3")
    with pytest.raises(InputError, match="queue_length is 3, less than the 4 images"):
        method.check_run(instantiate(tiny_config("densecl").views), 4)


def test_selfpatch():
    method = tiny_method("selfpatch")
    inputs = step(method, num_local=1)
    with torch.no_grad():
        student, teacher, patch = [], [], 0.0
        for views, networks, outputs in (
            (inputs.views, method.student, student),
            (inputs.views[:2], method.teacher, teacher),
        ):
            for view in tokens_of(networks.backbone, method, views):
                outputs.append(networks.head(networks.aggregate(view)).tolist())
        both = zip(
            tokens_of(method.student.backbone, method, inputs.views[:2]),
            tokens_of(method.teacher.backbone, method, inputs.views[:2]),
            strict=True,
        )
        for x, y in both:
            for b in range(3):
                for i in range(16):
                    row, column = divmod(i, 4)
                    around = [
                        (row + dy, column + dx)
                        for dy in (-1, 0, 1)
                        for dx in (-1, 0, 1)
                        if dy or dx
                    ]
                    # Mirrored at the border.
                    inside = [4 * min(abs(r), 6 - r) + min(abs(c), 6 - c) for r, c in around]
                    inside.sort(key=lambda j, b=b, i=i, y=y: -dot(unit(y[b][i]), unit(y[b][j])))
                    near = y[b][inside[:4]][None]
                    target = method.teacher.patch_head(method.teacher.aggregate(near))[0]
                    output = method.student.patch_head(x[b][i])
                    target = softmax(target.tolist(), VALUES.teacher_temp)
                    patch += cross_entropy(target, softmax(output.tolist(), 0.1)) / (2 * 3 * 16)
    whole = 0.0
    for t in range(2):
        for s in range(3):
            for b in range(3 if s != t else 0):
                target = softmax(teacher[t][b], VALUES.teacher_temp)
                whole += cross_entropy(target, softmax(student[s][b], 0.1)) / 3 / 4
    losses, _ = method(inputs, VALUES)
    assert losses["loss_global"].item() == pytest.approx(whole, **CLOSE)
    assert losses["loss_patch"].item() == pytest.approx(patch, **CLOSE)


def test_droppos():
    method = tiny_method("droppos")
    inputs = step(method, num_global=1)
    torch.manual_seed(5)
    visible, _ = random_split(3, 16, 0.5, torch.device("cpu"))
    _, dropped = random_split(3, 8, 0.5, torch.device("cpu"))
    images, backbone = method.normalised(inputs.views[0]), method.student.backbone
    sigma = 1 - VALUES.progress
    assert 0 < sigma < 1
    expected = total = 0.0
    with torch.no_grad():
        patches = backbone.embed(images, "none").flatten(1, 2)
        whole = backbone.forward_tokens(images)
        for b in range(3):
            places = visible[b].tolist()
            tokens = []
            for m, place in enumerate(places):
                position = backbone.pos_embed[0, place]
                if m in dropped[b].tolist():
                    position = method.dropped_position
                tokens.append(patches[b, place] + position)
            z = torch.stack(tokens)[None]
            for block in backbone.blocks:
                z = block(z[:, None])[:, 0]
            z = backbone.final_norm(z)
            outputs = method.decoder(method.decoder.embed(z))[0].tolist()
            mean = unit(whole[b].mean(dim=0).tolist())
            weights = softmax([dot(mean, unit(whole[b][place].tolist())) for place in places], 0.1)
            for i in dropped[b].tolist():
                row, column = divmod(places[i], 4)
                near = [
                    math.exp(-((row - n // 4) ** 2 + (column - n % 4) ** 2) / sigma**2)
                    for n in range(16)
                ]
                target = [each / sum(near) for each in near]
                expected += weights[i] * cross_entropy(target, softmax(outputs[i]))
                total += weights[i]
    torch.manual_seed(5)
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected / total, **CLOSE)


def test_positions_and_views_of_other_sizes_are_refused():
    method = tiny_method("droppos", "model.backbone.img_size=32")
    with pytest.raises(InputError, match="global_size is 16, 16 tokens, and DropPos"):
        method.check_run(instantiate(tiny_config("droppos").views), 4)


def test_moco_v3():
    method = tiny_method("moco_v3")
    inputs = step(method)
    with torch.no_grad():
        q = method.predictor(outputs_of(method, inputs)).tolist()
        tokens = tokens_of(method.teacher.backbone, method, inputs.views)
        k = method.teacher.head(global_output(tokens)).tolist()
    q, k = ([unit(row) for row in rows] for rows in (q, k))
    expected = 0.0
    for a, b in ((0, 3), (3, 0)):
        for i in range(3):
            powers = [math.exp(dot(q[a + i], k[b + j]) / 0.2) for j in range(3)]
            expected -= 2 * 0.2 * math.log(powers[i] / sum(powers)) / 3
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, **CLOSE)
    assert not any(p.requires_grad for p in method.student.backbone.patch_embed.parameters())


def test_swav():
    method = tiny_method("swav")
    inputs = step(method, num_local=1)
    prototypes = [unit(row) for row in method.prototypes.weight.tolist()]
    outputs = [unit(row) for row in outputs_of(method, inputs).tolist()]
    cosines = [[dot(row, prototype) for prototype in prototypes] for row in outputs]
    z = [cosines[0:3], cosines[3:6], cosines[6:9]]
    expected = 0.0
    for v in range(2):
        q = [[math.exp(x / 0.05) for x in row] for row in z[v]]
        for _ in range(3):
            shares = [sum(row[k] for row in q) for k in range(7)]
            q = [[x / share / 7 for x, share in zip(row, shares, strict=True)] for row in q]
            q = [[x / sum(row) / 3 for x in row] for row in q]
        for s in range(3):
            for b in range(3 if s != v else 0):
                target = [3 * x for x in q[b]]
                expected += cross_entropy(target, softmax(z[s][b], 0.1)) / (2 * 2 * 3)
    losses, monitored = method(inputs, VALUES)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-4)  # powers of up to exp(20)
    assert monitored["assigned"].sum() == 6


def test_detcon():
    method = tiny_method("detcon")
    inputs = step(method)
    generator = torch.Generator().manual_seed(4)
    inputs.segments = [torch.randint(3, (3, 16), generator=generator) for _ in range(2)]
    torch.manual_seed(5)
    m = [labels.gather(1, torch.randint(16, (3, 3))).tolist() for labels in inputs.segments]
    rows = {}
    for name in ("student", "teacher"):
        networks = getattr(method, name)
        means = []
        for v, tokens in enumerate(tokens_of(networks.backbone, method, inputs.views)):
            for b in range(3):
                for label in m[v][b]:
                    inside = [n for n in range(16) if inputs.segments[v][b][n] == label]
                    means.append(tokens[b][inside].mean(dim=0))
        with torch.no_grad():
            outputs = networks.head(torch.stack(means))
            if name == "student":
                outputs = method.predictor(outputs)
        rows[name] = [unit(row) for row in outputs.tolist()]
    q, k = rows["student"], rows["teacher"]

    def at(v, b, i):
        return 9 * v + 3 * b + i

    expected = 0.0
    for a, other in ((0, 1), (1, 0)):
        for b in range(3):
            for i in range(3):
                label, total = m[a][b][i], 0.0
                for c in range(3):
                    for j in range(3):
                        total += math.exp(dot(q[at(a, b, i)], k[at(other, c, j)]) / 0.1)
                        if not (c == b and m[a][b][j] == label):
                            total += math.exp(dot(q[at(a, b, i)], k[at(a, c, j)]) / 0.1)
                pairs = [j for j in range(3) if m[other][b][j] == label]
                for j in pairs:
                    power = math.exp(dot(q[at(a, b, i)], k[at(other, b, j)]) / 0.1)
                    term = -math.log(power / total) / len(pairs)
                    expected += term / m[a][b].count(label) / 9
    torch.manual_seed(5)
    # Logits of up to 10, in float32.
    assert method(inputs, VALUES)[0]["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_segments_that_are_missing_are_refused():
    method = tiny_method("detcon")
    with pytest.raises(InputError, match=r"views\.segments is 'none'"):
        method.check_run(instantiate(tiny_config("dino").views), 4)


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
    with pytest.raises(InputError, match="query crops have the size of a patch"):
        method.check_run(instantiate(tiny_config("dino").views), 4)


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
            student.logits(modes),
            teacher.logits(cross_modes),
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


def test_a_packed_budget_below_one_view_is_refused():
    method = tiny_method("navit", "model.pack_tokens=15")
    with pytest.raises(InputError, match="pack_tokens is 15, less than the 16 tokens"):
        method.check_run(instantiate(tiny_config("navit").views), 4)
