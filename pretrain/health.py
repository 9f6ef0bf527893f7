"""The health of a run in words: still at log K, collapsing, a map of places, or learning."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.engine import HookBase

from flsl_d2.evaluation.explained_variance import position_r2
from flsl_d2.images.store import ImageStore
from flsl_d2.modeling import Encoder, FLSLViT
from pretrain.hooks import SampleImages, beside_training, untouched_generators
from pretrain.monitor import CollapseWatch

logger = logging.getLogger("pretrain")

# Share of log K: the loss of an even assignment is log K; untrained encoders begin below it.
AT_LOG_K = 0.98
# In docs/records/position_shortcut_2026-11.md maps of places have 0.62 and more, healthy encoders
# 0.12, and untrained ones 0.33, from their fixed positions alone.
MAP_OF_PLACES = 0.5
ABOVE_UNTRAINED = 0.1


@dataclass(frozen=True)
class Health:
    """The state of a run, and the values that show it with what to do.

    States are ``collapsing``, ``a map of places``, ``still at log K`` and ``learning``.
    """

    state: str
    text: str


def judge_health(
    signs: Sequence[str],
    cross_entropy: float | None,
    num_centroids: int,
    centroids_in_use: float | None,
    place: float | None,
    untrained_place: float | None,
) -> Health:
    """Name the state of a run by its gravest sign.

    Args:
        signs: signs of collapse from :func:`pretrain.monitor.collapse_signs`.
        cross_entropy: recent loss between views in nats; None for a method without.
        num_centroids: K; 0 for a method without centroids.
        centroids_in_use: see :class:`pretrain.monitor.Monitor`; None where it is not known.
        place: share of the variance of the encoder's tokens that their position explains; None
            where it cannot be measured.
        untrained_place: the same for the encoder before training.
    """
    places = "what position explains is not known"
    is_map = False
    if place is not None and untrained_place is not None:
        places = (
            f"position explains {place:.0%} of the tokens' variance ({untrained_place:.0%} "
            "untrained)"
        )
        is_map = place > max(MAP_OF_PLACES, untrained_place + ABOVE_UNTRAINED)
    if signs:
        return Health(
            "collapsing",
            f"{' and '.join(signs)}; it seldom recovers: stop it, and start anew with a larger "
            "model.loss.volume_weight or a lower schedules.base_lr",
        )
    if is_map:
        return Health(
            "a map of places",
            f"{places}, so tokens hold little of what an image shows, however far the loss falls; "
            "start anew with model.partner=place model.position_share=0.01 model.position_drop=0.1 "
            "(docs/METHOD.md)",
        )
    top = math.log(num_centroids) if num_centroids > 1 else None
    if top and cross_entropy is not None and cross_entropy >= AT_LOG_K * top:
        return Health(
            "still at log K",
            f"the loss between views is {cross_entropy:.2f} and log K {top:.2f}, so every query is "
            "assigned to all centroids alike; normal during the warm-up, later raise "
            "schedules.base_lr",
        )
    parts = [places]
    if cross_entropy is not None:
        limit = f" (log K {top:.2f})" if top else ""
        parts.insert(0, f"the loss between views is {cross_entropy:.2f}{limit}")
    if centroids_in_use is not None and num_centroids:
        parts.insert(1, f"{centroids_in_use:.0f} of {num_centroids} centroids are in use")
    return Health("learning", ", ".join(parts))


class HealthReport(HookBase):
    """Log the health every ``period`` steps and after the last, and put ``position_r2`` beside it.

    A few images, spread evenly over ``files``, are encoded by the exported encoder and, once, by an
    untrained one of its architecture. The randomness of the run is unchanged. It is registered in
    the main process alone, after the watch and the monitor and before the writers. The median loss
    of ``window`` steps is judged.
    """

    def __init__(
        self,
        files: ImageStore | Sequence[str],
        watch: CollapseWatch,
        period: int,
        short_side: int = 224,
        num_images: int = 12,
        window: int = 20,
    ) -> None:
        self.samples = SampleImages(files, num_images)
        self.watch, self.period, self.short_side, self.window = watch, period, short_side, window
        self.health: Health | None = None
        self._untrained: float | None = None

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or (self.period and done % self.period == 0):
            self._report(done)

    def _report(self, done: int) -> None:
        histories = self.trainer.storage.histories()
        method, encoder = self.trainer.method, self.trainer.method.exported_encoder()
        # The term over centroids: FLSL's, that of methods with several terms, or the loss.
        terms = ("loss_inter", "loss_global", "loss")
        name = next((term for term in terms if term in histories), "loss")
        wanted = name in histories and method.num_centroids
        place = self._place(encoder)
        if self._untrained is None and place is not None:
            self._untrained = self._place(_untrained(encoder))
        in_use = histories.get("centroids_in_use")
        self.health = judge_health(
            self.watch.signs,
            histories[name].median(self.window) if wanted else None,
            method.num_centroids,
            in_use.latest() if in_use else None,
            place,
            self._untrained,
        )
        if place is not None:
            self.trainer.storage.put_scalars(position_r2=place, smoothing_hint=False)
        level = logging.INFO if self.health.state == "learning" else logging.WARNING
        logger.log(
            level, "Health after %d steps: %s: %s.", done, self.health.state, self.health.text
        )

    def _place(self, encoder: Encoder | None) -> float | None:
        """Position R2 of some images; None where it cannot be measured."""
        if encoder is None:
            return None
        training = encoder.training
        encoder.train(False)
        with beside_training(self.trainer):
            features = self.samples.features(encoder, self.short_side)
        encoder.train(training)
        if len(features) < 2:
            return None
        return position_r2([each.on_cpu() for each in features])


def _untrained(encoder: Encoder) -> FLSLViT | None:
    if not isinstance(encoder, FLSLViT):
        return None
    with untouched_generators():
        torch.manual_seed(0)
        return FLSLViT(**encoder.architecture).to(encoder.pos_embed.device)
