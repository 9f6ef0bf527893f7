"""Detection as an evaluation of an encoder: fine-tune the same detector, measure its AP."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from flsl_d2.data import check_registered_dataset
from flsl_d2.detection.checks import check_datasets, names_of
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.engine.run_folder import DETECTION_KEYS
from flsl_d2.errors import InputError
from flsl_d2.evaluation.measures import MEASURES
from flsl_d2.experiments.jobs import Job, Outcome, config_settings
from flsl_d2.modeling import FLSLViT
from flsl_d2.visualization.curves import read_metrics
from flsl_d2.weights import build_encoder

__all__ = [
    "DavisEvaluation",
    "DetectionEvaluation",
    "EncoderFile",
    "Evaluation",
    "FeatureEvaluation",
    "architecture_overrides",
    "check_measures",
]


@dataclass(frozen=True)
class EncoderFile:
    """An encoder to evaluate.

    Attributes:
        label: for people.
        path: of its weights; the file may be the product of ``needs``.
        identity: what fixes the weights (a checksum, or the settings of the run that makes them).
        needs: the job that writes the file.
        seed: of the evaluation: k-means, heads, order of images.
    """

    label: str
    path: str
    identity: Mapping[str, Any]
    needs: Job | None = None
    seed: int = 0


class Evaluation(Protocol):
    """What can be done with an encoder: ``name`` starts the names of its measures."""

    name: str

    def check(self) -> None:
        """Find what cannot work for any encoder; raises InputError."""

    def job(self, encoder: EncoderFile) -> Job:
        """The job that evaluates an encoder."""


@dataclass(frozen=True)
class FeatureEvaluation:
    """One measure of frozen features; see :mod:`flsl_d2.evaluation.measures`.

    Attributes:
        tools: folder of the command lines.
        name: the measure.
        train, val: data sets.
        device: ``cuda`` or ``cpu``.
        max_images: of either data set; None for all.
        short_side: pixels of the images' shorter side; None for the tool's default.
    """

    tools: Path
    name: str
    train: str
    val: str
    device: str = "cpu"
    max_images: int | None = None
    short_side: int | None = None

    def check(self) -> None:
        """Raise InputError for an unknown measure, and for data sets that cannot be used."""
        check_measures([self.name])
        for name in (self.train, self.val):
            check_registered_dataset(name)

    def job(self, encoder: EncoderFile) -> Job:
        """Runs ``tools/eval_features.py``."""
        settings = {
            "encoder": dict(encoder.identity),
            "measure": self.name,
            "train": _dataset_identity(self.train),
            "val": _dataset_identity(self.val),
            "max_images": self.max_images,
            "short_side": self.short_side,
            "seed": encoder.seed,
        }

        def command(folder: Path, _num_processes: int) -> list[str]:
            (folder / "features.json").unlink(missing_ok=True)  # reasons of an earlier attempt
            arguments = [str(self.tools / "eval_features.py"), "--weights", encoder.path]
            arguments += ["--train", self.train, "--val", self.val, "--measures", self.name]
            arguments += ["--seed", str(encoder.seed), "--device", self.device]
            if self.max_images is not None:
                arguments += ["--max-images", str(self.max_images)]
            if self.short_side is not None:
                arguments += ["--short-side", str(self.short_side)]
            return [*arguments, "--json", str(folder / "features.json")]

        def outcome(folder: Path) -> Outcome:
            return _outcome_of_features(folder / "features.json")

        return Job(self.name, encoder.label, settings, command, outcome, encoder.needs)


@dataclass(frozen=True)
class DavisEvaluation:
    """Video object segmentation by propagated labels; it has no randomness, hence no seed.

    Attributes:
        tools: folder of the command lines.
        root: folder of the DAVIS 2017 data set.
        device: ``cuda`` or ``cpu``.
    """

    tools: Path
    root: str
    device: str = "cpu"
    name: str = "davis"

    def check(self) -> None:
        """Raise InputError where the folder is missing."""
        if not Path(self.root).is_dir():
            raise InputError(f"the DAVIS folder '{self.root}' does not exist; check the path.")

    def job(self, encoder: EncoderFile) -> Job:
        """Runs ``tools/eval_davis.py``."""

        def command(folder: Path, _num_processes: int) -> list[str]:
            arguments = [str(self.tools / "eval_davis.py"), "--weights", encoder.path]
            arguments += ["--davis-root", self.root, "--device", self.device]
            arguments += ["--output", str(folder)]
            return [*arguments, "--json", str(folder / "davis.json")]

        def outcome(folder: Path) -> Outcome:
            overall = json.loads((folder / "davis.json").read_text())["overall"]
            mean = {"J&F": overall["J&F"], "J": overall["J"]["mean"], "F": overall["F"]["mean"]}
            return Outcome({f"davis/{name}": 100 * value for name, value in mean.items()})

        settings = {"encoder": dict(encoder.identity), "davis": str(Path(self.root).resolve())}
        return Job(self.name, encoder.label, settings, command, outcome, encoder.needs)


def check_measures(names: Sequence[str]) -> None:
    """Raise InputError for a name that is not a measure of features."""
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise InputError(
            f"there is no measure {', '.join(unknown)}; choose from {', '.join(MEASURES)}."
        )


def _dataset_identity(name: str) -> dict[str, str]:
    return {"name": name, "annotations": str(MetadataCatalog.get(name).get("json_file", ""))}


def _outcome_of_features(path: Path) -> Outcome:
    content = json.loads(path.read_text())
    return Outcome(content["results"], content.get("failures", {}))


# How detection's keys of metrics.json are called in tables, in this order.
_AP = {"bbox/AP": "box AP", "bbox/AP50": "box AP50", "segm/AP": "mask AP", "segm/AP50": "mask AP50"}

# Where attention looks is the detector's choice, whatever the encoder was trained with; windows
# have no place for class tokens.
_OF_THE_DETECTOR = (
    "window_size",
    "global_block_indexes",
    "mask_window_padding",
    "num_prefix_tokens",
)


@dataclass(frozen=True)
class DetectionEvaluation:
    """Fine-tuning a detector from the encoder, and its AP.

    The config's encoder takes the architecture of the weights; windows, stochastic depth and
    everything else stay the config's.

    Attributes:
        tools: folder of the command lines.
        config_file: a LazyConfig for ``tools/train_net.py``.
        overrides: changes to it.
        device: ``cuda`` or ``cpu``.
    """

    tools: Path
    config_file: str
    overrides: Sequence[str] = field(default=())
    device: str = "cpu"
    name: str = "detection"

    def _config(self) -> DictConfig:
        return load_lazy_config(self.config_file, [*self.overrides, f"train.device={self.device}"])

    def check(self) -> None:
        """Raise InputError for a config, overrides or data sets that cannot be used."""
        if is_yaml(self.config_file):
            raise InputError(f"config file {self.config_file!r} is YAML; give a LazyConfig .py.")
        cfg = self._config()
        if OmegaConf.select(cfg, "model.backbone.net") is None or "dataloader" not in cfg:
            raise InputError(
                f"config file {self.config_file!r} has no model.backbone.net or no dataloader; "
                "give a detection config such as configs/coco/mask_rcnn_flsl_vit_s16_1x.py."
            )
        check_datasets(
            names_of(cfg.dataloader.train.dataset.names),
            names_of(cfg.dataloader.test.dataset.names),
            OmegaConf.select(cfg, "model.roi_heads.num_classes"),
            "model.roi_heads.num_classes=",
        )

    def test_dataset(self) -> str:
        """The first data set that AP is measured on."""
        return names_of(self._config().dataloader.test.dataset.names)[0]

    def job(self, encoder: EncoderFile) -> Job:
        """Runs ``tools/train_net.py``."""
        cfg = self._config()
        # Weights and seed are compared as "encoder" and "seed".
        without = (*DETECTION_KEYS.no_effect, "train.init_checkpoint", "train.seed")
        settings = {
            "encoder": dict(encoder.identity),
            "config": config_settings(cfg, without),
            "seed": encoder.seed,
        }

        def command(folder: Path, num_processes: int) -> list[str]:
            arguments = [str(self.tools / "train_net.py"), "--config-file", self.config_file]
            arguments += ["--resume", "--num-gpus", str(num_processes), *self.overrides]
            arguments += architecture_overrides(build_encoder(encoder.path), cfg)
            arguments += [f"train.init_checkpoint={encoder.path}", f"train.output_dir={folder}"]
            return [*arguments, f"train.seed={encoder.seed}", f"train.device={self.device}"]

        def outcome(folder: Path) -> Outcome:
            series, _ = read_metrics(folder / "metrics.json")
            # With several test sets, the keys begin with the name of the set.
            values = {
                f"{self.name}/{key.removesuffix(suffix)}{name}": series[key][1][-1]
                for suffix, name in _AP.items()
                for key in series
                if key == suffix or key.endswith(f"/{suffix}")
            }
            if not values:
                raise InputError("the run ended without an evaluation.")
            return Outcome(values)

        return Job(self.name, encoder.label, settings, command, outcome, encoder.needs)


def architecture_overrides(encoder: FLSLViT, cfg: DictConfig) -> list[str]:
    """Overrides that give a detection config's encoder the architecture of another."""
    overrides = []
    for key, value in encoder.architecture.items():
        if key in _OF_THE_DETECTOR:
            continue
        known = key in cfg.model.backbone.net
        shown = "null" if value is None else str(value).lower()
        overrides.append(f"{'' if known else '+'}model.backbone.net.{key}={shown}")
    return overrides
