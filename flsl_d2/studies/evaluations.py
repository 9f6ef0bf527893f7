"""Evaluations of an encoder, each of which runs as a job: features, DAVIS and detection."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig, OmegaConf

from flsl_d2.detection.checks import check_datasets, names_of, use_own_data
from flsl_d2.engine.command_line import add_option
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.engine.run_folder import DETECTION_KEYS
from flsl_d2.errors import InputError
from flsl_d2.evaluation.labelled_images import load_labelled
from flsl_d2.evaluation.measures import MEASURES
from flsl_d2.files import write_text
from flsl_d2.modeling.timm_backbone import TIMM_PREFIX
from flsl_d2.studies.few_labels import Records, count_of, describe_draw, drawn, few_labels, shares
from flsl_d2.studies.identity import data_identity, folder_sha256, result_settings
from flsl_d2.studies.jobs import Job, Outcome
from flsl_d2.visualization.curves import read_metrics
from flsl_d2.weights import build_encoder

_DEFAULT_MEASURES = ("knn_segmentation", "cluster_quality")


@dataclass(frozen=True)
class EncoderFile:
    """An encoder to evaluate, with the seed of the evaluation: k-means, heads, order of images.

    ``path`` is a weight file, which the job ``needs`` may write first, or ``timm:NAME``;
    ``identity`` determines the weights: a checksum, or the settings of the run that makes them.
    """

    label: str
    path: str
    identity: Mapping[str, Any]
    needs: Job | None = None
    seed: int = 0

    def job(self, kind: str, settings: Mapping[str, Any], command: Any, outcome: Any) -> Job:
        """Make the job of an evaluation of this encoder."""
        return Job(kind, self.label, settings, command, outcome, self.needs)


@dataclass(frozen=True)
class FeatureEvaluation:
    """One measure of frozen features, by ``python -m flsl_d2.evaluation``.

    The name of an evaluation starts the names of its measures. ``shown_dataset`` is the registered
    data set whose images show what is evaluated, or empty.
    """

    name: str
    train: str
    val: str
    device: str = "cpu"
    max_images: int | None = None
    short_side: int = 448

    @property
    def shown_dataset(self) -> str:
        """Data set that is scored; empty where it is a folder of images by class."""
        return self.val if self.val in DatasetCatalog else ""

    def check(self) -> None:
        """Raise InputError for an unknown measure, and for data sets that cannot be used."""
        if self.name not in MEASURES:
            raise InputError(
                f"there is no measure {self.name!r}; choose from {', '.join(MEASURES)}."
            )
        load_labelled(self.train)
        load_labelled(self.val)

    @cached_property
    def _data(self) -> dict[str, Any]:
        return {"train": data_identity(self.train), "val": data_identity(self.val)}

    def job(self, encoder: EncoderFile) -> Job:
        """Make the job of an encoder."""
        settings = {"encoder": dict(encoder.identity), "measure": self.name, **self._data}
        settings |= {"max_images": self.max_images, "short_side": self.short_side}

        def command(folder: Path, _num_processes: int) -> list[str]:
            (folder / "features.json").unlink(missing_ok=True)  # reasons of an earlier attempt
            limit = [] if self.max_images is None else ["--max-images", str(self.max_images)]
            return [
                *("-m", "flsl_d2.evaluation", "--weights", encoder.path),
                *("--train", self.train, "--val", self.val, "--measures", self.name),
                *("--seed", str(encoder.seed), "--device", self.device, *limit),
                *("--short-side", str(self.short_side), "--json", str(folder / "features.json")),
            ]

        def outcome(folder: Path) -> Outcome:
            content = json.loads((folder / "features.json").read_text())
            return Outcome(content["results"], content["failures"], content["omitted"])

        return encoder.job(self.name, settings | {"seed": encoder.seed}, command, outcome)


@dataclass(frozen=True)
class DavisEvaluation:
    """Video object segmentation, by ``python -m flsl_d2.evaluation.davis``.

    It has no randomness, and the seed is that of untrained weights alone.
    """

    root: Path
    device: str = "cpu"
    name: str = "davis"
    shown_dataset: str = ""

    def check(self) -> None:
        """Raise InputError where the folder is missing."""
        if not self.root.is_dir():
            raise InputError(f"the DAVIS folder '{self.root}' does not exist; check the path.")

    @cached_property
    def _data(self) -> dict[str, str]:
        read = {"JPEGImages": False, "Annotations": True, "ImageSets": True}
        return {name: folder_sha256(self.root / name, labels) for name, labels in read.items()}

    def job(self, encoder: EncoderFile) -> Job:
        """Make the job of an encoder."""

        def command(folder: Path, _num_processes: int) -> list[str]:
            return [
                *("-m", "flsl_d2.evaluation.davis", "--weights", encoder.path),
                *("--seed", str(encoder.seed)),
                *("--davis-root", str(self.root), "--device", self.device),
                *("--output", str(folder), "--json", str(folder / "davis.json")),
            ]

        def outcome(folder: Path) -> Outcome:
            overall = json.loads((folder / "davis.json").read_text())["overall"]
            means = {"J&F": overall["J&F"], "J": overall["J"]["mean"], "F": overall["F"]["mean"]}
            return Outcome({f"davis/{name}": 100 * value for name, value in means.items()})

        settings = {"encoder": dict(encoder.identity), "davis": self._data}
        return encoder.job(self.name, settings, command, outcome)


# Names in tables of the keys that detection writes to metrics.json, in the order of the columns.
_AP = {"bbox/AP": "box AP", "bbox/AP50": "box AP50", "segm/AP": "mask AP", "segm/AP50": "mask AP50"}

# Arguments of the encoder that the detection config decides, whatever the encoder was trained
# with: where attention looks, and class tokens, which have no place in windows.
_CHOSEN_BY_DETECTOR = (
    *("window_size", "global_block_indexes", "mask_window_padding", "num_prefix_tokens"),
)
# Keys of a detection config that the identities of weights, seed and data stand for.
_IDENTIFIED = (
    *("train.init_checkpoint", "train.seed", "dataloader.evaluator*.dataset_name"),
    *(f"dataloader.*.dataset.{key}" for key in ("names", "json_file", "image_root")),
)


@dataclass(frozen=True)
class DetectionTask:
    """A detection config with its data, which are read once for all shares of the labels."""

    config_file: str
    overrides: Sequence[str] = ()
    device: str = "cpu"

    @cached_property
    def config(self) -> DictConfig:
        """Config with its overrides, and the user's own data registered."""
        if is_yaml(self.config_file):
            raise InputError(f"config file {self.config_file!r} is YAML; give a LazyConfig .py.")
        cfg = load_lazy_config(self.config_file, [*self.overrides, f"train.device={self.device}"])
        if OmegaConf.select(cfg, "model.backbone.net") is None or "dataloader" not in cfg:
            raise InputError(
                f"config file {self.config_file!r} has no model.backbone.net or no dataloader; "
                "give a detection config such as configs/coco/mask_rcnn_flsl_vit_s16_1x.py."
            )
        use_own_data(cfg, eval_only=False)
        return cfg

    def names(self, split: str) -> list[str]:
        """Return the data sets of ``train`` or ``test``."""
        return names_of(self.config.dataloader[split].dataset.names)

    @cached_property
    def labelled(self) -> Records:
        """Records to train on, after a check of all data."""
        check_datasets(
            self.names("train"),
            self.names("test"),
            OmegaConf.select(self.config, "model.roi_heads.num_classes"),
            "model.roi_heads.num_classes=",
            image_format=OmegaConf.select(self.config, "dataloader.train.mapper.image_format"),
        )
        records: Records = instantiate(self.config.dataloader.train.dataset)
        return records

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that a result depends on but the encoder, the share and the seed."""
        test = self.names("test")
        return {
            "config": result_settings(self.config, (*DETECTION_KEYS.no_effect, *_IDENTIFIED)),
            "train": [data_identity(name) for name in self.names("train")],
            # The names of several test sets are in those of their scores.
            "test": [[name * (len(test) > 1), data_identity(name)] for name in test],
        }


@dataclass(frozen=True)
class DetectionEvaluation:
    """Fine-tuning a detector from the encoder, and its AP, by ``python -m flsl_d2.detection``.

    The config's encoder takes the architecture of the weights; everything else stays the config's.
    ``share`` is the part of the labelled images to train on, or their number; None for all.
    """

    task: DetectionTask
    detector: str = "detection"
    share: int | float | None = None

    @property
    def name(self) -> str:
        """Name of the detector, with the number of labelled images where only some are used."""
        return self.detector if self.share is None else f"{self.detector} {self.count} images"

    @property
    def shown_dataset(self) -> str:
        """First data set that AP is measured on."""
        return self.task.names("test")[0]

    @property
    def count(self) -> int:
        """Number of images to train on."""
        total = len(self.task.labelled)
        return total if self.share is None else count_of(self.share, total)

    def check(self) -> None:
        """Raise InputError for a config, overrides, data sets or a share that cannot be used."""
        _ = self.count

    def write_draw(self, folder: Path, seed: int) -> str:
        """Write the names of the images that a seed draws, a line each; return what they are."""
        chosen = drawn(self.task.labelled, self.count, seed)
        lines = sorted(record["file_name"] for record in chosen)
        path = folder / f"{Path(self.task.config_file).stem}_{self.count}_images_seed_{seed}.txt"
        write_text(path, "".join(f"{line}\n" for line in lines))
        return f"{path.name}: {describe_draw(self.task.labelled, chosen)}"

    def job(self, encoder: EncoderFile) -> Job:
        """Make the job of an encoder."""
        task, few, node = self.task, [], "dataloader.train.dataset"
        settings = {"encoder": dict(encoder.identity), **task.settings, "seed": encoder.seed}
        if self.share is not None:
            settings["labelled images"] = self.count
            target = OmegaConf.select(task.config, node)._target_
            loader = target if isinstance(target, str) else _full_name(target)
            few = [
                f"+{node}.loader={loader}",
                f"{node}._target_={_full_name(few_labels)}",
                *(f"+{node}.count={self.count}", f"+{node}.draw={encoder.seed}"),
            ]

        def command(folder: Path, num_processes: int) -> list[str]:
            return [
                *("-m", "flsl_d2.detection", "--config-file", task.config_file),
                *("--resume", "--num-gpus", str(num_processes), *task.overrides, *few),
                *encoder_overrides(encoder.path, task.config),
                f"train.output_dir={folder}",
                f"train.seed={encoder.seed}",
                f"train.device={task.device}",
            ]

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
                raise InputError(
                    "the run ended without an AP: it was not evaluated, or the detector found "
                    "nothing on the test images, as after too few steps."
                )
            return Outcome(values)

        return encoder.job(self.name, settings, command, outcome)


Evaluation = FeatureEvaluation | DavisEvaluation | DetectionEvaluation


def _full_name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def encoder_overrides(source: str, cfg: DictConfig) -> list[str]:
    """Return overrides that put an encoder into a detection config.

    A weight file gives the config's FLSLViT its architecture. A timm model takes the place of the
    FLSLViT under the pyramid that fits.
    """
    if source.startswith(TIMM_PREFIX):
        return _timm_overrides(source, cfg)
    overrides = []
    for key, value in build_encoder(source).architecture.items():
        if key not in _CHOSEN_BY_DETECTOR:
            new = "" if key in cfg.model.backbone.net else "+"
            text = "null" if value is None else str(value).lower()
            overrides.append(f"{new}model.backbone.net.{key}={text}")
    return [*overrides, f"train.init_checkpoint={source}"]


def _timm_overrides(source: str, cfg: DictConfig) -> list[str]:
    old = cfg.model.backbone
    kept = [
        ",".join(f"{key}:{node[key]}" for key in keys if key in node)
        for node, keys in (
            (old.net, ("frozen", "use_act_checkpoint")),
            (old, ("out_channels", "norm", "square_pad")),
        )
    ]
    net = f"{{_target_:flsl_d2.modeling.build_timm_backbone,text:'{source}',{kept[0]}}}"
    pyramid = f"{{_target_:flsl_d2.modeling.timm_pyramid,net:{net},{kept[1]}}}"
    return ["model.backbone=null", f"+model.backbone={pyramid}", "train.init_checkpoint=''"]


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose evaluations, read by :func:`chosen_evaluations`."""
    for name in ("--train", "--val", "--max-images", "--short-side", "--davis-root"):
        add_option(parser, name)
    default = ",".join(_DEFAULT_MEASURES)
    text = f"measures of frozen features, with --train and --val (default: {default})"
    add_option(parser, "--measures", help=text)
    for name, text in (
        ("--detection", "detection config to fine-tune from each encoder; may be repeated"),
        ("--frozen-detection", "the same with the encoder's weights held fixed"),
        ("--detection-override", "change to the detection configs; may be repeated"),
    ):
        metavar = "KEY=VALUE" if name.endswith("override") else "FILE"
        parser.add_argument(name, action="append", default=[], metavar=metavar, help=text)
    parser.add_argument(
        "--label-fraction",
        type=shares,
        metavar="0.01,0.1",
        help="train the detectors on these shares of the labelled images, or numbers such as "
        "12,120; the draw has the seed of the run, and smaller ones are parts of larger ones",
    )


