"""Box-aligned k-NN: where its tokens come from, and its votes."""

from __future__ import annotations

import pytest
import torch
from labelled_rectangles import GRID, WIDTH, dataset, run

from flsl_d2.errors import InputError
from flsl_d2.evaluation.knn_box import BoxKnn, cell_tokens


def test_cells_of_a_box_in_a_resized_image() -> None:
    """Centres x 115, 145, 175 and y 60, 100, 140 of 400 x 300 on a grid of 20 x 15 (20 pixels)."""
    found = cell_tokens((100, 40, 190, 160), (300, 400), (15, 20))
    assert found == [20 * row + column for row in (3, 5, 7) for column in (5, 7, 8)]


def test_cell_is_the_nearest_token() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        x0, y0, w, h = (torch.rand(4, generator=generator) * 50).tolist()
        found = cell_tokens((x0, y0, x0 + w, y0 + h), (100, 100), (7, 9))
        for i, token in enumerate(found):
            x, y = x0 + (i % 3 + 0.5) / 3 * w, y0 + (i // 3 + 0.5) / 3 * h
            distances = [
                ((c + 0.5) * 100 / 9 - x) ** 2 + ((r + 0.5) * 100 / 7 - y) ** 2
                for r in range(7)
                for c in range(9)
            ]
            assert distances[token] == pytest.approx(min(distances))


def test_a_box_at_or_beyond_the_border_stays_on_the_grid() -> None:
    assert set(cell_tokens((-50, -50, -10, -10), (100, 100), (4, 4))) == {0}
    assert set(cell_tokens((100, 100, 150, 150), (100, 100), (4, 4))) == {15}


def two_kinds():
    """Images whose largest box is of one class or of the other."""
    first = dataset(3, [((1, 1, 7, 5), 0), ((0, 0, 1, 1), 1)])
    second = dataset(3, [((1, 1, 7, 5), 1), ((0, 0, 1, 1), 0)])
    return first._replace(images=first.images + second.images)


def test_perfect_tokens_name_every_object() -> None:
    assert run(BoxKnn, data=two_kinds(), class_neighbours=(10, 20, 100)) == {
        "k10_top1": 100,
        "k20_top1": 100,
    }


def test_tokens_of_the_other_class_name_none() -> None:
    """Votes come from the bank: when the two sets disagree, every answer is wrong."""
    data = two_kinds()

    def swapped(image):
        category = image.largest_box.category
        swapped.calls += 1
        code = category if swapped.calls <= len(data.images) else 1 - category
        return torch.eye(WIDTH)[code].expand(GRID[0] * GRID[1], -1)

    swapped.calls = 0
    assert run(BoxKnn, swapped, data, class_neighbours=(10,)) == {"k10_top1": 0}


def test_largest_box_leaves_crowds_and_flat_boxes_out() -> None:
    image = dataset(1).images[0]
    image.record["annotations"][0]["iscrowd"] = 1
    image.record["annotations"].append({"bbox": [0, 0, 999, 0], "bbox_mode": 1, "category_id": 0})
    assert image.largest_box.category == 1
    assert image.largest_box.box == (40, 16, 64, 40)


def test_faults_are_sentences() -> None:
    one = dataset()._replace(box_classes=("person",))
    with pytest.raises(InputError, match="telling objects apart"):
        run(BoxKnn, data=one)
    with pytest.raises(InputError, match="36 tokens, too few for k = 50"):
        run(BoxKnn, class_neighbours=(50, 100))
    with pytest.raises(InputError, match="no training image has a box"):
        run(BoxKnn, data=dataset(rectangles=[]))
