"""Weights & Biases and MLflow beside TensorBoard, as Detectron2's writers."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from flsl_d2.errors import InputError
from flsl_d2.files import write_text

logger = logging.getLogger(__name__)

# Ids of the runs at the trackers, so that a resumed run continues them.
IDS_FILE = "trackers.json"
_WINDOW = 20  # steps whose median stands for a noisy value, as in Detectron2's TensorBoard writer
_MOST_PARAMETERS = 100  # of a call to MLflow
_LONGEST_VALUE = 500


class ScalarWriter(EventWriter):
    """Send the scalars of the storage that are new since the last call; a failure is logged once.

    The name of the run is that of its output folder.
    """

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last_step = -1
        self._has_failed = False

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint(_WINDOW)
        new = {name: (float(v), step) for name, (v, step) in latest.items()}
        new = {name: pair for name, pair in new.items() if pair[1] > self._last_step}
        if not new:
            return
        self._last_step = max(step for _, step in new.values())
        try:
            self.send(new)
        except Exception:
            if not self._has_failed:
                logger.warning("%s cannot be written; the run goes on.", self.name, exc_info=True)
            self._has_failed = True

    def send(self, scalars: Mapping[str, tuple[float, int]]) -> None:
        raise NotImplementedError

    def _ids(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / IDS_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def kept_id(self) -> str | None:
        return self._ids().get(self.name)

    def keep_id(self, run: str) -> None:
        write_text(self.folder / IDS_FILE, json.dumps({**self._ids(), self.name: run}))


class WandbWriter(ScalarWriter):
    """Weights & Biases; offline where ``WANDB_MODE`` says so or no key is there.

    An offline run lies in ``<folder>/wandb``, and ``wandb sync`` sends it later. wandb's variables
    hold.
    """

    name = "wandb"

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        super().__init__(folder)
        wandb = _imported("wandb", "wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flsl-d2"),
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            id=self.kept_id(),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.keep_id(self.run.id)

    def send(self, scalars: Mapping[str, tuple[float, int]]) -> None:
        for step in sorted({step for _, step in scalars.values()}):
            self.run.log({n: v for n, (v, own) in scalars.items() if own == step}, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowWriter(ScalarWriter):
    """MLflow, at ``MLFLOW_TRACKING_URI`` or in the files of ``<folder>/mlruns``."""

    name = "mlflow"

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        super().__init__(folder)
        # MLflow asks for a database, unless files are allowed.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = _imported("mlflow", "mlflow-skinny")
        self._entities = _imported("mlflow.entities", "mlflow-skinny")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self.client = mlflow.MlflowClient(tracking_uri=place)
        self.run = self.kept_id() or self._new_run(settings)
        self.keep_id(self.run)

    def _new_run(self, settings: Mapping[str, str]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "flsl-d2")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        run: str = self.client.create_run(experiment, run_name=self.folder.name).info.run_id
        parameter = self._entities.Param
        values = [parameter(_allowed(k), v[:_LONGEST_VALUE]) for k, v in settings.items()]
        for first in range(0, len(values), _MOST_PARAMETERS):
            self.client.log_batch(run, params=values[first : first + _MOST_PARAMETERS])
        return run

    def send(self, scalars: Mapping[str, tuple[float, int]]) -> None:
        metric, now = self._entities.Metric, int(1000 * time.time())
        metrics = [metric(_allowed(n), v, now, step) for n, (v, step) in scalars.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", name)


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"train.trackers names {module.split('.')[0]}, whose package {package} is not "
            f"installed ({error}); install it with pip install 'flsl-d2[trackers]'."
        ) from None


TRACKERS: dict[str, type[WandbWriter] | type[MlflowWriter]] = {
    "wandb": WandbWriter,
    "mlflow": MlflowWriter,
}


def build_trackers(
    names: Sequence[str], folder: str | Path, settings: Mapping[str, str]
) -> list[EventWriter]:
    """Start the trackers that ``train.trackers`` names; called in the main process alone.

    Raises:
        InputError: a name is unknown, a package is missing, or a tracker cannot be started.
    """
    names = [names] if isinstance(names, str) and names else list(names)
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise InputError(
            f"train.trackers names {', '.join(unknown)}; use a list of {', '.join(TRACKERS)}."
        )
    started: list[EventWriter] = []
    for name in names:
        try:
            started.append(TRACKERS[name](Path(folder), settings))
        except Exception as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the tracker {name} cannot be started ({' '.join(str(error).split())}); check "
                "its own settings, or leave it out of train.trackers."
            ) from error
    return started
