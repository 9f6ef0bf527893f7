"""Uses of the exported encoder while it trains: its file, its scores, its pictures."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from flsl_d2.engine.checkpoints import Background, EvaluationDue
from flsl_d2.engine.stopping import Interrupted, StopRequest
from flsl_d2.errors import TrainingError
from flsl_d2.evaluation import TokenFeatures, extract_tokens
from flsl_d2.evaluation.features import encoding_in
from flsl_d2.evaluation.labelled_images import LabelledDataset
from flsl_d2.evaluation.measures import measure_all, prepare_measures
from flsl_d2.files import replaced_file
from flsl_d2.images.reader import ImageFile, read_rgb
from flsl_d2.images.store import ImageStore, as_store
from flsl_d2.modeling import FLSLViT
from flsl_d2.modeling.timm_backbone import TimmBackbone
from flsl_d2.visualization import encoder_figure
from flsl_d2.weights import encoder_file
from flsl_d2.weights.checkpointer import copy_to_cpu
from pretrain.methods import Method

logger = logging.getLogger("pretrain")


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Restore Python's, NumPy's and PyTorch's global generators at the end of the context."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def beside_training(trainer: Any) -> Iterator[None]:
    """Context in which an encoder is used that is being trained.

    The global generators are as before at its end, images are encoded in the precision of the
    steps, and compiled blocks are not compiled anew for the size of every image.
    """
    eager = torch.compiler.set_stance("force_eager")
    with untouched_generators(), eager, encoding_in(getattr(trainer, "dtype", None)):
        yield


def save_teacher_backbone(method: Method, path: str | Path) -> None:
    """Write the method's encoder (:func:`encoder_file`) so that no reader sees half of the file.

    The file of a timm model has timm's names: ``timm:NAME?weights=FILE`` and the key ``weights`` of
    :class:`flsl_d2.modeling.timm_backbone.TimmBackbone` load it.
    """
    write_content(_content(method.exported_encoder()), path)


def write_content(content: dict[str, Any], path: str | Path) -> None:
    with replaced_file(path) as file:
        torch.save(content, file)


def _content(encoder: FLSLViT | TimmBackbone) -> dict[str, Any]:
    if isinstance(encoder, FLSLViT):
        return encoder_file(encoder)
    return {"model": {name: x.cpu() for name, x in encoder.model.state_dict().items()}}


class ExportTeacher(HookBase):
    """Write ``teacher_backbone.pth`` every ``period`` steps (0: never) and at the end.

    Before the end, training goes on while the file is written from a copy, and a failure is an
    error in the log; at the end it is a TrainingError.
    """

    def __init__(self, path: Path, period: int = 0) -> None:
        self.path, self.period = path, period
        self._writing = Background()

    def after_step(self) -> None:
        if self._writing.done:
            self._log_failure()
        if self.period and (self.trainer.iter + 1) % self.period == 0:
            self._log_failure()
            content = copy_to_cpu(_content(self.trainer.method.exported_encoder()))
            self._writing.start(lambda: write_content(content, self.path))

    def after_train(self) -> None:
        self._log_failure()
        # After a step that raised an exception, even the last one, the number is lower.
        if self.trainer.iter < self.trainer.max_iter:
            return
        try:
            write_content(_content(self.trainer.method.exported_encoder()), self.path)
        except (OSError, RuntimeError) as error:  # PyTorch's writer hides the error of the file
            raise TrainingError(self._sentence(error)) from error
        logger.info(
            "The encoder is in %s: train.init_checkpoint=... or MODEL.WEIGHTS loads it.", self.path
        )

    def _log_failure(self) -> None:
        """Wait for the file that is being written, if any, and log why it could not be."""
        error = self._writing.wait()
        if error is not None:
            logger.error("%s Training goes on.", self._sentence(error))

    def _sentence(self, error: BaseException) -> str:
        return (
            f"the encoder cannot be written to '{self.path}' ({error}); make room and run again "
            "with --resume."
        )


def interrupted_by(request: StopRequest | None) -> AbstractContextManager[None]:
    """Return the context of work that a request to stop ends; none without requests."""
    return nullcontext() if request is None else request.interrupting()


class TimeShare:
    """Limit blocking work to a share of the run's time: work that comes too early is left out."""

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._next_time = -math.inf

    def allows(self) -> bool:
        return time.monotonic() >= self._next_time

    @contextmanager
    def taking(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        end = time.monotonic()
        self._next_time = end + (end - start) * (1 / self.max_share - 1)


class FeatureMeasures(HookBase):
    """Score the frozen tokens of the encoder every ``period_iters`` steps and after the last.

    The scores go into the storage under their names, for example ``knn_segmentation/mIoU``, so that
    the writers registered after this hook put them beside the losses. The global generators and the
    training mode are restored, so that a run with this hook ends with the weights of a run without.
    A measure that fails is a warning in the log, and training goes on.

    Only the main process measures, and the other processes wait for it, so the hook must be
    registered in all of them. The wait counts against the process group's timeout of 30 minutes, so
    bound the work with ``max_images``.

    Args:
        train: name of the registered data set with labels to learn from; ``val`` is scored on.
        measures: names in :data:`flsl_d2.evaluation.measures.MEASURES`; None for all that fit the
            data.
        period_iters: number of steps between two measurements; 0 for the last step only.
        max_images: largest number of images of each data set.
        short_side: length in pixels that the shorter side of an image is resized to; the default is
            the resolution of pre-training, a quarter of the work of the final evaluation.
        max_share: see :class:`TimeShare`; scores after the last step are always taken.
        request: requests to stop, which end a measurement at once; a resumed run measures first.
        folder: output folder of the run.
        **options: fields of :class:`flsl_d2.evaluation.samples.Options`, such as ``side=224``.

    Raises:
        InputError: data or names cannot be used; raised before training.
    """

    def __init__(
        self,
        train: str,
        val: str,
        measures: Sequence[str] | None = None,
        period_iters: int = 0,
        max_images: int | None = 200,
        short_side: int = 224,
        max_share: float = 1.0,
        request: StopRequest | None = None,
        folder: str | Path = ".",
        **options: Any,
    ) -> None:
        self.request, self._due = request, EvaluationDue(folder)
        self.measures, self.period = measures, period_iters
        self.options = {"short_side": short_side, **options}
        self.share = TimeShare(max_share)
        self.data: tuple[LabelledDataset, LabelledDataset] | None = None
        if comm.is_main_process():
            self.data = prepare_measures(
                train, val, measures, max_images=max_images, **self.options
            )
        comm.synchronize()

    def before_train(self) -> None:
        """Measure where the run that is resumed was stopped meanwhile."""
        if self._due.is_left(self.trainer.start_iter):
            if comm.is_main_process():
                self._measure(self.trainer.method.exported_encoder())
            comm.synchronize()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = done >= self.trainer.max_iter
        if last or (self.period and done % self.period == 0):
            # The other processes wait, so that this one can decide by its clock.
            if comm.is_main_process() and (last or self.share.allows()):
                with self.share.taking():
                    self._measure(self.trainer.method.exported_encoder())
            comm.synchronize()

    def _measure(self, encoder: FLSLViT | TimmBackbone) -> None:
        assert self.data is not None, "only the main process measures"
        device = str(next(encoder.parameters()).device)
        try:
            with beside_training(self.trainer), interrupted_by(self.request):
                results, failures = measure_all(
                    encoder, *self.data, self.measures, device=device, **self.options
                )
        except Interrupted:
            logger.info("The measurement is left, because a stop was requested.")
            self._due.note()
            return
        self._due.clear()
        for name, reason in failures.items():
            logger.warning("%s was not measured: %s", name, reason)
        self.trainer.storage.put_scalars(smoothing_hint=False, **results)


class SampleImages:
    """Some images of a data set, spread evenly over it."""

    def __init__(self, files: ImageStore | Sequence[str], number: int) -> None:
        places = np.linspace(0, len(files) - 1, min(number, len(files))).round().astype(int)
        self.files, self.places = as_store(files), list(dict.fromkeys(places.tolist()))

    def features(self, encoder: Any, short_side: int) -> list[TokenFeatures]:
        """Encode the images that can be read; the monitor names the others."""
        features = []
        for place in self.places:
            try:
                image = ImageFile(self.files.source(place)).pixels()
            except (OSError, TrainingError):
                continue
            features.append(extract_tokens(encoder, image, short_side))
        return features


class EncoderPictures(HookBase):
    """Draw attention, modes, clusters and PCA of a few fixed images, every so often and at the end.

    Writes ``iter_0000999.png`` (the number of the last step, as in the names of checkpoints) and
    puts the same page into TensorBoard, so it comes before the writers in the list of hooks. The
    randomness of the run is unchanged, and the run goes on where a picture cannot be drawn.

    Args:
        files: images of the data set; those drawn are spread evenly over them.
        folder: folder of the PNG files.
        period: number of steps between two pages; 0 draws none, and a run of fewer steps has none.
        short_side: length in pixels of the images' shorter side.
        num_images: number of rows of a page.
        scale: scale of attention and clusters, times sqrt(D). It is larger than in training, where
            the modes of an image soon meet in one.
        num_iterations: number of mean-shift steps to the mode.
        max_share: see :class:`TimeShare`; the last page is always drawn.
        request: requests to stop, which end the drawing at once.
    """

    def __init__(
        self,
        files: ImageStore | Sequence[str],
        folder: Path,
        period: int,
        short_side: int = 224,
        num_images: int = 4,
        scale: float = 1.0,
        num_iterations: int = 3,
        max_share: float = 1.0,
        request: StopRequest | None = None,
    ) -> None:
        self.request = request
        self.samples = SampleImages(files, num_images)
        self.folder, self.period, self.short_side = folder, period, short_side
        self.scale, self.num_iterations = scale, num_iterations
        self.share = TimeShare(max_share)
        self._has_failed = False

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        last = self.trainer.max_iter
        if not self.period or last < self.period or (done % self.period and done < last):
            return
        if done < last and not self.share.allows():
            return
        with self.share.taking(), suppress(Interrupted):
            try:
                with beside_training(self.trainer), interrupted_by(self.request):
                    self._draw()
            except Exception:
                if not self._has_failed:
                    logger.warning("Pictures cannot be drawn; the run goes on.", exc_info=True)
                self._has_failed = True

    def _draw(self) -> None:
        features = self.samples.features(self.trainer.method.exported_encoder(), self.short_side)
        if not features:
            raise OSError("none of its images can be read.")
        width = features[0].tokens.shape[1]
        path = self.folder / f"iter_{self.trainer.iter:07d}.png"
        encoder_figure(
            features,
            path,
            scale=self.scale / width**0.5,
            num_iterations=self.num_iterations,
            title=f"Teacher after {self.trainer.iter + 1} steps, scale {self.scale:g} / sqrt(D)",
        )
        page = np.ascontiguousarray(read_rgb(str(path)).transpose(2, 0, 1))
        self.trainer.storage.put_image("teacher/tokens", page)
