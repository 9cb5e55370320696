"""Services for logged numbers besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

Each stage is a separate run of the service, so that its steps begin at 0 and a resumed stage
continues its curve. Only the main rank uses trackers. The trackers of accelerate neither continue
the run of a stage nor survive a full disk or a server that is gone.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megakd.errors import ConfigError
from megakd.storage import atomic

logger = logging.getLogger(__name__)
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_RUN_IDS = "trackers.json"


class Tracker(Protocol):
    """A service that draws curves."""

    def begin(self, stage: str, step: int) -> None:
        """Start a stage, or continue it if `step` steps were logged before."""
        ...

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimiser step."""
        ...

    def close(self) -> None:
        """Close all open runs; a later `log` opens them again."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a library of `log.report_to` cannot be imported."""
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ConfigError(
                f"log.report_to: {name} cannot be imported ({error}); install the package "
                f"(pip install {name}), or remove {name} from log.report_to"
            ) from error


def make_trackers(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Return the trackers of `log.report_to`; they show `config` beside the curves."""
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder),
        "wandb": lambda: WeightsAndBiases(folder, config),
        "mlflow": lambda: MLflow(folder, config),
    }
    return [makers[name]() for name in names]


class TensorBoard:
    """Event files in `output_dir/tensorboard/<stage>`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._lost = False

    def begin(self, stage: str, step: int) -> None:
        """Remove the entries after `step`, because these steps are repeated."""
        if self._lost:
            return
        with self._forgiving():
            if stage in self._writers:
                self._writers.pop(stage).close()
            self._open(stage, purge_step=step + 1 if step else 0)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers and flush them; if the disk is full, warn once and write no more."""
        if self._lost:
            return
        with self._forgiving():
            if stage not in self._writers:
                self._open(stage, purge_step=None)
            for key, value in values.items():
                self._writers[stage].add_scalar(key, value, step)
            self._writers[stage].flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._lost:
                logger.warning(
                    "%s cannot be written (%s): no further values of this run are written to "
                    "TensorBoard; metrics.jsonl has all values",
                    *(self._folder, error.strerror or error),
                )
            self._lost = True

    def _open(self, stage: str, *, purge_step: int | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = self._folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        # The writer's own thread writes first, and would print a traceback on a failure.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
        # Files are flushed after every log, by the thread that can handle a failure.
        self._writers[stage] = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10**9)

    def close(self) -> None:
        while self._writers:
            with self._forgiving():
                self._writers.popitem()[1].close()


class _Service:
    """A service with one run per stage, whose ids the output folder keeps for a resumed run."""

    name: str

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config

    @property
    def _library(self) -> Any:  # other ranks, which make trackers too, may not have it
        return importlib.import_module(self.name)

    def _known(self, stage: str, step: int) -> str | None:
        return self._ids().get(self.name, {}).get(stage) if step else None

    def _remember(self, stage: str, run_id: str) -> None:
        ids = self._ids()
        ids[self.name] = {**ids.get(self.name, {}), stage: run_id}
        atomic.write_json(self._folder / _RUN_IDS, ids)

    def _ids(self) -> dict[str, dict[str, str]]:
        path = self._folder / _RUN_IDS
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}


class WeightsAndBiases(_Service):
    """Tracker with one wandb run per stage, all in one group; WANDB_PROJECT names the project."""

    name = "wandb"
    step = "step"
    """Axis of the curves: wandb's own never goes back, but a resumed stage repeats some steps."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._run: Any = None
        self._stage: str | None = None

    def begin(self, stage: str, step: int) -> None:
        self.close()
        known = self._known(stage, step)
        try:
            self._run = self._library.init(
                project=os.environ.get("WANDB_PROJECT", "megakd"),
                group=self._folder.name,
                name=f"{self._folder.name}/{stage}",
                dir=str(self._folder),
                config=dict(self._config),
                id=known,
                resume="allow" if known else None,
            )
        except self._library.Error as error:
            raise ConfigError(
                f"log.report_to: wandb cannot start ({error}); run `wandb login`, set "
                "WANDB_MODE=offline, or remove wandb from log.report_to"
            ) from error
        self._run.define_metric(self.step)
        self._run.define_metric("*", step_metric=self.step)
        self._stage = stage
        self._remember(stage, self._run.id)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers; wandb sends them again after a lost connection."""
        if self._stage != stage:
            self.begin(stage, step)
        self._run.log({self.step: step, **values})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = self._stage = None


class MLflow(_Service):
    """Tracker with one run per stage, at MLFLOW_TRACKING_URI in MLFLOW_EXPERIMENT_NAME."""

    name = "mlflow"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config)
        self._runs: dict[str, str] = {}
        self._lost = False

    def begin(self, stage: str, step: int) -> None:
        try:
            self._runs[stage] = self._known(stage, step) or self._start(stage)
        except self._library.MlflowException as error:
            raise ConfigError(
                f"log.report_to: mlflow cannot start ({error}); check MLFLOW_TRACKING_URI, or "
                "remove mlflow from log.report_to"
            ) from error

    def _start(self, stage: str) -> str:
        client = self._library.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megakd")
        experiment = self._library.set_experiment(name).experiment_id
        run = client.create_run(experiment, run_name=f"{self._folder.name}/{stage}")
        client.log_dict(run.info.run_id, dict(self._config), "config.json")
        self._remember(stage, run.info.run_id)
        return run.info.run_id

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers; if the server does not answer, warn once and send no more."""
        if self._lost:
            return
        entities = importlib.import_module("mlflow.entities")
        if stage not in self._runs:
            self.begin(stage, step)
        now = int(time.time() * 1000)
        metrics = [entities.Metric(_mlflow_name(k), v, now, step) for k, v in values.items()]
        try:
            self._library.MlflowClient().log_batch(self._runs[stage], metrics=metrics)
        except self._library.MlflowException as error:
            self._lost = True
            logger.warning(
                "mlflow does not respond (%s): no further values of this run are sent to mlflow; "
                "metrics.jsonl has all values",
                error,
            )

    def close(self) -> None:
        for stage, run_id in self._runs.items():
            try:
                self._library.MlflowClient().set_terminated(run_id)
            except self._library.MlflowException as error:
                logger.warning("mlflow: the run of %s could not be closed: %s", stage, error)
        self._runs.clear()


def _mlflow_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in key)
