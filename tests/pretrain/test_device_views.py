"""Batched crops and augmentation against the CPU's, Pillow's and torchvision's, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tvf

from pretrain.augmentation import (
    Augmentation,
    apply_augmentation,
    draw_augmentation,
    stack_augmentations,
)
from pretrain.data import PretrainDataset, build_pretrain_loader
from pretrain.device_views import augment_batch, crop_batch
from pretrain.views import NestedViews, resized_crop

NONE = Augmentation((), (1.0, 1.0, 1.0, 0.0), False, 0.0, False)


def pictures(count: int, side: int = 96, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 9, 9, 3), dtype=np.uint8)
    return np.stack(
        [np.array(Image.fromarray(c).resize((side, side), Image.BICUBIC)) for c in coarse]
    )


def as_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def as_images(batch: torch.Tensor) -> np.ndarray:
    return batch.permute(0, 2, 3, 1).numpy()


def one(image: np.ndarray, **changes) -> np.ndarray:
    batch = stack_augmentations([NONE._replace(**changes)])
    return as_images(augment_batch(as_batch(image[None]), batch))[0]


def resampling_weights(pixels: int, size: int) -> np.ndarray:
    """Compute the weights (size, pixels) of bicubic antialiased resampling, one by one."""
    scale = pixels / size
    weights = np.zeros((size, pixels))
    for place in range(size):
        for pixel in range(pixels):
            x = abs((pixel + 0.5) - (place + 0.5) * scale) / max(scale, 1)
            if x < 1:  # Keys' cubic kernel, a = -0.5
                weights[place, pixel] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                weights[place, pixel] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return weights / weights.sum(axis=1, keepdims=True)


def exact_crop(
    image: np.ndarray, box: tuple[int, int, int, int], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a box in float64; return it with the most by which 8-bit arithmetic may differ.

    The CPU resamples rows first, rounds and clips them to 8 bits, then does the same with columns.
    Its weights are fixed-point numbers of 16 bits and at least 14 binary places: half a unit in the
    last place of each, times 255, times 4 weights a pixel (where more pixels are averaged, the
    weights are smaller and get as many more places), is below 0.04 grey levels. So each value
    between the passes is off by up to 0.5 + 0.04 and by what clipping takes off. The columns'
    weights, negative ones by their size, add these up; rounding again adds 0.5 + 0.04.
    """
    top, left, height, width = box
    crop = image[top : top + height, left : left + width].astype(float).transpose(2, 0, 1)
    rows, columns = resampling_weights(height, size), resampling_weights(width, size)
    between = crop @ columns.T
    clipped = np.abs(between - between.clip(0, 255))
    bound = np.abs(rows) @ (clipped + 0.54) + 0.54
    exact = (rows @ between).clip(0, 255)
    return exact.transpose(1, 2, 0), bound.transpose(1, 2, 0)


@settings(max_examples=60)
@given(st.data(), st.sampled_from([16, 48, 96]), st.integers(0, 1000))
def test_crops_equal_the_cpus(data, size, seed):
    side = 96
    top, left = (data.draw(st.integers(0, side - 4)) for _ in range(2))
    box = (
        top,
        left,
        data.draw(st.integers(3, side - top)),
        data.draw(st.integers(3, side - left)),
    )
    image = pictures(1, side, seed)
    ours = as_images(crop_batch(as_batch(image), np.array([box]) / side, size))[0]
    exact, bound = exact_crop(image[0], box, size)
    # float32: sums of up to 2 x 96 products of up to 255 are exact to 255 x 192 x 6e-8 = 0.003, and
    # a pixel at the end of the kernel may be in or out, where the kernel is below 1e-5.
    assert np.abs(ours - exact).max() <= 0.01
    theirs = resized_crop(image[0], box, size).astype(float)
    assert (np.abs(exact - theirs) <= bound).all()


def test_every_image_gets_its_own_box():
    images = pictures(3)
    boxes = np.array([[0, 0, 96, 96], [10, 20, 30, 40], [50, 3, 46, 20]]) / 96
    together = crop_batch(as_batch(images), boxes, 32)
    for i in range(3):
        alone = crop_batch(as_batch(images[i : i + 1]), boxes[i : i + 1], 32)
        torch.testing.assert_close(together[i], alone[0])


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.0, 1.4])
def test_jitters_equal_torchvisions(factor):
    image = pictures(1)[0]
    pixels = as_batch(image[None])[0].float() / 255
    factors = (factor, factor, factor, 0.1 * (factor - 1))
    for index, theirs in enumerate(
        (
            tvf.adjust_brightness(pixels, factor),
            tvf.adjust_contrast(pixels, factor),
            tvf.adjust_saturation(pixels, factor),
            tvf.adjust_hue(pixels, factors[3]),
        )
    ):
        ours = one(image, order=(index,) * 1 + (-1,) * 3, factors=factors)
        difference = np.abs(ours - as_images(theirs[None] * 255)[0])
        # torchvision's grey rounds its weights to four digits.
        assert difference.max() < 0.1, f"jitter {index}"


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_opencvs(sigma):
    image = pictures(1)[0]
    theirs = apply_augmentation(image, NONE._replace(sigma=sigma)).astype(float)
    assert np.abs(one(image, sigma=sigma) - theirs).max() <= 1.0


