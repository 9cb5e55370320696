"""HomoDistil: prune the student out of the teacher while distilling (Liang et al. 2023).

https://arxiv.org/abs/2302.09632. The student starts as its teacher. The units with the smallest
sensitivity are removed a few at a time while the student is distilled on open text, so that the
student's predictions stay close to the teacher's along the whole way.

Differs from the paper: units that must go together form one group (the columns of the hidden
states over all layers; queries and keys of a head; values and output of a head; the neurons of a
feed-forward), because independent choices for each matrix would only leave zeros. Loss weights and
the steps at which pruning ends were not found in the paper and are options; nor was the decay of
the average, which is 0.85. Losses on hidden states are means over width and layers instead of sums.
Units that were removed do not return.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab
from megakd.contract.options import OneTeacherOptions
from megakd.contract.results import PruningReport
from megakd.contract.stage import Constant, Pass, Stage, StageResult
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT
from megakd.contract.terms import (
    STRICT,
    AttentionMse,
    Count,
    EmbeddingMse,
    HiddenCosine,
    HiddenMse,
    RelationFsp,
    RelationKl,
    TermConfig,
)
from megakd.contract.views import View
from megakd.errors import ConfigError
from megakd.methods.homodistil.schedule import (
    ROWS,
    Schedule,
    target_of,
)

SHARE_OF_RUN = 0.3
"""Part of the steps after which pruning ends if the config does not say when."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HomoDistilConfig(OneTeacherOptions):
    """The student starts as its teacher and loses its least sensitive units while it learns.

    target_width: columns of the student's hidden states; neurons and heads shrink by the same
        share.
    target_sparsity: share of the columns, neurons and columns of heads (or heads) to remove, in
        place of `target_width`.
    schedule: how the number of units falls from `pruning_start` to `pruning_end`: `cubic` or, as a
        control, `one_shot` at `pruning_start`.
    pruning_start: step after which pruning begins; the first units go `every` steps later.
    pruning_end: step after which the last units are removed; null: after 30 % of the steps, or
        of those after `pruning_start` if it is later.
    every: steps between two removals.
    cuts: how often the weights of removed units are cut out of the model during training; 0 keeps
        them until the end.
    round_to: multiple for the target's width and neurons; null: 64 in families that lose whole
        heads (decoders with rotary positions, GPT-2), 1 in others.
    """

    cuts_student: ClassVar[bool] = True
    name: Literal["homodistil"]
    target_width: Count | None = None
    target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    schedule: Literal["cubic", "one_shot"] = "cubic"
    pruning_start: Annotated[int, Field(ge=0)] = 0
    pruning_end: Count | None = None
    every: Count = 1
    cuts: Annotated[int, Field(ge=0, le=100)] = 4
    round_to: Count | None = None

    @property
    def looks_into_teacher(self) -> bool:
        """True: the student starts as the teacher, and hidden states are compared."""
        return True

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        if (self.target_width is None) == (self.target_sparsity is None):
            yield (
                f"method: set exactly one of target_width (got {self.target_width}) and "
                f"target_sparsity (got {self.target_sparsity})"
            )
        if config.task.type not in LANGUAGE_TASKS:
            yield (
                f"task.type: homodistil prunes on text and needs {' or '.join(LANGUAGE_TASKS)} "
                f"(got {config.task.type}); fine-tune the pruned model on the task afterwards"
            )
        yield from self._problems_of_schedule(config.train.max_steps)
        yield from _problems_of_objective(config.objective or ())

    def _problems_of_schedule(self, max_steps: int | None) -> Iterator[str]:
        start, end = self.pruning_start, self.pruning_end
        if end is not None and end <= start and self.schedule != "one_shot":
            yield (
                f"method.pruning_end: {end} is not after method.pruning_start {start}; raise "
                "pruning_end or lower pruning_start"
            )
        for key, step in (("pruning_start", start), ("pruning_end", end)):
            if max_steps is not None and step is not None and step > max_steps:
                yield (
                    f"method.{key}: {step} is after the end of the run, train.max_steps "
                    f"{max_steps}; lower method.{key} or raise train.max_steps"
                )


def _problems_of_objective(terms: Any) -> Iterator[str]:
    for term in terms:
        if isinstance(term, HiddenMse | EmbeddingMse) and term.projection != "identity":
            yield (
                f"objective: {term.loss} compares hidden states whose width falls during the run; "
                "set projection: identity in the term"
            )
        if isinstance(term, RelationKl):
            yield (
                "objective: relation_kl cuts the vectors of all heads into equal parts, and their "
                "width falls during the run; use attention_mse or soft targets"
            )
        if isinstance(term, HiddenCosine | RelationFsp):
            yield (
                f"objective: {term.loss} has no projection that starts as the identity; use "
                "hidden_mse with projection: identity"
            )


