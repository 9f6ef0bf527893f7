"""Views: geometry, determinism, pooling, and closeness to the reference operators."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from flsl_d2.errors import InputError
from flsl_d2.images.reader import ImageFile
from pretrain import augmentation
from pretrain import views as module
from pretrain.augmentation import apply_augmentation, draw_augmentation
from pretrain.views import NestedViews, crop_box, pooled_queries, resized_crop


def picture(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    """Make a smooth random picture, like the low frequencies of a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple),
    st.integers(0, 2**32 - 1),
)
def test_crop_box_lies_inside(height, width, scale, seed):
    top, left, h, w = crop_box(np.random.default_rng(seed), height, width, scale)
    assert h >= 1
    assert w >= 1
    assert top >= 0
    assert left >= 0
    assert top + h <= height
    assert left + w <= width


def test_crop_box_has_the_distribution_of_torchvision():
    torch.manual_seed(0)
    image, scale = torch.empty(3, 300, 400), (0.05, 0.4)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    rng = np.random.default_rng(0)
    ours = np.array([crop_box(rng, 300, 400, scale) for _ in range(4000)])
    for column in range(4):
        for q in (0.1, 0.5, 0.9):
            a, b = np.quantile(ours[:, column], q), np.quantile(theirs[:, column], q)
            assert abs(a - b) < 12, f"column {column}, quantile {q}: {a} against {b}"


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 30), st.data(), st.booleans(), st.integers(0, 2**32 - 1))
def test_one_query_a_window(grid, data, random, seed):
    window = data.draw(st.integers(1, grid))
    mask = pooled_queries(np.random.default_rng(seed), grid, window, random).reshape(grid, grid)
    count = grid // window
    assert mask.sum() == count * count
    # Some placement of the windows must hold exactly one query each.
    rest = grid - count * window
    fits = []
    for top in {0, rest}:
        for left in {0, rest}:
            inner = mask[top : top + count * window, left : left + count * window]
            blocks = inner.reshape(count, window, count, window).sum((1, 3))
            fits.append((blocks == 1).all())
    assert any(fits)


def test_fixed_pooling_takes_the_first_token():
    masks = {
        pooled_queries(np.random.default_rng(s), 6, 2, random=False).tobytes() for s in range(20)
    }
    assert len(masks) == 1
    mask = np.frombuffer(masks.pop(), dtype=bool).reshape(6, 6)
    assert mask[::2, ::2].all()


def test_leftover_strip_changes_sides():
    corners = set()
    for seed in range(50):
        mask = pooled_queries(np.random.default_rng(seed), 14, 3, random=False).reshape(14, 14)
        corners.add(tuple(np.argwhere(mask)[0]))
    assert corners == {(0, 0), (0, 2), (2, 0), (2, 2)}


