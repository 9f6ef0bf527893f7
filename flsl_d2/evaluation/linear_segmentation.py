"""Linear segmentation probe: one linear layer on frozen tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.patch_bank import PatchBank, check_pixel_classes
from flsl_d2.evaluation.samples import Options, Sample
from flsl_d2.evaluation.segmentation_scores import Confusion, label_pixels
from flsl_d2.modeling import FLSLViT

__all__ = ["LinearSegmentation", "fit_linear"]

WEIGHT_DECAY = 1e-3


class LinearSegmentation:
    """Mean IoU of a linear classifier of tokens.

    It learns the class shares of at most ``bank_size`` training patches (:class:`PatchBank`) from
    their tokens, each channel standardised over the bank. Its logits are resampled bilinearly to
    the pixels of the annotations, and the largest wins.
    """

    def __init__(
        self,
        encoder: FLSLViT,
        train: LabelledDataset,
        val: LabelledDataset,
        options: Options,
        seed: int,
    ) -> None:
        if options.probe_steps < 1:
            raise InputError(f"probe_steps is {options.probe_steps}; give at least 1.")
        self.classes = check_pixel_classes(train, val)
        self.steps = options.probe_steps
        self.bank = PatchBank(train, options.bank_size, seed)
        self.confusion = Confusion(len(self.classes))

    def observe_train(self, sample: Sample) -> None:
        """Put patches into the bank."""
        self.bank.add(sample)

    def fit(self) -> None:
        """Train the layer."""
        tokens, shares = self.bank.all()
        self.weight, self.bias = fit_linear(tokens, shares, self.steps)

    def observe_val(self, sample: Sample) -> None:
        """Segment an image and count its pixels."""
        logits = sample.tokens.double() @ self.weight + self.bias
        truth = sample.image.semantic
        self.confusion.add(truth, label_pixels(logits.float(), sample.grid, truth.shape))

    def results(self) -> dict[str, float]:
        """``mIoU``, ``pixel_accuracy`` and, of a few classes, the IoU of each; in percent."""
        return self.confusion.results(self.classes)


def fit_linear(tokens: Tensor, shares: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with soft targets, by L-BFGS on all data at once.

    Minimises the mean cross-entropy plus ``WEIGHT_DECAY / 2`` times the squared weights of the
    standardised channels, from weights of 0: nothing is drawn. In double precision, because the
    solver would carry rounding, which varies with the number of threads, into its result.

    Args:
        tokens: (M, D).
        shares: (M, C), rows sum to 1.
        num_steps: iterations of the solver; it may converge earlier.

    Returns:
        Weight (D, C) and bias (C,), float64, to be applied to tokens as they are.
    """
    tokens, shares = tokens.double(), shares.double()
    mean, std = tokens.mean(dim=0), tokens.std(dim=0, unbiased=False)
    gain = torch.where(std > 1e-6 * std.amax().clamp(min=1e-12), 1 / std.clamp(min=1e-12), 0.0)
    standardised = (tokens - mean) * gain
    weight = tokens.new_zeros(tokens.shape[1], shares.shape[1], requires_grad=True)
    bias = tokens.new_zeros(shares.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=num_steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(standardised @ weight + bias, shares)
        loss = loss + WEIGHT_DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    weight = weight.detach() * gain[:, None]
    return weight, bias.detach() - mean @ weight
