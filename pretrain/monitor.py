"""What the teacher's tokens group, drawn every so often while it trains."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from flsl_d2.data.images import read_rgb
from flsl_d2.evaluation import TokenFeatures, extract_tokens
from flsl_d2.evaluation.measures import MEASURES, measure_all, prepare_measures
from flsl_d2.modeling import FLSLViT
from flsl_d2.visualization import encoder_figure

__all__ = [
    "CollapseWatch",
    "EncoderPictures",
    "FeatureMeasures",
    "collapse_signs",
    "untouched_generators",
]


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Python's, NumPy's and PyTorch's global generators go on as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


logger = logging.getLogger("pretrain")

# Measured on 64-pixel runs: a healthy one has feature_std 0.7 and gives its largest centroid a
# third of the queries; without the volume term one centroid has all of them after 120 steps.
MAX_SHARE = 0.9
MIN_FEATURE_STD = 0.05


def collapse_signs(assigned: Tensor, feature_std: float) -> list[str]:
    """What speaks for a collapse, in words; nothing in a healthy run.

    Args:
        assigned: (K,) how many queries the teacher gave to each centroid.
        feature_std: of the teacher's features, about 1 where they fill the space.
    """
    signs = []
    share, centroid = (assigned.double() / assigned.sum().clamp(min=1)).max(dim=0)
    if share > MAX_SHARE:
        signs.append(f"centroid {int(centroid)} has {float(share):.1%} of all queries")
    if not feature_std > MIN_FEATURE_STD:
        signs.append(f"the features hardly vary (feature_std {feature_std:.3g})")
    return signs


class CollapseWatch(HookBase):
    """Warns when two windows of steps in a row show signs of collapse; training goes on.

    It belongs on every rank. The warning is repeated after every tenth further window.

    Args:
        window: steps that are judged together.
    """

    def __init__(self, window: int = 100) -> None:
        self.window = window
        self.bad_windows = 0
        self._reset()

    def _reset(self) -> None:
        self.assigned: Tensor | None = None
        self.feature_std: Tensor | None = None
        self.steps = 0

    def after_step(self) -> None:
        """Accumulate on the device; judge at the end of each window."""
        monitored = self.trainer.monitored
        if self.assigned is None:
            self.assigned = torch.zeros_like(monitored["assigned"])
            self.feature_std = torch.zeros_like(monitored["feature_std"])
        self.assigned += monitored["assigned"]
        self.feature_std += monitored["feature_std"]
        self.steps += 1
        if (self.trainer.iter + 1) % self.window == 0:
            if self.steps == self.window:  # else resumed in the middle of it
                self._judge()
            self._reset()

    def _judge(self) -> None:
        if dist.is_initialized() and comm.get_world_size() > 1:
            dist.all_reduce(self.assigned)
        signs = collapse_signs(self.assigned, float(self.feature_std) / self.window)
        self.bad_windows = self.bad_windows + 1 if signs else 0
        if self.bad_windows % 10 == 2:
            logger.warning(
                "Training has collapsed: for %d steps, until iteration %d, %s. It seldom recovers: "
                "stop it, and start anew with a larger model.loss.volume_weight, with "
                "schedules.cross_scale above schedules.self_scale, or a lower schedules.base_lr.",
                self.bad_windows * self.window,
                self.trainer.iter,
                " and ".join(signs),
            )


class FeatureMeasures(HookBase):
    """Scores of the teacher's frozen tokens, every ``period_iters`` steps and after the last.

    They go into the storage under their names, for example ``knn_segmentation/mIoU``, so that the
    writers registered after this hook put them beside the losses. The measures draw from
    generators of their own; the global ones and the training mode are left as they were, so that
    a run with this hook ends with the weights of a run without. A measure that fails is a warning
    in the log with its reason, and training goes on.

    Only the main process measures, and the others wait for it: it must be registered in all of
    them. The wait counts against the process group's timeout (30 minutes in Detectron2's launch),
    so bound the work with ``max_images``.

    Args:
        train: registered data set with labels to learn from.
        val: registered data set to score on.
        measures: names in :data:`flsl_d2.evaluation.measures.MEASURES`.
        period_iters: steps between two measurements; 0 measures after the last step only.
        max_images: bound of the images of each data set.
        short_side: pixels that the shorter side of an image is resized to; the resolution of
            pre-training by default, a quarter of the work of that of the final evaluation.

    Raises:
        InputError: data or names cannot be used; found when the hook is made, before training.
    """

    def __init__(
        self,
        train: str,
        val: str,
        measures: Sequence[str] = tuple(MEASURES),
        period_iters: int = 0,
        max_images: int | None = 200,
        short_side: int = 224,
    ) -> None:
        self.measures, self.period, self.short_side = tuple(measures), period_iters, short_side
        self.data = ()
        if comm.is_main_process():
            self.data = prepare_measures(
                train, val, measures, max_images=max_images, short_side=short_side
            )
        comm.synchronize()

    def after_step(self) -> None:
        """Measure when due."""
        done = self.trainer.iter + 1
        due = self.period and done % self.period == 0
        if due or done >= self.trainer.max_iter:
            if comm.is_main_process():
                self._measure(self.trainer.flsl.teacher.backbone)
            comm.synchronize()

    def _measure(self, encoder: FLSLViT) -> None:
        device = str(encoder.pos_embed.device)
        # Blocks that the run compiled would be compiled anew for the size of every image.
        with untouched_generators(), torch.compiler.set_stance("force_eager"):
            results, failures = measure_all(
                encoder, *self.data, self.measures, device=device, short_side=self.short_side
            )
        for name, reason in failures.items():
            logger.warning("%s was not measured: %s", name, reason)
        self.trainer.storage.put_scalars(smoothing_hint=False, **results)


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
