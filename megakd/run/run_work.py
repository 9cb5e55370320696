"""The work of a run: stages are trained on its data, and models scored, sorted, timed and cut."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from megakd.config.task import STUDENT, TEACHER
from megakd.engine.collectives import activity, main_first, on_main
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.models.fitting import ModelSource, ReadyTeacher, parts_of, specified
from megakd.models.loading import resolve_model
from megakd.models.views import View
from megakd.reports.report_file import read_history, rising_teachers
from megakd.run.teacher_pool import Measured, TeacherPool, measure
from megakd.stage import Stage, StageResult
from megakd.training.allocation import SortedTeacher
from megakd.training.assembly import Assembly
from megakd.training.batches import check_stream
from megakd.training.evaluation import StageProbe, probe_for
from megakd.training.expert_importance import expert_order
from megakd.training.facts import RunFacts
from megakd.training.inputs import RunInputs
from megakd.training.lab import Files
from megakd.training.log import Reporter
from megakd.training.precision import saved_dtype
from megakd.training.pruning import (
    keeps_all,
    score_layers,
    sort_units,
    time_views,
    write_reshaped,
)
from megakd.training.record import MethodRecord
from megakd.training.stage_folder import cached_metrics, length_of, may_grow, read_result
from megakd.training.stage_run import run_stage, stage_checkpoints

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RunWork:
    """What trains, scores and cuts for one run; each stage runs once. See `training.lab.Work`.

    pool: the frozen teachers of all stages.
    """

    def __init__(self, prepared: RunInputs, ranks: Ranks, reporter: Reporter) -> None:
        self._prepared, self._ranks, self._reporter = prepared, ranks, reporter
        self.facts = RunFacts(
            prepared.config, prepared.sources, world=ranks.world_size, inputs=prepared
        )
        self.teachers: dict[str, ReadyTeacher] = {}
        self.results: list[StageResult] = []
        self.record = MethodRecord()
        self.assembly = Assembly(prepared=prepared, ranks=ranks, teachers=self.teachers)
        self.pool = TeacherPool(self.assembly)

    def train(self, stage: Stage, files: Files) -> StageResult:
        folder = self.assembly.stage_folder(stage.name)
        grows = may_grow(stage, self.facts.config)
        result = read_result(folder, length_of(stage.train), may_grow=grows)
        if result is not None:
            logger.info("%s: already finished, taken from %s", stage.name, folder)
        else:
            if stage.name == STUDENT and stage.start and self.facts.config.start_role != STUDENT:
                whole = self.teachers[self.facts.config.start_role].source
                logger.info("%s: %s", STUDENT, parts_of(stage.start, whole, self.record.layers))
            result = self._run(stage, folder, files)
        return result

    def _run(self, stage: Stage, folder: Path, files: Files) -> StageResult:
        # Before any model is loaded, because a checkpoint may be refused.
        checkpoint, config = stage_checkpoints(stage, self.assembly).to_resume(), self.facts.config
        if checkpoint is not None:
            on_main(lambda: check_stream(checkpoint, self._ranks))
        elif on_main(folder.exists):
            raise CheckpointError(
                f"{folder} has finished, and its checkpoints were removed, so it cannot get more "
                f"steps; start from it in another run ({config.key_of(stage.role)}.model="
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
            history = read_history(config.output_dir / "metrics.jsonl")
            for message in rising_teachers([stage.role], self._prepared.metric.name, history):
                logger.warning("warning: %s", message)
        return result

    def close(self) -> None:
        self.pool.close()

    def model(self, folder: Path, role: str) -> ModelSource:
        config = self.facts.config
        where = f"{config.key_of(role)}.model"
        source = main_first(lambda: resolve_model(str(folder), config.task, where=where))
        return specified(source, config.teacher_specs.get(role, config.student))

    def read_file(self, result: StageResult, name: str, read: Callable[[str], T]) -> T | None:
        return main_first(lambda: read(str(result.folder / name)))

    def score(self, teacher: str) -> Mapping[str, float]:
        scores = partial(self.pool.score, teacher)
        return cached_metrics(self.assembly.stage_folder(f"{teacher}-scored"), scores).metrics

    def unit_scores(self, teacher: str) -> SortedTeacher:
        self.close()
        result, scores = sort_units(self.assembly, self.teachers[teacher])
        self._list(result)
        return SortedTeacher(source=self.model(result.folder, STUDENT), scores=scores)

    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        self.close()
        result, scores = score_layers(self.assembly, self.teachers[teacher])
        self._list(result)
        return scores

    def times(
        self, source: ModelSource, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        self.close()
        result = time_views(self.assembly, source, views, name)
        self._list(result)
        return result.metrics

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return a model cut to a view in `stages/<name>`, untrained; `source` for a whole view."""
        if keeps_all(source, view):
            return source

        def change() -> Mapping[str, object]:
            count = view.experts
            if count is None:
                return {"view": view}
            self.close()
            ready = ReadyTeacher(source, self.facts.config.teacher_specs[TEACHER])
            return {"view": view, "order": expert_order(self.assembly, ready, count)}

        result = write_reshaped(self.assembly, name, source, change)
        return self.model(result.folder, STUDENT)

    def probe(self, stage: str) -> StageProbe:
        return probe_for(self.assembly, stage)

    def _list(self, result: StageResult) -> None:
        # As metrics of a stage, the scores of layers would be columns of the report.
        if all(known.name != result.name for known in self.results):
            self.results.append(dataclasses.replace(result, metrics={}))

    def cache(self, name: str) -> Path:
        """Cache a teacher's answers to the training rows in the configured folder; a collective."""
        folder = self.pool.cache_folder(name)
        self.close()
        from megakd.training.served_teachers import fill_cache

        fill_cache(self.assembly, self.teachers[name], folder)
        return folder

    @property
    def saved_dtype(self) -> torch.dtype:
        """The dtype of the weights of the student in `final/`."""
        return saved_dtype(self.facts.config, self._prepared.sources)

    @activity("scoring a finished model")
    def measure(self, folder: Path) -> Measured:
        """Return what the report says of a finished model of the run; a collective.

        It is scored as it would be stored in `final/`, whatever a stage was trained in.
        """
        # The model has the student's tokenizer.
        self.close()
        source = self.model(folder, STUDENT)
        stored = {name: one.rounded(self.saved_dtype) for name, one in source.stored.items()}
        source = dataclasses.replace(source, stored=stored)
        with self.assembly.scored(source) as model:
            return measure(self.assembly, model, self.pool.prompts)
