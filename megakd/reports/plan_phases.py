"""The phases of a run: its method runs in a lab that does not train, on models without weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from megakd.config.deepspeed import frozen_on, load_ds_config
from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig, TrainConfig, learning_rate_schedule, total_steps
from megakd.config.task import AUTO, LANGUAGE_TASKS, STUDENT, TaskConfig, TokenizerConfig
from megakd.data.loader import StepShape, rows_with_targets
from megakd.engine.distributed import Ranks
from megakd.losses.objective import stage_losses
from megakd.methods import run_method
from megakd.models.fitting import ModelSource, ReadyTeacher, check_length
from megakd.models.loading import with_vocabulary
from megakd.models.quantized import check_quantized
from megakd.models.views import View
from megakd.process.terminal import in_home
from megakd.stage import Stage, StageResult
from megakd.training.allocation import SortedTeacher
from megakd.training.assembly import learning_models
from megakd.training.evaluation import FEW
from megakd.training.inputs import RunInputs, UnencodedInputs, resolve, with_student
from megakd.training.lab import Lab, baseline_stage
from megakd.training.metrics import check_weighed
from megakd.training.pruning import BATCH_ROWS, Shapes, shape_of_cut, unscored
from megakd.training.recipes import scoring_preset

_TRAINED_VOCABULARY = 8000
UNKNOWN_STEPS = 10**6
Work = Literal["training", "importance", "scoring"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run with a fixed set of models in memory.

    work: training, or a kind of work with frozen models.
    stage: the stage that is trained; None for other work.
    learners: the trained models by role; empty for other work.
    bases: by name, the teachers that are the learner without its adapters.
    teachers: the frozen models by name: teachers of a training, or the models of other work.
    rows: rows of a batch of other work on one rank.
    forwards: number of forwards of a rank in other work that is more than one pass.
    per_rows: the rows of such forwards if the data are not read; 0: `forwards` are all.
    """

    name: str
    work: Work = "training"
    stage: Stage | None = None
    learners: Mapping[str, ModelSource] = field(default_factory=dict)
    bases: Mapping[str, ModelSource] = field(default_factory=dict)
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)
    rows: int = 0
    forwards: int = 0
    per_rows: int = 0

    @property
    def learner(self) -> ModelSource:
        """The model that the stage returns."""
        return next(iter(self.learners.values()))

    @property
    def teaching(self) -> list[ModelSource]:
        return [*(ready.source for ready in self.teachers.values()), *self.bases.values()]


def planned_sources(config: RunConfig) -> dict[str, ModelSource]:
    """Return the models of the config by role, with matching vocabularies and classes."""
    sources = {
        role: resolve(spec, config, role, with_weights=False)
        for role, spec in config.loaded_models.items()
    }
    sources = with_student(config, sources)
    vocabulary, size = config.method.own_vocabulary, _vocabulary(config.task, sources)
    labels = next(iter(sources.values())).config.num_labels or 0
    planned = {}
    for role, source in sources.items():
        rows = vocabulary if vocabulary and role == STUDENT else size
        planned[role] = fitting = with_vocabulary(source, rows)
        if config.task.max_length is not None:  # else limited to the context of all models
            check_length(fitting, config.task)
        if config.task.type not in LANGUAGE_TASKS:
            changed = copy.deepcopy(fitting.config)
            changed.num_labels = 1 if config.task.type == "regression" else max(2, labels)
            planned[role] = dataclasses.replace(fitting, config=changed)
    return planned


def _vocabulary(task: TaskConfig, sources: Mapping[str, ModelSource]) -> int:
    if isinstance(task.tokenizer, TokenizerConfig):
        return task.tokenizer.vocab_size
    counted = _counted(in_home(task.tokenizer)) if task.tokenizer else None
    known = [s.config.vocab_size for s in sources.values() if not s.wants_vocabulary]
    return counted or (known[0] if known else _TRAINED_VOCABULARY)