def run(config: HomoDistilConfig, lab: Lab) -> StageResult:
    """Distil in windows; after each window but the last, removed units are cut out."""
    from megakd.methods.homodistil.strategy import HomotopyJudge, PruningStrategy

    teacher = lab.teacher(config.teacher)
    start = lab.model(teacher)
    target = target_of(
        start.units,
        width=config.target_width,
        sparsity=config.target_sparsity,
        round_to=config.round_to,
    )
    schedule = schedule_of(config, lab)
    objective = objective_of(lab, target.whole, target.goal)
    results: list[StageResult] = []
    for number, window in enumerate(schedule.windows(config.cuts), start=1):
        if results:
            start = lab.source(results[-1].folder)
        pruning = PruningStrategy(
            teacher,
            target,
            schedule,
            window,
            size=lambda view, start=start: lab.pruning.parameters(start, view).parameters,
        )
        stage = Stage(
            name=STUDENT if window.last == window.total else f"pruning-{number}",
            teachers=(teacher,),
            start=start,
            objective=objective,
            strategy=pruning,
            judge=HomotopyJudge(pruning, lab.metric(None, weighed=False)),
            window=window,
            measures_losses=True,
        )
        results.append(lab.train(stage))
        lab.record.pruning += lab.made_by(results[-1], ROWS, _read) or []
    return results[-1]


def schedule_of(config: HomoDistilConfig, lab: Lab) -> Schedule:
    """Return the schedule of a run; pruning ends after it starts, and within the run."""
    total, start = lab.steps_of_student(), config.pruning_start
    end = config.pruning_end or int(SHARE_OF_RUN * total)
    if end <= start:  # a late start has its share of the rest
        end = start + max(1, int(SHARE_OF_RUN * (total - start)))
    if config.schedule == "one_shot":
        end = start
    if end > total or start >= total:
        train = lab.config.train
        length = (
            f"train.max_steps {train.max_steps}"
            if train.max_steps
            else f"train.num_train_epochs {train.num_train_epochs:g} over the training text"
        )
        raise ConfigError(
            f"method: pruning takes place from step {start} to step {end}, and the run has only "
            f"{total} steps ({length}); give more text, train longer, or lower "
            f"method.{'pruning_start' if config.pruning_end is None else 'pruning_end'}"
        )
    if config.schedule == "one_shot":  # the last removal is the first
        start = end = max(1, start)
    return Schedule(start, end, config.every, total)


def objective_of(lab: Lab, teacher: View, student: View) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the objective of the paper with equal weights.

    Attention can be compared only if the student keeps all heads.
    """
    keeps_heads = student.heads == teacher.heads
    given = lab.config.objective
    if given is None:
        hidden = HiddenMse(loss="hidden_mse", projection="identity", layer_mapping="uniform")
        embedding = EmbeddingMse(loss="embedding_mse", projection="identity")
        attention = (AttentionMse(loss="attention_mse"),) if keeps_heads else ()
        return (*lab.hard_terms(1.0), *lab.soft_terms(1.0), hidden, *attention, embedding)
    if not keeps_heads and any(isinstance(term, AttentionMse) for term in given):
        raise ConfigError(
            "objective: attention_mse compares attention head by head, and the student loses heads "
            f"(from {teacher.heads[0]} to {student.heads[0]} key-value groups in each layer); "
            "remove the term"
        )
    return given


def random_start(config: HomoDistilConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `random`: the student's shape from random weights.

    The model is distilled with the same objective and for the same number of steps; matrices from
    its hidden states to the teacher's are learned from random values.
    """
    teacher = lab.teacher(config.teacher)
    start = lab.source(student.folder).fresh
    objective = objective_of(lab, lab.model(teacher).units, start.units)
    return Stage(
        name="random",
        teachers=(teacher,),
        start=start,
        objective=tuple(
            dataclasses.replace(term, projection="learned")
            if isinstance(term, HiddenMse | EmbeddingMse)
            else term
            for term in objective
        ),
        strategy=Constant((Pass(teacher=teacher),)),
        measures_losses=True,
    )


BASELINES = {"random": random_start}


def _read(path: str) -> list[PruningReport]:
    return json.loads(Path(path).read_text(encoding="utf-8"))
