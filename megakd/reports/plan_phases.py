"""The phases of a run: its method runs in a lab that does not train, on models without weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from megakd.config.deepspeed import frozen_on, load_ds_config
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig, TrainConfig, learning_rate_schedule
from megakd.config.task import AUTO, LANGUAGE_TASKS, STUDENT, TaskConfig, TokenizerConfig
from megakd.data.loader import StepShape
from megakd.engine.distributed import Ranks
from megakd.losses.objective import stage_losses
from megakd.methods import run_method
from megakd.models.fitting import ModelSource, ReadyTeacher, check_length
from megakd.models.loading import with_vocabulary
from megakd.models.quantized import check_quantized
from megakd.models.views import View
from megakd.stage import Stage, StageResult
from megakd.training.allocation import BATCH_ROWS, SortedTeacher
from megakd.training.assembly import Assembly, scoring_preset
from megakd.training.evaluation import FEW, probe_for
from megakd.training.facts import RunFacts, shape_of_cut, unscored
from megakd.training.inputs import RunInputs, UnencodedInputs, resolve, with_student
from megakd.training.lab import Lab, baseline_stage
from megakd.training.learners import learning_models
from megakd.training.record import MethodRecord

_TRAINED_VOCABULARY = 8000
Activity = Literal["training", "importance", "scoring"]


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
    work: Activity = "training"
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
    counted = _counted(expand_path(task.tokenizer)) if task.tokenizer else None
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


class PlannedWork:
    """What records the stages of a method, and other work with models, instead of doing it."""

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts
        self.teachers: dict[str, ReadyTeacher] = {}
        self.results: list[StageResult] = []
        self.record = MethodRecord()
        self.assembly: Assembly | None = None
        self.phases: dict[str, Phase] = {}
        self._models: dict[Path, ModelSource] = {}

    def model(self, folder: Path, role: str) -> ModelSource:
        del role
        return self._models[folder]

    def probe(self, stage: str) -> Any:
        return self.assembly and probe_for(self.assembly, stage)

    def read_file(self, result: StageResult, name: str, read: Any) -> None: ...

    def score(self, teacher: str) -> Mapping[str, float]:
        """Record the scoring of a teacher; return 0.5 for every metric."""
        self.record_scoring(f"{teacher}-scored", teacher, self.teachers[teacher])
        return defaultdict(lambda: 0.5)

    def _record(self, phase: Phase) -> None:
        self.phases.setdefault(phase.name, phase)

    def record_scoring(
        self, phase: str, model: str, ready: ReadyTeacher, forwards: int = 0, per_rows: int = 0
    ) -> None:
        """Record the forwards of a frozen model over held-out rows, once per name of a phase."""
        rows, teachers = self.facts.config.eval_rows(), {model: ready}
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

    def unit_scores(self, teacher: str) -> SortedTeacher:
        """Record the importance phase, once per run."""
        ready = self.teachers[teacher]
        most = self.facts.config.train.rows_at_once(self.facts.config.task.row_length)
        shape = StepShape.of_batch(BATCH_ROWS, most, rank=0, world=self.facts.world)
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
        ready = self.teachers[teacher]
        batches = -(
            -FEW[self.facts.config.task.type] // (self.facts.config.eval_rows() * self.facts.world)
        )
        self.record_scoring("layers", "layers", ready, forwards=(ready.source.depth + 1) * batches)
        return (1.0,) * ready.source.depth

    def times(
        self, source: ModelSource, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the views' shares of the weights of the layers; a plan times nothing."""
        del name
        whole = self.facts.parameters(source, source.whole)
        counts = {known: self.facts.parameters(source, view) for known, view in views.items()}
        return {k: n.encoder_parameters / whole.encoder_parameters for k, n in counts.items()}

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return the shape of the cut model; the cut itself runs tensor by tensor on one rank."""
        return shape_of_cut(source, view, self.facts.config.task.type)

    def train(self, stage: Stage, files: Any) -> StageResult:
        """Record a stage; return a result with the widest view and 0.5 for every metric."""
        del files
        learners = learning_models(
            stage, self.facts.sources, self.teachers, self.facts.config.student
        )
        teachers = {name: self.teachers[name] for name in stage.models}
        for name, ready in teachers.items():
            if ready.spec.cache == AUTO:  # the pass that fills the cache, before it is read first
                per_rows = self.facts.config.eval_rows() * self.facts.world
                self.record_scoring(f"{name}-answers", name, ready, forwards=1, per_rows=per_rows)
        bases = {
            n: teachers.pop(n).source for n in self.facts.config.base_teachers if n in teachers
        }
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
        return StageResult(
            name=stage.name, folder=folder, metrics=metrics, scores=scores, view=view
        )


def planned_phases(work: PlannedWork) -> list[Phase]:
    """Run the method and the baselines, and return all phases of the run, in order.

    If a method chooses an assistant by score, the plan uses the largest assistant.
    """
    lab = Lab(work)
    config = lab.config
    student = run_method(config.method, lab)
    names = config.trained_baselines
    baselines = [lab.train(baseline_stage(lab, name, student)) for name in names]
    preset = scoring_preset(config.student.deepspeed)
    for result in (student, *baselines, *lab.record.assistants):
        source = lab.source(result.folder)
        spec = TeacherConfig(model=source.name, deepspeed=preset)
        work.record_scoring(f"{result.name}-scored", result.name, ReadyTeacher(source, spec))
    for name, spec in config.teacher_specs.items():
        if spec.server is None and name in work.teachers:
            work.score(name)
    return list(work.phases.values())


def check_schedule(stage: Stage, facts: RunFacts) -> None:
    """Check that the schedule of a stage fits into its steps, if these are known by now."""
    # The rows of two vocabularies are counted when they are made; labelled rows are at most all
    # rows.
    if facts.config.method.own_vocabulary is None or stage.role != STUDENT:
        train = cast("TrainConfig", stage.train)
        steps = stage.window.total if stage.window else facts.steps(train)
        learning_rate_schedule(train, steps)


def check_size(config: RunConfig, ranks: Ranks, inputs: UnencodedInputs) -> None:
    """Plan a method that cuts once before rows are encoded: it raises if a cut is impossible."""
    if config.method.cuts_student:
        world = ranks.world_size
        facts = RunFacts(config, inputs.sources, world=world, inputs=inputs)
        planned_phases(PlannedWork(facts))


def check_method(prepared: RunInputs, ranks: Ranks) -> None:
    """Check the method, its stages and the baselines, so that errors appear now and not later."""
    config, world = prepared.config, ranks.world_size
    for name, spec in config.teacher_specs.items():
        if name in prepared.sources and prepared.sources[name].quantization is not None:
            ds = frozen_on(world, load_ds_config(spec.deepspeed, where="teacher.deepspeed"))
            check_quantized(prepared.sources[name], ds, is_frozen=spec.finetune is None)
    facts = RunFacts(config, prepared.sources, world=world, inputs=prepared)
    for phase in planned_phases(PlannedWork(facts)):
        if phase.stage is not None:
            check_schedule(phase.stage, facts)
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
