"""Services that log a run; one that fails is told of once, and the training goes on without it."""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megakd.errors import ConfigError, one_line
from megakd.process import files

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


_RUN_IDS = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if the package of a service of `log.report_to` is not installed."""
    from accelerate.tracking import get_available_trackers

    for name in set(names).difference(map(str, get_available_trackers())):
        raise ConfigError(
            f"log.report_to: {name} is not installed; install the package (pip install {name}), or "
            f"remove {name} from log.report_to"
        )


class Trackers:
    """The services of `log.report_to`, which show `config` beside the curves; for one rank.

    WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names the project.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._names, self._folder, self._config = [*names], folder, config
        self._running: dict[str, Any] = {}

    def begin(self, stage: str, step: int) -> None:
        """Start the runs of a stage, or continue them if `step` steps were logged before."""
        self.close()
        path = self._folder / _RUN_IDS
        ids: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        of_stage = ids.get(stage) if step else None
        ids[stage] = of_stage or {"id": uuid.uuid4().hex}
        for name in [*self._names]:
            with self._dropped_on_failure(name):
                self._running[name] = self._started(name, stage, step, ids[stage])
        if self._names not in ([], ["tensorboard"]):
            files.write_json(path, ids)

    def _started(self, name: str, stage: str, step: int, ids: dict[str, str]) -> Any:
        from accelerate import tracking

        run_name, out = f"{self._folder.name}/{stage}", str(self._folder)
        project = os.environ.get("WANDB_PROJECT", "megakd")
        options: dict[str, Any] = {}
        if name == "tensorboard":
            # Steps after a checkpoint are logged again. A full disk is met by `log`, which flushes,
            # and not by the writer's own thread.
            options = {"purge_step": step + 1 if step else 0, "flush_secs": 10**9}
            project, options["logging_dir"] = stage, f"{out}/tensorboard"
        elif name == "wandb":
            options = {"id": ids["id"], "resume": "allow", "name": run_name, "dir": out}
            options["group"] = self._folder.name
        elif name == "swanlab":
            options = {"id": ids["id"], "resume": "allow", "experiment_name": run_name}
        elif name == "trackio":
            options = {"name": f"{run_name}-{ids['id'][:6]}", "resume": "allow"}
        elif name == "mlflow":
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megakd")
            options = {"run_name": run_name, "run_id": ids.get(name)}
        tracker = tracking.LOGGER_TYPE_TO_CLASS[name](project, **options)
        # Both ask accelerate's own state for the rank, which would set threads and devices anew.
        tracker.main_process_only = False
        tracking.logger = cast("Any", logging.getLogger(tracking.__name__))
        tracker.start()
        if step == 0 and name != "tensorboard":
            tracker.store_init_configuration({k: str(v) for k, v in self._config.items()})
        if name == "mlflow":
            ids[name] = tracker.active_run.info.run_id
        return tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimizer step of the stage that has begun."""
        named = {re.sub(r"[^\w. /-]", "_", key): value for key, value in values.items()}
        for name, tracker in [*self._running.items()]:
            with self._dropped_on_failure(name):
                tracker.log(named, step=step)

    def close(self) -> None:
        """Close all runs."""
        for name in [*self._running]:
            with self._dropped_on_failure(name):
                self._running.pop(name).finish()

    @contextmanager
    def _dropped_on_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a service may raise anything
            self._names.remove(name)
            self._running.pop(name, None)
            logger.warning(
                "log.report_to: %s failed (%s): no further values of this run are sent there; "
                "metrics.jsonl has all values",
                *(name, one_line(error)),
            )
