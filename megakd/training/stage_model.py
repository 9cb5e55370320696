"""The model folder of a stage, written from the engine or copied from the best evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megakd.contract.batch import BatchSource
from megakd.contract.stage import Stage
from megakd.contract.tasks import THRESHOLD
from megakd.contract.views import Cut
from megakd.data.chat.counts import learned_ends
from megakd.engine.collectives import on_main, together
from megakd.engine.student import StudentEngine
from megakd.losses.bundle import StudentBundle
from megakd.models.cutting import content_of
from megakd.models.generation import generation_file
from megakd.models.lora import adapter_config, adapter_files, load_adapters
from megakd.scoring.metrics import Evaluation
from megakd.storage.folders import copy_finished, write_finished
from megakd.training.assembly import Assembly
from megakd.training.best_checkpoint import ReturnedWeights
from megakd.training.stage_folder import WindowState, consume, write_stage_folder


class StageModel(NamedTuple):
    """The models that learn in a stage, as folders; every method is a collective.

    source: the batches of the stage, whose position the next window of a run continues.
    """

    stage: Stage
    assembly: Assembly
    student: StudentEngine
    bundle: StudentBundle
    source: BatchSource

    def write_returned(
        self, folder: Path, record: Mapping[str, str | bytes], kept: ReturnedWeights
    ) -> None:
        best, student = kept.folder, self.bundle.student
        if best is not None and adapter_config(student) is not None:
            load_adapters(student, best)
            best = None
        if best is None:
            self._write(folder, record, kept.chosen, goes_on=self.stage.goes_on)
            return
        remedy = f"remove {best} and start the same command again"
        on_main(lambda: copy_finished(best, folder, changes=record, remedy=remedy))

    def write_best(self, folder: Path, evaluation: Evaluation) -> None:
        student = self.bundle.student
        if adapter_config(student) is None:
            self._write(folder, {}, evaluation)
            return
        files = adapter_files(student)
        on_main(lambda: write_finished(folder, files))

    def _write(
        self,
        folder: Path,
        extra: Mapping[str, str | bytes],
        evaluation: Evaluation,
        *,
        goes_on: bool = False,
    ) -> None:
        stage, role, (first, *beside) = self.stage, self.stage.role, self.bundle.learners
        view = stage.views.get(evaluation.view or "")
        cut = evaluation.cut or (None if view is None else Cut(None, view))
        of_role = self.assembly.prepared.tokenizer_of
        if THRESHOLD in evaluation.metrics:
            model_config: Any = first.config
            model_config.threshold = evaluation.metrics[THRESHOLD]
        models = {role: content_of(first, of_role(role), cut=cut, learns=goes_on)}
        for name, model in zip(stage.beside, beside, strict=True):
            models[name] = content_of(model, of_role(name))
        window = None
        if goes_on:
            axes = self.bundle.axes
            window = WindowState.of(self.student, stage.strategy, self.source, axes=axes, cut=cut)

        def write() -> None:
            if self.assembly.ranks.is_main:
                files = dict(extra)
                if self.assembly.config.task.type == "causal_lm":
                    source = self.assembly.learners(stage)[role]
                    ends = learned_ends(self.assembly.prepared.of(role).encoded.chat)
                    files = {**generation_file(source, of_role(role), ends), **extra}
                write_stage_folder(folder, models, extra=files, window=window)
            else:
                consume(models, window)

        together(write)