def test_grey_and_solarise():
    image = pictures(1)[0]
    grey = one(image, grey=True)
    assert np.ptp(grey, axis=2).max() == 0
    expected = image @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - expected).max() < 1e-3
    inverted = one(image, solarise=True)
    assert np.array_equal(inverted, np.where(image >= 128, 255 - image, image).astype(float))


def test_a_batch_equals_the_cpu_image_by_image():
    """The same draws, all operations in their drawn order."""
    images = pictures(64)
    drawn = [draw_augmentation(np.random.default_rng(seed)) for seed in range(64)]
    before = as_batch(images).clone()
    ours = as_images(augment_batch(as_batch(images), stack_augmentations(drawn)))
    assert torch.equal(before, as_batch(images)), "the batch it was given has changed"
    for i, augmentation in enumerate(drawn):
        theirs = apply_augmentation(images[i], augmentation).astype(float)
        if augmentation.solarise:  # a level of difference at the threshold becomes its whole height
            continue
        difference = np.abs(ours[i] - theirs)
        # The CPU rounds to whole levels after each operation. A step of its hue is 6 levels in one
        # channel; hue and shift are rounded, 3 levels each at most, times 1.4 (brightness), 1.4
        # (contrast) and 1.2 (saturation): 14, and the other roundings make it less than 20. On
        # average a rounding is off by a quarter of its step, the hue's in one channel of three:
        # 2 * 1.5 / 3, and 0.5 for the others.
        assert difference.mean() < 1.5, augmentation
        assert difference.max() < 20, augmentation
    assert ours.min() >= 0
    assert ours.max() <= 255.001


def test_no_augmentation_changes_nothing():
    images = pictures(2)
    ours = augment_batch(as_batch(images), stack_augmentations([NONE, NONE]))
    assert torch.equal(ours, as_batch(images).float())


@pytest.mark.parametrize("on_device", ["augmentation", "crops"])
def test_the_device_makes_the_views_of_the_cpu(on_device, tmp_path):
    """From files to views: the same draws, the same queries, the same pictures up to rounding."""
    files = []
    for i, image in enumerate(pictures(6, side=120)):
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(image).save(files[-1])
    sizes = {"patch_size": 8, "global_size": 64, "local_size": 32, "flip": 0.5}
    batches = {
        where: next(
            iter(
                build_pretrain_loader(
                    PretrainDataset(files, NestedViews(on_device=where, keep_crops=True, **sizes)),
                    total_batch_size=6,
                    num_workers=0,
                )
            )
        )
        for where in ("nothing", on_device)
    }
    on_cpu, finished = (
        batches[where].to_device(torch.device("cpu")) for where in ("nothing", on_device)
    )
    assert torch.equal(finished.crops[0], on_cpu.crops[0])
    regions = batches[on_device].regions
    crops = zip(finished.crops[1:], on_cpu.crops[1:], strict=True)
    for view, (ours, theirs) in enumerate(crops):
        if on_device == "augmentation":
            assert torch.equal(ours, theirs)
            continue
        for i, teacher in enumerate(as_images(on_cpu.crops[0])):
            top, left, height, width = (64 * regions[view][i]).round().astype(int).tolist()
            box = (top, min(left, left + width), height, abs(width))
            _, bound = exact_crop(teacher, box, ours.shape[-1])
            bound = bound[:, ::-1] if width < 0 else bound
            difference = as_images((ours - theirs.float()).abs())[i]
            assert (difference <= bound + 0.01).all()  # 0.01 as for the crops above
    solarised = batches[on_device].augmentations
    for view, (ours, theirs) in enumerate(zip(finished.views, on_cpu.views, strict=True)):
        kept = ~solarised[view].solarise
        assert (ours.float() - theirs)[kept].abs().mean() < 1.5
    for name in ("queries", "regions"):
        assert all(map(torch.equal, getattr(finished, name), getattr(on_cpu, name)))
    assert len({bool(width < 0) for region in regions for width in region[:, 3]}) == 2
