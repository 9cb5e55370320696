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
from bisect import bisect_left
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.config.options import OneTeacherOptions
from megakd.config.task import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.config.terms import (
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
from megakd.data.batch import Pass
from megakd.errors import ConfigError
from megakd.models.views import View
from megakd.stage import Constant, Stage, StageResult, Window
from megakd.training.lab import Lab, Model, Row

ROWS = "pruning.json"
"""File in a stage's folder with the rows of the report."""
DECODER_GRID = 64
"""Multiple of widths and neurons of students that lose whole heads, as servers expect."""
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
    from megakd.methods.homodistil.strategy import PruningStrategy

    model = lab.given(config.teacher or TEACHER)
    rigid = lab.pruning.why_rigid(model)
    if rigid is not None:
        raise ConfigError(
            "method: homodistil narrows hidden states, and those of the teacher cannot lose "
            f"columns: {rigid}; use shrink, minidisc or direct, or another family"
        )
    teacher = lab.teacher(config.teacher)
    start = lab.model(teacher)
    target = target_of(
        model.units,
        width=config.target_width,
        sparsity=config.target_sparsity,
        round_to=config.round_to,
    )
    schedule = schedule_of(config, lab)
    objective = objective_of(lab, model, target.goal)
    results: list[StageResult] = []
    for number, window in enumerate(schedule.windows(config.cuts), start=1):
        if results:
            start = lab.source(results[-1].folder)
        pruning = PruningStrategy(
            teacher,
            target,
            schedule,
            metric=lab.metric(weighed=False),
            size=lambda view, start=start: lab.pruning.parameters(start, view).parameters,
        )
        stage = Stage(
            name=STUDENT if window.last == window.total else f"pruning-{number}",
            teachers=(teacher,),
            start=start,
            objective=objective,
            strategy=pruning,
            judge=pruning.judge,
            window=window._replace(units=target.at(schedule.left(window.last))),
            measured=(Pass(teacher=teacher),),
        )
        results.append(lab.train(stage, pruning.files))
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


def objective_of(lab: Lab, teacher: Model, student: View) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the objective of the paper with equal weights.

    Attention can be compared only if it can be read, and if the student keeps all heads.
    """
    heads = teacher.units.heads
    keeps_heads = student.heads == heads
    given = lab.config.objective
    if given is None:
        hidden = HiddenMse(loss="hidden_mse", projection="identity", layer_mapping="uniform")
        embedding = EmbeddingMse(loss="embedding_mse", projection="identity")
        is_compared = keeps_heads and teacher.shows_attention
        attention = (AttentionMse(loss="attention_mse"),) if is_compared else ()
        return (*lab.hard_terms(1.0), *lab.soft_terms(1.0), hidden, *attention, embedding)
    if not keeps_heads and any(isinstance(term, AttentionMse) for term in given):
        raise ConfigError(
            "objective: attention_mse compares attention head by head, and the student loses heads "
            f"(from {heads[0]} to {student.heads[0]} key-value groups in each layer); "
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
    objective = objective_of(lab, lab.model(teacher), start.units)
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
        measured=(Pass(teacher=teacher),),
    )


BASELINES = {"random": random_start}


def _read(path: str) -> list[Row]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


class TargetShares(NamedTuple):
    """The share of the units of each kind that the student keeps."""

    heads: Fraction
    neurons: Fraction
    width: Fraction
    head_width: Fraction


class Target(NamedTuple):
    """The units of the teacher, and the shares of them that the student keeps.

    whole: `head_width` is set if the columns of heads are pruned instead of whole heads.
    """

    whole: View
    shares: TargetShares

    def at(self, left: Fraction) -> View:
        """Return the units that remain when `left` of the way to the student is left, 1 to 0."""
        whole, shares = self
        parts = TargetShares(*(share + (1 - share) * left for share in shares))
        columns = whole.head_width
        return View(
            tuple(round(parts.heads * count) for count in whole.heads),
            tuple(round(parts.neurons * count) for count in whole.neurons),
            round(parts.width * (whole.width or 0)),
            None if columns is None else round(parts.head_width * columns),
        )

    @property
    def goal(self) -> View:
        return self.at(Fraction(0))


def target_of(
    whole: View, *, width: int | None, sparsity: float | None, round_to: int | None
) -> Target:
    """Return the target: the same share of every kind of units, on a grid if there is one.

    Args:
        round_to: `method.round_to`; None: 1 if columns of heads are pruned, else 64.
    """
    before = whole.width or 0
    grid = round_to or (1 if whole.head_width is not None else DECODER_GRID)
    share = Fraction(width, before) if width else 1 - Fraction(str(sparsity))
    after = width or max(grid, grid * round(share * before / grid))
    if not 0 < after < before or after % grid:
        asked = (
            f"target_width: {after}" if width else f"target_sparsity: {sparsity:g} (width {after})"
        )
        raise ConfigError(
            f"method.{asked} is not possible for a teacher of width {before}; use a multiple of "
            f"{grid} (method.round_to) below it"
            + (f", or lower method.round_to, such as to {before // 4}" if grid >= before else "")
        )
    if grid == 1 and whole.head_width is not None:
        target = Target(whole, TargetShares(Fraction(1), share, share, share))
    else:
        target = Target(whole, _on_grid(whole, share, Fraction(after, before), grid))
    _check_goal(target)
    return target


def _on_grid(whole: View, share: Fraction, width: Fraction, grid: int) -> TargetShares:
    """Return shares that give multiples of the grid, and whole heads unless columns are pruned."""
    # A teacher that was cut may have layers without heads or neurons.
    neurons, heads = max(whole.neurons), max(whole.heads)
    kept = max(grid, grid * round(share * neurons / grid))
    of_neurons = min(Fraction(kept, neurons), Fraction(1)) if neurons else Fraction(1)
    if whole.head_width is not None:
        return TargetShares(Fraction(1), of_neurons, width, share)
    of_heads = Fraction(max(1, round(share * heads)), heads) if heads else Fraction(1)
    return TargetShares(of_heads, of_neurons, width, Fraction(1))


def _check_goal(target: Target) -> None:
    whole, goal = target.whole, target.goal
    kept = {
        "heads": zip(whole.heads, goal.heads, strict=True),
        "neurons": zip(whole.neurons, goal.neurons, strict=True),
        "columns of hidden states": [(1, goal.width or 0)],
        "columns of heads": [(1, 1 if goal.head_width is None else goal.head_width)],
    }
    empty = [name for name, counts in kept.items() if any(a and not b for a, b in counts)]
    if empty:
        raise ConfigError(
            f"method.target_width or method.target_sparsity leaves a layer without "
            f"{' and '.join(empty)}: the student would have {goal.heads[0]} heads, "
            f"{goal.neurons[0]} neurons, a width of {goal.width} and {goal.head_width} columns per "
            "head; raise the width or lower the sparsity"
        )


class Schedule(NamedTuple):
    """Pruning from `start` to `end`, in steps that the run has taken.

    start, end: first and last step after which units may be removed; all at once if equal.
    every: steps between two removals.
    total: steps of the run.
    """

    start: int
    end: int
    every: int
    total: int

    def prunes_after(self, step: int) -> bool:
        """Return whether units are selected anew after a step; steps are counted from 1."""
        if not max(1, self.start) <= step <= self.end:
            return False
        return (step - self.start) % self.every == 0 or step == self.end

    def left(self, step: int) -> Fraction:
        """Return the part of the way to the goal that is left after a step, from 1 to 0.

        It is (1 - p)^3 with p = (step - start) / (end - start). Between two removals the part of
        the earlier removal counts.
        """
        if step >= self.end:
            return Fraction(0)
        if step <= self.start:
            return Fraction(1)
        last = (step - self.start) // self.every * self.every
        return (1 - Fraction(last, self.end - self.start)) ** 3

    def windows(self, cuts: int) -> tuple[Window, ...]:
        """Return the parts of the run between at most `cuts` cuts of masked units.

        A cut follows as soon as 1/cuts, 2/cuts, … of all units that will be removed are masked.
        The end of the run is no cut of its own: the export cuts the model anyway.
        """
        removals = [*range(self.start, self.end, self.every), self.end]
        places = {
            bisect_left(removals, Fraction(number, cuts), key=lambda step: 1 - self.left(step))
            for number in range(1, cuts + 1)
        }
        ends = sorted(removals[place] for place in places if removals[place] < self.total)
        return tuple(
            Window(first, last, self.total) for first, last in pairwise((0, *ends, self.total))
        )
