"""Views that are cut independently, with their places and segments, and of native aspect ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flsl_d2.errors import InputError
from pretrain.multi_crop import MultiCropViews, labels_of_tokens
from pretrain.native_views import MAX_ASPECT, NativeViews, native_grid
from pretrain.step_inputs import collate

PLAIN = {
    "jitter_probability": 0.0,
    "grey": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarise": (0.0, 0.0, 0.0),
}


def ramps(height: int = 96, width: int = 120) -> np.ndarray:
    """An image whose red tells the column and whose green tells the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width) * 2
    image[..., 1] = np.arange(height)[:, None] * 2
    return image


def test_places_tell_where_a_view_comes_from():
    """Colours at the centre of every patch are those of the place in the image."""
    cut = MultiCropViews(
        patch_size=8, global_size=32, local_size=16, num_local=3, global_scale=(0.3, 0.9), **PLAIN
    )
    for seed in range(4):
        views = cut(ramps(), np.random.default_rng(seed))
        assert [len(v[0]) for v in views.views] == [32, 32, 16, 16, 16]
        for image, place in zip(views.views, views.regions, strict=True):
            top, left, height, width = place.tolist()
            side = image.shape[-1]
            middle = image[:, side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1]
            red, green = middle[:2].float().mean(dim=(1, 2)).tolist()
            # A grey level for each half pixel, and rounding.
            assert red == pytest.approx((left + width / 2) * 240 - 1, abs=2)
            assert green == pytest.approx((top + height / 2) * 192 - 1, abs=2)
            corner = float(image[0, 0, 0])
            expected = (left + width / side / 2) * 240 - 1
            # The filter is cut off at the edge: half a pixel of the view.
            assert corner == pytest.approx(expected, abs=2 + 120 * abs(width) / side)


def test_views_follow_from_the_generator_and_keep_their_draws_with_other_probabilities():
    settings = {"patch_size": 8, "global_size": 32, "local_size": 16, "num_local": 1}
    first = MultiCropViews(**settings)(ramps(), np.random.default_rng(3))
    again = MultiCropViews(**settings)(ramps(), np.random.default_rng(3))
    plain = MultiCropViews(**settings, **PLAIN)(ramps(), np.random.default_rng(3))
    assert all(map(torch.equal, first.views, again.views))
    assert all(map(np.array_equal, first.regions, plain.regions))


def test_kinds_of_views_have_their_own_augmentation():
    """The first global view, further global ones and local ones, in that order."""
    cut = MultiCropViews(
        patch_size=8, global_size=32, local_size=16, num_global=3, num_local=2, grey=0.0,
        blur=(1.0, 0.0, 0.0), solarise=(0.0, 1.0, 0.0), on_device="augmentation",
    )  # fmt: skip
    for seed in range(5):
        drawn = cut(ramps(), np.random.default_rng(seed)).augmentations
        assert [each.sigma > 0 for each in drawn] == [True, False, False, False, False]
        assert [each.solarise for each in drawn] == [False, True, True, False, False]


def test_segments_are_labelled_alike_in_all_views():
    """The label of a token is that of the image at the token's centre."""
    image = np.zeros((60, 90, 3), np.uint8)
    image[:, 30:60] = 120
    image[:, 60:] = 240
    cut = MultiCropViews(
        patch_size=4, global_size=32, num_local=0, segments="felzenszwalb", segment_size=20, **PLAIN
    )
    for seed in range(3):
        views = cut(image, np.random.default_rng(seed))
        colours: dict[int, set[int]] = {}
        for view, labels in zip(views.views, views.segments, strict=True):
            patches = F.avg_pool2d(view[:1].float(), 4).flatten()
            for colour, label in zip(patches.tolist(), labels.tolist(), strict=True):
                if colour in (0, 120, 240):  # patches within one band
                    colours.setdefault(label, set()).add(int(colour))
        assert all(len(found) == 1 for found in colours.values())


def test_labels_of_tokens_of_a_mirrored_view():
    labels = np.arange(12).reshape(3, 4)
    right = labels_of_tokens(labels, np.array([0, 1, 1, -0.5], np.float32), 2)
    assert right.tolist() == [3, 2, 11, 10]
    cut = MultiCropViews(patch_size=4, global_size=8, flip=1.0, segments="grid", **PLAIN)
    image = np.zeros((40, 60, 3), np.uint8)
    image[..., 0] = np.arange(60) // 6
    image[..., 1] = np.arange(40)[:, None] // 4
    views = cut(image, np.random.default_rng(0))
    for view, labels in zip(views.views, views.segments, strict=True):
        column, row = F.avg_pool2d(view[:2].float(), 4).flatten(1)
        assert (labels % 10 - column).abs().max() <= 1  # cells at a patch's centre and on average
        assert (labels // 10 - row).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_device": "crops"}, "leave at most the augmentation"),
        ({"num_global": 0}, "num_global is 0"),
        ({"global_size": 20}, "global_size is 20"),
        ({"num_local": 1, "local_size": 8}, "local_size is 8"),
        ({"blur": (1.0, 2.0, 0.0)}, "blur is 1.0, 2.0, 0.0"),
        ({"segments": "grabcut"}, "segments is 'grabcut'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        MultiCropViews(**arguments)


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), side=st.integers(1, 20))
def test_native_grids_stay_within_their_budget(height, width, side):
    rows, columns = native_grid(height, width, 8, side**2)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= side**2
    assert max(rows, columns) <= np.ceil(side * MAX_ASPECT**0.5)
    if 1 / MAX_ASPECT <= height / width <= MAX_ASPECT and min(rows, columns) >= 4:
        # Whole patches change the ratio by less than a patch in four on each side.
        assert 0.6 < rows / columns / (height / width) < 1.6


def test_native_views_lie_on_canvases():
    cut = NativeViews(patch_size=8, global_size=64, local_size=32, num_local=1)
    batch = collate([(cut(ramps(48, 120), np.random.default_rng(s)), []) for s in range(3)])
    inputs = batch.to_device(torch.device("cpu"))
    assert [view.shape[-1] for view in inputs.views] == [128, 128, 64]
    for view, grids in zip(inputs.views, inputs.grids, strict=True):
        for image, (rows, columns) in zip(view, grids.tolist(), strict=True):
            assert columns > rows
            assert image[:, 8 * rows :].sum() == image[:, :, 8 * columns :].sum() == 0
            assert image[:, : 8 * rows, : 8 * columns].float().std() > 0
    (first, second, third) = batch.split(3)
    assert [len(part.grids[0]) for part in (first, second, third)] == [1, 1, 1]
    with pytest.raises(InputError, match="global_size is 60"):
        NativeViews(patch_size=8, global_size=60)
