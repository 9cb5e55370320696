"""The lab that runs a method's stages: engines, data, evaluation and finished results."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from megakd.config.sections import total_steps
from megakd.config.task import STUDENT
from megakd.data.arrow import column_of
from megakd.data.batch import ROUTE, teacher_number
from megakd.data.loader import rows_with_targets
from megakd.engine.collectives import doing, main_first, on_main
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.models.fitting import ModelSource, parts_of
from megakd.models.loading import resolve_model
from megakd.reports.report_file import read_history, rising_teachers
from megakd.run.teacher_pool import Measured, TeacherPool, measure
from megakd.stage import Stage, StageResult
from megakd.training.assembly import Assembly, check_stream, step_shape
from megakd.training.inputs import RunInputs
from megakd.training.lab import Files, Lab, Metric, Pruning
from megakd.training.log import Reporter
from megakd.training.metrics import check_weighed
from megakd.training.precision import saved_dtype
from megakd.training.recipes import specified
from megakd.training.stage_folder import length_of, may_grow, read_result
from megakd.training.stage_run import run_stage, stage_checkpoints

if TYPE_CHECKING:
    from megakd.training.pruning import ModelPruning

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RunLab(Lab):
    """Runner of the stages of one run config; each stage runs once. See `training.lab.Lab`.

    pool: the frozen teachers of all stages.
    """

    def __init__(self, prepared: RunInputs, ranks: Ranks, reporter: Reporter) -> None:
        super().__init__(prepared.config, prepared.sources)
        self._prepared, self._ranks, self._reporter = prepared, ranks, reporter
        self.assembly = Assembly(prepared=prepared, ranks=ranks, teachers=self._teachers)
        self.pool = TeacherPool(self.assembly)
        self._pruning: ModelPruning | None = None

    @property
    def pruning(self) -> Pruning:
        """The tools of methods that cut models."""
        from megakd.training.pruning import ModelPruning

        if self._pruning is None:
            self._pruning = ModelPruning(
                self.assembly, self.results, source=self.source, close=self.close
            )
        return self._pruning

    def dev_score(self, name: str) -> float:
        scored = self.assembly.measured_once(f"{name}-scored", lambda: self.pool.score(name))
        return self._prepared.metric.worth(scored.metrics)

    def metric(self, *, weighed: bool = True) -> Metric:
        if weighed:
            check_weighed(self._prepared.metric, self._prepared.metrics.names)
        return self._prepared.metric

    def train(self, stage: Stage, files: Files = dict) -> StageResult:
        stage = self._completed(stage)
        folder = self.assembly.stage_folder(stage.name)
        grows = may_grow(stage, self.config)
        result = read_result(folder, length_of(stage.train), may_grow=grows)
        if result is not None:
            logger.info("%s: already finished, taken from %s", stage.name, folder)
        else:
            if stage.name == STUDENT and stage.start and self.config.start_role != STUDENT:
                whole = self._teachers[self.config.start_role].source
                logger.info("%s: %s", STUDENT, parts_of(stage.start, whole, self.record.layers))
            result = self._run(stage, folder, files)
        self.results.append(result)
        return result

    def _run(self, stage: Stage, folder: Path, files: Files) -> StageResult:
        # Before any model is loaded, because a checkpoint may be refused.
        checkpoints = stage_checkpoints(stage, self.assembly)
        checkpoint = checkpoints.to_resume()
        if checkpoint is not None:
            on_main(lambda: check_stream(checkpoint, self._ranks))
        elif on_main(folder.exists):
            raise CheckpointError(
                f"{folder} has finished, and its checkpoints were removed, so it cannot get more "
                f"steps; start from it in another run ({self.config.key_of(stage.role)}.model="
                f"{folder}), or remove it to train it again with save.keep=true"
            )
        with self.pool.of_stage(stage) as teachers:
            result = run_stage(
                stage,
                self.assembly,
                teachers=teachers,
                reporter=self._reporter,
                checkpoint=checkpoint,
                files=files,
            )
        if self._ranks.is_main and stage.name == f"{stage.role}-finetune":
            # Before the student is trained; the report has the warning too.
            history = read_history(self.config.output_dir / "metrics.jsonl")
            for message in rising_teachers([stage.role], self._prepared.metric.name, history):
                logger.warning("warning: %s", message)
        return result

    def close(self) -> None:
        self.pool.close()

    def rows_of_teachers(self) -> dict[str, int]:
        counts = Counter(column_of(self._prepared.encoded.train, ROUTE).tolist())
        return {name: counts[teacher_number(name)] for name in self.config.teacher_specs}

    def steps_of_student(self) -> int:
        shape = step_shape(self.config.train, self._ranks)
        learned = len(rows_with_targets(self._prepared.encoded.train))
        return total_steps(self.config.train, shape.steps_per_epoch(learned))

    def made_by(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        return main_first(lambda: read(str(result.folder / name)))

    def cache(self, name: str) -> Path:
        """Cache a teacher's answers to the training rows in the configured folder; a collective."""
        folder = self.pool.cache_folder(name)
        self.close()
        from megakd.training.served_teachers import fill_cache

        fill_cache(self.assembly, self._teachers[name], folder)
        return folder

    def _source(self, folder: Path, role: str) -> ModelSource:
        where = f"{self.config.key_of(role)}.model"
        source = main_first(lambda: resolve_model(str(folder), self.config.task, where=where))
        return specified(source, self.config.teacher_specs.get(role, self.config.student))

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of the weights of the student in `final/`."""
        return saved_dtype(self.config, self._prepared.sources)

    @doing("scoring a finished model")
    def measure(self, folder: Path) -> Measured:
        """Return what the report says of a finished model of the run; a collective.

        It is scored as it would be stored in `final/`, whatever a stage was trained in.
        """
        # The model has the student's tokenizer.
        self.close()
        source = self.source(folder)
        stored = {name: one.rounded(self.saved_dtype) for name, one in source.stored.items()}
        source = dataclasses.replace(source, stored=stored)
        with self.assembly.scored(source) as model:
            return measure(self.assembly, model, self.pool.prompts)
