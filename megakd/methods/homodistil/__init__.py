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
from typing import Annotated, Any, ClassVar, NamedTuple

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
from megakd.training.lab import Lab, Model

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
    pruning_end: step after which the last units are removed; null: after 30 % of the steps.
    every: steps between two removals; all units are removed at once if it is `pruning_end`.
    cuts: how often the weights of removed units are cut out of the model during training; 0 keeps
        them until the end.
    round_to: multiple for the target's width and neurons; null: 64 in families that lose whole
        heads (decoders with rotary positions, GPT-2), 1 in others.
    """

    cuts_student: ClassVar[bool] = True
    target_width: Count
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
        if config.task.type not in LANGUAGE_TASKS:
            yield (
                f"task.type: homodistil prunes on text and needs {' or '.join(LANGUAGE_TASKS)} "
                f"(got {config.task.type}); fine-tune the pruned model on the task afterwards"
            )
        end, max_steps = self.pruning_end, config.train.max_steps
        if max_steps is not None and end is not None and end > max_steps:
            yield (
                f"method.pruning_end: {end} is after the end of the run, train.max_steps "
                f"{max_steps}; lower method.pruning_end or raise train.max_steps"
            )
        yield from _problems_of_objective(config.objective or ())


def _problems_of_objective(terms: Any) -> Iterator[str]:
    for term in terms:
        if isinstance(term, HiddenMse | EmbeddingMse) and term.projection != "identity":
            yield (
                f"objective: {term.loss} compares hidden states whose width falls during the run; "
                "set projection: identity in the term"
            )
        if isinstance(term, HiddenCosine | RelationFsp | RelationKl):
            yield (
                f"objective: {term.loss} compares vectors whose width falls during the run; use "
                "hidden_mse with projection: identity, or soft targets"
            )


def run(config: HomoDistilConfig, lab: Lab) -> StageResult:
    """Distil in windows; after each window but the last, removed units are cut out."""
    from megakd.methods.homodistil.strategy import PruningStrategy

    model = lab.configured_model(config.teacher or TEACHER)
    rigid = lab.facts.why_rigid(model)
    if rigid is not None:
        raise ConfigError(
            "method: homodistil narrows hidden states, and those of the teacher cannot lose "
            f"columns: {rigid}; use shrink, minidisc or direct, or another family"
        )
    teacher = lab.teacher(config.teacher)
    start = lab.model(teacher)
    target = target_of(model.units, config.target_width, round_to=config.round_to)
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
            metric=lab.facts.metric(weighed=False),
            size=lambda view, start=start: lab.facts.parameters(start, view).parameters,
        )
        stage = Stage(
            name=STUDENT if window.last == window.total else f"pruning-{number}",
            meaning=f"the student while it is pruned, up to step {window.last} of {window.total}",
            teachers=(teacher,),
            start=start,
            objective=objective,
            strategy=pruning,
            judge=pruning.judge,
            window=window._replace(units=target.at(schedule.left(window.last))),
            measured=(Pass(teacher=teacher),),
        )
        results.append(lab.train(stage, pruning.files))
        lab.record.pruning += (
            lab.work.read_file(results[-1], ROWS, lambda path: json.loads(Path(path).read_bytes()))
            or []
        )
    return results[-1]


def schedule_of(config: HomoDistilConfig, lab: Lab) -> Schedule:
    """Return the schedule of a run; pruning ends within the run."""
    total = lab.facts.steps(lab.config.train)
    end = config.pruning_end or max(1, int(SHARE_OF_RUN * total))
    if end > total:  # epochs, as train.max_steps is compared when the config is read
        raise ConfigError(
            f"method.pruning_end: pruning ends after step {end}, and train.num_train_epochs "
            f"{lab.config.train.num_train_epochs:g} over the training text are only {total} steps; "
            "give more text, train longer, or lower method.pruning_end"
        )
    return Schedule(end, config.every, total)


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
        meaning="the student's shape from random weights, taught by the same teacher",
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


def target_of(whole: View, width: int, *, round_to: int | None) -> Target:
    """Return the target: the same share of every kind of units, on a grid if there is one.

    Args:
        round_to: `method.round_to`; None: 1 if columns of heads are pruned, else 64.
    """
    before = whole.width or 0
    grid = round_to or (1 if whole.head_width is not None else DECODER_GRID)
    if width >= before or width % grid:
        raise ConfigError(
            f"method.target_width: {width} is not possible for a teacher of width {before}; use a "
            f"multiple of {grid} (method.round_to) below it"
            + (f", or lower method.round_to, such as to {before // 4}" if grid >= before else "")
        )
    share = Fraction(width, before)
    exact = TargetShares(Fraction(1), share, share, share)
    is_exact = grid == 1 and whole.head_width is not None
    target = Target(whole, exact if is_exact else _on_grid(whole, share, grid))
    _check_goal(target)
    return target


def _on_grid(whole: View, share: Fraction, grid: int) -> TargetShares:
    """Return shares that give multiples of the grid, and whole heads unless columns are pruned."""
    # A teacher that was cut may have layers without heads or neurons.
    neurons, heads = max(whole.neurons), max(whole.heads)
    kept = max(grid, grid * round(share * neurons / grid))
    of_neurons = min(Fraction(kept, neurons), Fraction(1)) if neurons else Fraction(1)
    if whole.head_width is not None:
        return TargetShares(Fraction(1), of_neurons, share, share)
    of_heads = Fraction(max(1, round(share * heads)), heads) if heads else Fraction(1)
    return TargetShares(of_heads, of_neurons, share, Fraction(1))


def _check_goal(target: Target) -> None:
    whole, goal = target.whole, target.goal
    pairs = [
        *zip(whole.heads + whole.neurons, goal.heads + goal.neurons, strict=True),
        (whole.width, goal.width),
        (whole.head_width, goal.head_width),
    ]
    if any(before and not after for before, after in pairs):
        raise ConfigError(
            "method.target_width leaves nothing of a layer: the student would have "
            f"{goal.heads[0]} heads, {goal.neurons[0]} neurons, a width of {goal.width} and "
            f"{goal.head_width} columns per head; raise the width"
        )


class Schedule(NamedTuple):
    """Pruning from the first step to `end`, in steps that the run has taken.

    end: last step after which units are removed.
    every: steps between two removals.
    total: steps of the run.
    """

    end: int
    every: int
    total: int

    def prunes_after(self, step: int) -> bool:
        """Return whether units are selected anew after a step; steps are counted from 1."""
        return step == self.end or (1 <= step < self.end and step % self.every == 0)

    def left(self, step: int) -> Fraction:
        """Return the part of the way to the goal that is left after a step, from 1 to 0.

        It is (1 - step / end)^3. Between two removals the part of the earlier removal counts.
        """
        if step >= self.end:
            return Fraction(0)
        return (1 - Fraction(step // self.every * self.every, self.end)) ** 3

    def windows(self, cuts: int) -> tuple[Window, ...]:
        """Return the parts of the run between at most `cuts` cuts of masked units.

        A cut follows as soon as 1/cuts, 2/cuts, … of all units that will be removed are masked.
        The end of the run is no cut of its own: the export cuts the model anyway.
        """
        removals = [*range(0, self.end, self.every), self.end]
        places = {
            bisect_left(removals, Fraction(number, cuts), key=lambda step: 1 - self.left(step))
            for number in range(1, cuts + 1)
        }
        ends = sorted(removals[place] for place in places if removals[place] < self.total)
        return tuple(
            Window(first, last, self.total) for first, last in pairwise((0, *ends, self.total))
        )
