"""Crops and augmentation of a whole batch on the training device.

The draws come from the workers (``pretrain/augmentation.py``), so a view is the same picture as on
the CPU up to rounding: the CPU rounds to 8 bits after every operation, the device does not.

Shape suffixes: B images, S side of a view in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.modeling.transfer import to_device
from pretrain.augmentation import JITTERS, Augmentation, blur_radius

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as opencv's and Pillow's grey
MAX_SIGMA = 2.0


def crop_batch(images: Tensor, regions: np.ndarray, size: int) -> Tensor:
    """Resample a box of each image, bicubically and antialiased, and mirror it where the region is.

    Resampling is linear and separable: one matrix for the rows and one for the columns of each box,
    so that a batch of different boxes is two batched matrix products.

    Args:
        images: (B, 3, H, W) in 0 to 255.
        regions: (B, 4) of ``StepInputs``.
        size: S, the side of the result in pixels.

    Returns:
        (B, 3, S, S) float32, in 0 to 255 and not rounded.
    """
    sides = np.array([images.shape[-2], images.shape[-1]] * 2)
    boxes = (regions * sides).round().astype(np.float32)
    mirrored = boxes[:, 3] < 0
    boxes[mirrored, 1] += boxes[mirrored, 3]
    top, left, height, width = to_device(np.abs(boxes), images.device).unbind(1)
    rows = _resampling_matrix(top, height, images.shape[-2], size)  # (B, S, H)
    columns = _resampling_matrix(left, width, images.shape[-1], size)  # (B, S, W)
    # In half precision the products would be off by more than a grey level.
    with torch.autocast(images.device.type, enabled=False):
        out = rows[:, None] @ images.float() @ columns[:, None].transpose(-2, -1)
    out.clamp_(0, 255)
    if mirrored.any():
        flipped = to_device(mirrored, images.device).view(-1, 1, 1, 1)
        out = torch.where(flipped, out.flip(-1), out)
    return out


def _resampling_matrix(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (B, size, pixels) of input values for the output values of each interval.

    Keys' cubic kernel (a = -0.5), widened where the interval shrinks, cut off at its ends and
    normalised: what Pillow and PyTorch's antialiased interpolation compute.
    """
    scale = (length / size)[:, None, None]
    place = torch.arange(size, device=start.device)[:, None] + 0.5
    pixel = torch.arange(pixels, device=start.device)
    from_start = pixel - start[:, None, None]  # (B, 1, pixels)
    distance = (from_start + 0.5 - place * scale).abs() / scale.clamp(min=1)
    near = ((1.5 * distance - 2.5) * distance) * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    inside = (from_start >= 0) & (from_start < length[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=-1, keepdim=True)


def augment_views(views: Sequence[Tensor], batches: Sequence[Augmentation]) -> list[Tensor]:
    """Augment several views (B, 3, S, S) in 0 to 255, each like :func:`augment_batch`.

    Views of one size that follow each other are joined, because a GPU works off these operations
    faster than Python issues them.
    """
    done: list[Tensor] = []
    pairs = zip(views, batches, strict=True)
    for _, group in groupby(pairs, key=lambda pair: pair[0].shape[-1]):
        images, augmentations = zip(*group, strict=True)
        together = Augmentation(*map(np.concatenate, zip(*augmentations, strict=True)))
        done += augment_batch(torch.cat(images), together).split(len(images[0]))
    return done


def augment_batch(images: Tensor, batch: Augmentation) -> Tensor:
    """Apply an augmentation to each image of (B, 3, S, S) in 0 to 255; the result is float32.

    Each operation runs over the images that it was drawn for; they are known on the CPU, so that
    nothing waits for the device.
    """
    images = images.float().clone()
    device = images.device
    factors = to_device(batch.factors, device)
    jitters: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        _brightness, _contrast, _saturation, _hue,
    )  # fmt: skip
    for place in range(len(JITTERS)):
        for index, jitter in enumerate(jitters):
            drawn = _indexes(batch.order[:, place] == index, device)
            if len(drawn):
                factor = factors[drawn, index].view(-1, 1, 1, 1)
                images[drawn] = jitter(images[drawn], factor).clamp_(0, 255)
    drawn = _indexes(batch.grey, device)
    if len(drawn):
        images[drawn] = _grey(images[drawn]).expand(-1, 3, -1, -1)
    drawn = _indexes(batch.sigma > 0, device)
    if len(drawn):
        images[drawn] = _blur(images[drawn], batch.sigma[batch.sigma > 0])
    drawn = _indexes(batch.solarise, device)
    if len(drawn):
        chosen = images[drawn]
        images[drawn] = torch.where(chosen >= 127.5, 255 - chosen, chosen)
    return images


def _indexes(mask: np.ndarray, device: torch.device) -> Tensor:
    return to_device(mask.nonzero()[0], device)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images * factor


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return images * factor + mean * (1 - factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return images * factor + _grey(images) * (1 - factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by ``shift`` of a full turn, and keep value and chroma."""
    value, brightest = images.max(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    over = torch.stack([green - blue, blue - red, red - green], dim=-1)  # by the brightest channel
    sixth = over.gather(-1, brightest[..., None])[..., 0] / chroma.clamp(min=1e-6) + 2 * brightest
    turned = sixth + 6 * shift
    # Each channel lies below the value by up to the chroma, the more the farther the hue is.
    start = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)  # 5, 3, 1
    k = (start + turned) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(images: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur each image with a Gaussian of a standard deviation ``sigma`` (B,) in pixels."""
    count, channels, height, width = images.shape
    reach = blur_radius(MAX_SIGMA)
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)
    radii = np.array([blur_radius(float(s)) for s in sigma])[:, None]
    kernels = np.exp(-(offsets**2) / (2 * sigma[:, None] ** 2)) * (np.abs(offsets) <= radii)
    kernels = to_device(kernels / kernels.sum(axis=1, keepdims=True), images.device)
    kernels = kernels.repeat_interleave(channels, 0)
    flat = F.pad(images, (reach,) * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernels[:, None, None, :], groups=count * channels)
    flat = F.conv2d(flat, kernels[:, None, :, None], groups=count * channels)
    return flat.view(count, channels, height, width)