def test_views_depend_on_the_generator_alone():
    views = NestedViews(patch_size=8, global_size=64, local_size=32)
    a, b, c = (views(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    for x, y in zip(a.views + a.queries, b.views + b.queries, strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.views[0], c.views[0])
    assert [tuple(v.shape) for v in a.views] == [
        (3, 64, 64),
        (3, 64, 64),
        (3, 32, 32),
        (3, 32, 32),
    ]
    assert [len(q) for q in a.queries] == [4, 4, 4]
    assert all(v.dtype == torch.uint8 for v in a.views)


def test_student_crops_are_cut_from_the_teachers_view(monkeypatch):
    """One spot is bright. It is in a student's view only where it is in the teacher's."""
    monkeypatch.setattr(module, "apply_augmentation", lambda image, _: image)
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    image[:6] = 255  # a strip at the top, cut off by most of the teacher's crops
    views = NestedViews(patch_size=8, global_size=64, local_size=32, teacher_scale=(0.6, 0.7))
    without = 0
    for seed in range(40):
        teacher, *students = views(image, np.random.default_rng(seed)).views
        if teacher.max() == 0:
            without += 1
            assert all(student.max() == 0 for student in students)
    assert 5 < without < 40


@pytest.mark.parametrize("size", [32, 64, 96, 160])
def test_resampling_is_close_to_pillow(size):
    image, box = picture(), (5, 10, 80, 100)
    theirs = Image.fromarray(image).crop((10, 5, 110, 85)).resize((size, size), Image.BICUBIC)
    difference = np.abs(resized_crop(image, box, size).astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 3
    assert difference.mean() < 0.6


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.0, 1.3])
def test_jitter_is_close_to_pillow(factor):
    image = picture()
    pil = Image.fromarray(image)
    for ours, theirs in (
        (augmentation._brightness(image, factor), ImageEnhance.Brightness(pil).enhance(factor)),
        (augmentation._contrast(image, factor), ImageEnhance.Contrast(pil).enhance(factor)),
        (augmentation._saturation(image, factor), ImageEnhance.Color(pil).enhance(factor)),
    ):
        assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 2
    hue = np.abs(
        augmentation._hue(image, factor - 0.95).astype(int)
        - np.asarray(tvf.adjust_hue(pil, factor - 0.95)).astype(int)
    )
    assert hue.mean() < 3


def test_augmentation_happens_as_often_as_stated():
    """Greyscale shows in the result, so its rate can be counted: p 0.2."""
    grey = 0
    for seed in range(1500):
        drawn = draw_augmentation(np.random.default_rng(seed))
        image = apply_augmentation(picture(16, 16, seed), drawn)
        grey += bool((np.ptp(image, axis=2) == 0).all())
    assert 0.16 < grey / 1500 < 0.24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 225}, "global_size is 225"),
        ({"local_size": 100}, "local_size is 100"),
        ({"global_window": 15}, "15 tokens"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        NestedViews(**arguments)


def jpeg(folder: Path, height: int, width: int, orientation: int = 1) -> ImageFile:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{height}x{width}-{orientation}.jpg"
    Image.fromarray(picture(height, width)).save(path, quality=95, exif=exif)
    return ImageFile(str(path))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("height", "width"), [(301, 407), (170, 170), (90, 600), (1200, 900)])
def test_reduced_decoding_shows_the_same(tmp_path, height, width, orientation):
    file = jpeg(tmp_path, height, width, orientation)
    for seed in range(10):
        full, reduced = (
            NestedViews(8, 64, 32, on_device="crops", reduced_decoding=switch)(
                file, np.random.default_rng(seed)
            )
            for switch in (False, True)
        )
        assert all(map(np.array_equal, full.regions, reduced.regions))
        assert full.augmentations == reduced.augmentations
        assert all(map(torch.equal, full.queries, reduced.queries))
        difference = (full.views[0].int() - reduced.views[0].int()).abs()
        # Corners shift by half a reduced pixel at most: 2 of the file, at 7 levels a pixel.
        assert difference.float().mean() < 10


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_pixels_are_means_of_blocks(tmp_path, reduction):
    file = jpeg(tmp_path, 304, 408)
    size = (408 // reduction, 304 // reduction)
    means = cv2.resize(file.pixels(), size, interpolation=cv2.INTER_AREA)
    difference = np.abs(file.pixels(reduction).astype(int) - means.astype(int))
    assert difference.mean() < 1


def test_only_what_stays_large_enough_is_reduced(tmp_path, monkeypatch):
    file, taken = jpeg(tmp_path, 300, 300), []
    decode = ImageFile.pixels
    monkeypatch.setattr(
        ImageFile, "pixels", lambda self, n=1: (taken.append(n), decode(self, n))[1]
    )
    for size in (32, 64, 128, 256):
        views = NestedViews(8, size, 16, teacher_scale=(1, 1), reduced_decoding=True)
        views(file, np.random.default_rng(0))
    NestedViews(8, 32, 16)(file, np.random.default_rng(0))
    assert taken == [8, 4, 2, 1, 1]
