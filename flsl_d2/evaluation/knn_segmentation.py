"""Patch-level k-NN segmentation: no training, a pixel is what the nearest known patches are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.neighbours import nearest
from flsl_d2.evaluation.patch_bank import PatchBank, check_pixel_classes
from flsl_d2.evaluation.samples import Options, Sample
from flsl_d2.evaluation.segmentation_scores import Confusion, label_pixels
from flsl_d2.modeling import FLSLViT

__all__ = ["KnnSegmentation"]


class KnnSegmentation:
    """Mean IoU of labels voted by the nearest patches of a memory bank.

    Each token takes the class shares of its k most similar bank patches (cosine), averaged with
    weights exp(cosine / T). The averages are resampled bilinearly to the pixels of the
    annotations, and the largest wins. The bank holds at most ``bank_size`` patches of the training
    images, see :class:`flsl_d2.evaluation.patch_bank.PatchBank`.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
        self.classes = check_pixel_classes(train, val)
        self.options = options
        self.bank = PatchBank(train, options.bank_size, seed)
        self.confusion = Confusion(len(self.classes))

    def observe_train(self, sample: Sample) -> None:
        """Put patches into the bank."""
        self.bank.add(sample)

    def fit(self) -> None:
        """Normalise the bank."""
        tokens, self.shares = self.bank.all()
        self.tokens = F.normalize(tokens, dim=1)

    def observe_val(self, sample: Sample) -> None:
        """Segment an image and count its pixels."""
        queries = F.normalize(sample.tokens, dim=1)
        k = min(self.options.num_neighbours, len(self.tokens))
        indices, weights = nearest(queries, self.tokens, k, self.options.temperature)
        votes = torch.einsum("nk,nkc->nc", weights, self.shares[indices])
        votes = votes / weights.sum(dim=1, keepdim=True)
        truth = sample.image.semantic
        self.confusion.add(truth, label_pixels(votes, sample.grid, truth.shape))

    def results(self) -> dict[str, float]:
        """``mIoU``, ``pixel_accuracy`` and, of a few classes, the IoU of each; in percent."""
        return self.confusion.results(self.classes)
