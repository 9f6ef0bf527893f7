"""What the teacher's tokens group, drawn every so often while it trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.engine import HookBase

from flsl_d2.evaluation import TokenFeatures, extract_tokens
from flsl_d2.visualization import encoder_figure
from pretrain.images import read_rgb
from pretrain.random_state import untouched_generators

__all__ = ["EncoderPictures"]

logger = logging.getLogger("pretrain")


class EncoderPictures(HookBase):
    """Draws attention, modes, clusters and PCA of a few fixed images, and at the end.

    Writes ``iter_0000999.png`` (the number of the last step, as of checkpoints) and puts the same
    page into TensorBoard, so it stands before the writers in the list of hooks. It changes nothing
    of the run: neither its randomness, nor its end where a picture cannot be drawn.

    Args:
        files: of the data set; the images are spread evenly over them.
        folder: of the PNG files.
        period: steps between two pages; 0 draws none. A run of fewer steps has no page at its
            end either.
        short_side: pixels of the images' shorter side; the size of the views is what the encoder
            knows.
        num_images: rows of a page.
        scale: of attention and clusters, times sqrt(D). Larger than in training, where the modes
            of an image soon all meet in one.
        num_iterations: mean-shift steps to the mode.
    """

    def __init__(
        self,
        files: Sequence[str],
        folder: Path,
        period: int,
        short_side: int = 224,
        num_images: int = 4,
        scale: float = 1.0,
        num_iterations: int = 3,
    ) -> None:
        places = np.linspace(0, len(files) - 1, min(num_images, len(files))).round().astype(int)
        self.files = [files[i] for i in places]
        self.folder, self.period, self.short_side = folder, period, short_side
        self.scale, self.num_iterations = scale, num_iterations
        self._has_failed = False

    def after_step(self) -> None:
        """Draw when due; a failure is logged once."""
        done = self.trainer.iter + 1
        last = self.trainer.max_iter
        if not self.period or last < self.period or (done % self.period and done < last):
            return
        try:
            # Blocks that the run compiled would be compiled anew for the size of every image.
            with untouched_generators(), torch.compiler.set_stance("force_eager"):
                self._draw()
        except Exception:
            if not self._has_failed:
                logger.warning("Pictures cannot be drawn; the run goes on.", exc_info=True)
            self._has_failed = True

    def _draw(self) -> None:
        features = self._features()
        width = features[0].tokens.shape[1]
        path = self.folder / f"iter_{self.trainer.iter:07d}.png"
        encoder_figure(
            [each.image for each in features],
            [each.tokens for each in features],
            [each.grid for each in features],
            path,
            scale=self.scale / width**0.5,
            num_iterations=self.num_iterations,
            title=f"Teacher after {self.trainer.iter + 1} steps, scale {self.scale:g} / sqrt(D)",
        )
        page = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        page = np.ascontiguousarray(page.transpose(2, 0, 1))
        self.trainer.storage.put_image("teacher/tokens", page)

    def _features(self) -> list[TokenFeatures]:
        backbone = self.trainer.flsl.teacher.backbone
        features = []
        for file in self.files:
            try:
                image = read_rgb(file)
            except OSError:
                continue  # the data loader names unreadable images
            features.append(extract_tokens(backbone, image, self.short_side))
        if not features:
            raise OSError(f"none of {', '.join(self.files)} can be read.")
        return features
