"""Classification of whole images from the mean of their frozen tokens: k-NN and a linear probe."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flsl_d2.errors import InputError
from flsl_d2.evaluation.classifiers import NeighbourVotes, fit_linear
from flsl_d2.evaluation.samples import Sample, Task

logger = logging.getLogger("detectron2.flsl_d2.evaluation")


class Classification:
    """Accuracy of the class of an image, from the mean of its tokens.

    The k most similar training images (cosine) vote with weights exp(cosine / T), and the class
    with the most votes is the answer of k-NN. The linear probe is multinomial logistic regression
    on all training images, each channel standardised; see
    :func:`flsl_d2.evaluation.classifiers.fit_linear`.

    Raises:
        InputError: images have no classes or fewer than two, or validation has others.
    """

    name = "classification"
    without_direction: ClassVar[tuple[str, ...]] = ()

    def __init__(self, task: Task) -> None:
        train, val = task.train, task.val
        for dataset in (train, val):
            if not dataset.image_classes:
                raise InputError(
                    f"the images of {dataset.name!r} have no classes; give a folder with a "
                    "subfolder of images for each class."
                )
        unknown = sorted({*val.image_classes} - {*train.image_classes})
        if unknown:
            raise InputError(
                f"{val.name!r} has images of {', '.join(unknown[:5])}, classes that {train.name!r} "
                "does not have; give training images of every class."
            )
        absent = sorted({*train.image_classes} - {*val.image_classes})
        if absent:
            logger.warning(
                "%s holds no image of %s; the other classes are scored.", val.name, absent[:5]
            )
        self.numbers = [train.image_classes.index(name) for name in val.image_classes]
        self.num_classes = len(train.image_classes)
        if self.num_classes < 2:
            raise InputError(
                f"{train.name!r} has 1 class, and telling images apart takes 2; add subfolders."
            )
        self.options = task.options
        self.features: list[Tensor] = []
        self.labels: list[int] = []

    def observe_train(self, sample: Sample) -> None:
        """Keep the mean token of an image and its class."""
        self.features.append(sample.tokens.mean(dim=0))
        self.labels.append(sample.image.record["image_class"])

    def fit(self) -> None:
        """Build the bank of k-NN and train the linear probe."""
        features = torch.stack(self.features)
        labels = torch.tensor(self.labels, device=features.device)
        self.votes = NeighbourVotes(features, labels, self.num_classes, self.options)
        shares = F.one_hot(labels, self.num_classes).double()
        self.weight, self.bias = fit_linear(features, shares, self.options.probe_steps)

    def observe_val(self, sample: Sample) -> None:
        """Classify an image."""
        feature = sample.tokens.mean(dim=0, keepdim=True)
        linear = (feature.double() @ self.weight + self.bias)[0]
        scores = {**self.votes(feature), "linear": linear}
        self.votes.count(scores, self.numbers[sample.image.record["image_class"]])

    def results(self) -> dict[str, float]:
        """Return ``k10_top1``, ``linear_top1`` and so on, and ``top5`` from five classes up."""
        return self.votes.accuracies()
