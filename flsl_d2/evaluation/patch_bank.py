"""A small memory of labelled patches, drawn evenly from the training images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.samples import Sample
from flsl_d2.evaluation.segmentation_scores import patch_distributions

__all__ = ["PatchBank", "check_pixel_classes"]


class PatchBank:
    """Tokens with the share of each class among the pixels of their patch.

    Every image gives the same number of patches, drawn uniformly among those with a labelled
    pixel; what is drawn depends on the seed and the index of the image alone.

    Args:
        dataset: the training images.
        size: most patches in the bank.
        seed: of the draw.
    """

    def __init__(self, dataset: LabelledDataset, size: int, seed: int) -> None:
        if size < 1:
            raise InputError(f"bank_size is {size}; give at least 1, or leave it out for 10000.")
        self.num_classes = len(dataset.pixel_classes)
        self.num_images, self.size, self.seed = len(dataset.images), size, seed
        self._tokens: list[Tensor] = []
        self._shares: list[Tensor] = []

    def add(self, sample: Sample) -> None:
        """Draw the patches of one image."""
        first, last = (self.size * (sample.index + step) // self.num_images for step in (0, 1))
        shares, labelled = patch_distributions(sample.image.semantic, sample.grid, self.num_classes)
        candidates = np.flatnonzero(labelled)
        wanted = min(last - first, len(candidates))
        if not wanted:
            return
        generator = np.random.default_rng([self.seed, sample.index])
        chosen = np.sort(generator.choice(candidates, wanted, replace=False))
        self._tokens.append(sample.tokens[torch.as_tensor(chosen, device=sample.tokens.device)])
        self._shares.append(torch.from_numpy(shares[chosen]))

    def all(self) -> tuple[Tensor, Tensor]:
        """Tokens (M, D) and shares (M, C), on the device of the tokens.

        Raises:
            InputError: not one patch has a label.
        """
        if not self._tokens:
            raise InputError("no pixel of the training images has a label; use other images.")
        tokens = torch.cat(self._tokens)
        return tokens, torch.cat(self._shares).to(tokens.device)


def check_pixel_classes(train: LabelledDataset, val: LabelledDataset) -> tuple[str, ...]:
    """The classes of pixels, the same in both data sets.

    Raises:
        InputError: they differ, or there are none.
    """
    if train.pixel_classes != val.pixel_classes:
        raise InputError(
            f"{train.name!r} has {len(train.pixel_classes)} pixel classes and {val.name!r} "
            f"{len(val.pixel_classes)}, or other names; use two splits of one data set."
        )
    if not train.pixel_classes:
        raise InputError(
            f"the data set {train.name!r} does not name its classes; set `stuff_classes` in its "
            "metadata."
        )
    return train.pixel_classes