def chosen_evaluations(args: argparse.Namespace, device: str) -> list[Evaluation]:
    """Make and check the evaluations that a command line asks for; InputError if they cannot be."""
    if bool(args.train) != bool(args.val):
        raise InputError("--train and --val belong together; give both or neither.")
    if args.measures and not args.val:
        raise InputError(
            f"--measures {','.join(args.measures)} needs data; give --train NAME and --val NAME."
        )
    if not (args.detection or args.frozen_detection):
        if args.label_fraction:
            raise InputError(
                "--label-fraction is for detectors; add --detection CONFIG.py or "
                "--frozen-detection."
            )
        if args.detection_override:
            raise InputError(
                f"override {args.detection_override[0]!r} is for a detection config, and there is "
                "none; add --detection CONFIG.py."
            )
    evaluations: list[Evaluation] = [
        FeatureEvaluation(name, args.train, args.val, device, args.max_images, args.short_side)
        for name in ((args.measures or _DEFAULT_MEASURES) if args.val else ())
    ]
    if args.davis_root:
        evaluations.append(DavisEvaluation(args.davis_root, device))
    for name, configs, more in (
        ("detection", args.detection, []),
        ("frozen detection", args.frozen_detection, ["model.backbone.net.frozen=True"]),
    ):
        for config in configs:
            title = f"{name} {Path(config).stem}" if len(configs) > 1 else name
            task = DetectionTask(config, [*args.detection_override, *more], device)
            shares_of = args.label_fraction or [None]
            evaluations += [DetectionEvaluation(task, title, share) for share in shares_of]
    for evaluation in evaluations:
        evaluation.check()
    names = [evaluation.name for evaluation in evaluations]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise InputError(
            f"two evaluations are called {repeated[0]!r}; name each config and share once."
        )
    return evaluations