def _counted(folder: Path) -> int | None:
    try:
        if (folder / "vocab.txt").is_file():
            with (folder / "vocab.txt").open(encoding="utf-8") as pieces:
                return sum(1 for _ in pieces)
        tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        pieces = tree["model"]["vocab"]  # a list, or numbers by piece
        numbers = pieces.values() if isinstance(pieces, dict) else range(len(pieces))
        return 1 + max([*numbers, *(token["id"] for token in tree.get("added_tokens", ()))])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class PlanningLab(Lab, Shapes):
    """Lab that records the stages of a method, and other work with models, instead of doing it.

    Without the data of the run (`prepared`), encoded, the numbers of steps are not known.
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Mapping[str, ModelSource],
        *,
        ranks: int,
        device: str,
        prepared: UnencodedInputs | None = None,
    ) -> None:
        super().__init__(config, sources)
        Shapes.__init__(self, config, sources, classes=prepared and prepared.classes)
        self.world, self._device, self._prepared = ranks, device, prepared
        self._phases: dict[str, Phase] = {}
        self._models: dict[Path, ModelSource] = {}

    @property
    def pruning(self) -> PlanningLab:
        """The lab itself, which has the tools of methods that cut models."""
        return self

    def play(self) -> list[Phase]:
        """Run the method and the baselines, and return all phases of the run, in order.

        If a method chooses an assistant by score, the plan uses the largest assistant.
        """
        student = run_method(self.config.method, self)
        names = self.config.trained_baselines
        baselines = [self.train(baseline_stage(self, name, student)) for name in names]
        preset = scoring_preset(self.config.student.deepspeed)
        for result in (student, *baselines, *self.record.assistants):
            source = self._models[result.folder]
            spec = TeacherConfig(model=source.name, deepspeed=preset)
            self._score(f"{result.name}-scored", result.name, ReadyTeacher(source, spec))
        for name, spec in self.config.teacher_specs.items():
            if spec.server is None and name in self._teachers:
                self._score(f"{name}-scored", name, self._teachers[name])
        return list(self._phases.values())

    def _source(self, folder: Path, role: str) -> ModelSource:
        return self._models[folder]

    def rows_of_teachers(self) -> dict[str, int]:
        return dict.fromkeys(self.config.teacher_specs, 1)  # the rows are not read

    def steps_of_student(self) -> int:
        return self._most_steps(self.config.train)

    def check_schedule(self, stage: Stage) -> None:
        """Check that the schedule of a stage fits into its steps, if these are known by now."""
        # The rows of two vocabularies are counted when they are made; labelled rows are at most all
        # rows.
        if self.config.method.own_vocabulary is None or stage.role != STUDENT:
            steps = stage.window.total if stage.window else self._most_steps(stage.train)
            learning_rate_schedule(stage.train, steps)

    def _most_steps(self, train: TrainConfig) -> int:
        if not isinstance(self._prepared, RunInputs):
            return train.max_steps or UNKNOWN_STEPS
        shape = StepShape(
            train.per_device_train_batch_size, train.gradient_accumulation_steps, 0, self.world
        )
        return total_steps(train, shape.steps_per_epoch(self._learned))

    @cached_property
    def _learned(self) -> int:
        # Every stage asks, and the lengths of all rows are read for the answer.
        encoded = self._prepared.encoded if isinstance(self._prepared, RunInputs) else None
        return 0 if encoded is None else len(rows_with_targets(encoded.train))

    def made_by(self, result: StageResult, name: str, read: Any) -> None: ...

    def dev_score(self, name: str) -> float:
        self._score(f"{name}-scored", name, self._teachers[name])
        return 0.5

    def _record(self, phase: Phase) -> None:
        self._phases.setdefault(phase.name, phase)

    def _score(
        self, phase: str, model: str, ready: ReadyTeacher, forwards: int = 0, per_rows: int = 0
    ) -> None:
        rows, teachers = self.config.eval_rows(), {model: ready}
        self._record(
            Phase(
                name=phase,
                work="scoring",
                teachers=teachers,
                rows=rows,
                forwards=forwards,
                per_rows=per_rows,
            )
        )

    def sorted_teacher(self, teacher: str) -> SortedTeacher:
        """Record the importance phase, once per run."""
        ready = self._teachers[teacher]
        most = self.config.train.rows_at_once(self.config.task.row_length)
        shape = StepShape.of_batch(BATCH_ROWS, most, rank=0, world=self.world)
        self._record(
            Phase(
                name="sorted-teacher",
                work="importance",
                teachers={teacher: ready},
                rows=shape.per_device,
                forwards=shape.accumulation,
                per_rows=BATCH_ROWS,
            )
        )
        return unscored(ready.source)

    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        """Record the scoring of the teacher, once; return the same importance for all layers."""
        ready = self._teachers[teacher]
        batches = -(-FEW[self.config.task.type] // (self.config.eval_rows() * self.world))
        self._score("layers", "layers", ready, forwards=(ready.source.depth + 1) * batches)
        return (1.0,) * ready.source.depth

    def relative_times(
        self, source: ModelSource, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the views' shares of the weights of the layers; a plan times nothing."""
        del name
        whole = self.parameters(source, source.whole)
        counts = {known: self.parameters(source, view) for known, view in views.items()}
        return {k: n.encoder_parameters / whole.encoder_parameters for k, n in counts.items()}

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return the shape of the cut model; the cut itself runs tensor by tensor on one rank."""
        return shape_of_cut(source, view, self.config.task.type)

    def train(self, stage: Stage, files: Any = dict) -> StageResult:
        """Record a stage; return a result with the widest view and 0.5 for every metric."""
        stage = self._completed(stage)
        learners = learning_models(stage, self._sources, self._teachers, self.config.student)
        teachers = {name: self._teachers[name] for name in stage.models}
        for name, ready in teachers.items():
            if ready.spec.cache == AUTO:  # the pass that fills the cache, before it is read first
                per_rows = self.config.eval_rows() * self.world
                self._score(f"{name}-answers", name, ready, forwards=1, per_rows=per_rows)
        bases = {n: teachers.pop(n).source for n in self.config.base_teachers if n in teachers}
        phase = Phase(
            name=stage.name,
            learners=learners,
            stage=stage,
            teachers=teachers,
            bases=bases,
        )
        self._record(phase)
        view, folder = next(iter(stage.views), None), Path("stages") / stage.name
        kept = stage.pruned_to if view is None else stage.views[view]
        model = phase.learner if kept is None else self.cut(phase.learner, kept, stage.name)
        self._models |= {folder: model, **{folder / role: learners[role] for role in stage.beside}}
        metrics = defaultdict[str, float](lambda: 0.5)
        scores = dict.fromkeys(stage.views, metrics)
        result = StageResult(
            name=stage.name, folder=folder, metrics=metrics, scores=scores, view=view
        )
        self.results.append(result)
        return result

    def metric(self, *, weighed: bool = True) -> Any:
        if self._prepared is not None and weighed:
            check_weighed(self._prepared.metric, self._prepared.metrics.names)
        return SimpleNamespace(name="", of=lambda _: 0.5, worth=lambda _: 0.5)


def check_size(config: RunConfig, ranks: Ranks, inputs: UnencodedInputs) -> None:
    """Check that the student can be cut out of its teacher, before the rows are encoded."""
    if config.method.cuts_student:
        world, device = ranks.world_size, ranks.device.type
        PlanningLab(config, inputs.sources, ranks=world, device=device, prepared=inputs).play()


def check_method(prepared: RunInputs, ranks: Ranks) -> None:
    """Check the method, its stages and the baselines, so that errors appear now and not later."""
    config, world, device = prepared.config, ranks.world_size, ranks.device.type
    for name, spec in config.teacher_specs.items():
        if name in prepared.sources:
            ds = frozen_on(world, load_ds_config(spec.deepspeed, where="teacher.deepspeed"))
            check_quantized(prepared.sources[name], ds, is_frozen=spec.finetune is None)
    lab = PlanningLab(config, prepared.sources, ranks=world, device=device, prepared=prepared)
    for phase in lab.play():
        if phase.stage is not None:
            lab.check_schedule(phase.stage)
            losses = stage_losses(
                phase.stage,
                config.task.type,
                learners=phase.learners,
                teachers=phase.teaching,
                classes=prepared.classes,
            )
            losses.check()
            for name, teacher in phase.teachers.items():
                losses.check_outputs(config.key_of(name), teacher)
