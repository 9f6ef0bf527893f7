"""Detection as an evaluation of an encoder: fine-tune the same detector, measure its AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from flsl_d2.checkpoint import build_encoder
from flsl_d2.comparison.evaluations import EncoderFile
from flsl_d2.comparison.jobs import Job, Outcome, config_settings
from flsl_d2.engine.checks import check_datasets, names_of
from flsl_d2.engine.config_files import is_yaml, load_lazy_config
from flsl_d2.errors import InputError
from flsl_d2.modeling import FLSLViT
from flsl_d2.visualization.curves import read_metrics

__all__ = ["DetectionEvaluation", "architecture_overrides"]

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
        ignored = ("train.output_dir", "train.init_checkpoint", "train.seed", "train.checkpointer")
        settings = {
            "encoder": dict(encoder.identity),
            "config": config_settings(cfg, ignored),
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
            values = {
                f"{self.name}/{name}": series[key][1][-1]
                for key, name in _AP.items()
                if key in series
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
