"""MiniDisc: the best teacher assistant in one trial (Zhang et al. 2024, arXiv 2205.14570).

Heads and neurons are sorted by importance, so that a candidate of any sparsity is a prefix of
every weight. All candidates learn from the teacher at the same time and share their weights. The
candidate with the best trade-off between score and size becomes the assistant, which teaches the
next trial in the same way. The last trial returns the target.

Differs from the paper's code: the candidates of one evaluation are compared, and the weights that
were scored are kept (the code compares the best values of all evaluations and saves the current
weights). The embeddings of a step are looked up once for all candidates, with the same dropout. A
trial stops early only if `train.early_stopping_patience` is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, NamedTuple

from pydantic.dataclasses import dataclass

from megakd.config.terms import STRICT, Count
from megakd.data.batch import Pass
from megakd.methods.assistants import (
    AssistantOptions,
    choose,
    leg,
    objective_of,
    ranked_teacher,
    tradeoff,
    view_name,
    view_of,
    views_of,
)
from megakd.stage import Metric, MetricJudge, Scores, Stage, StageResult, Strategy, Verdict
from megakd.training.lab import Lab, Model
from megakd.training.record import Row

if TYPE_CHECKING:
    from megakd.training.allocation import SortedTeacher


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MiniDiscConfig(AssistantOptions):
    """All candidate assistants in one trial, chosen by the trade-off of score and size.

    iterations: number of trials; the last trial returns the student (2: one assistant).
    passes_per_backward: number of candidates that keep their activations at a time; null: all.
    """

    iterations: Count = 2
    passes_per_backward: Count | None = None


TRIAL = "trial-"


class Link(NamedTuple):
    """The start of a trial: the teacher, the model that contains the candidates, its sparsity."""

    teacher: str
    start: Model
    sparsity: float


def run(config: MiniDiscConfig, lab: Lab) -> StageResult:
    """Sort the teacher, then run the trials: the model that a trial chooses teaches the next."""
    teacher, ranked = ranked_teacher(config, lab)
    link = Link(teacher, ranked.source, 0.0)
    iteration = 1
    while True:
        stage = trial(config, lab, ranked, link, iteration)
        result = lab.train(stage)
        lab.record.candidates += _rows(config, lab, stage, result, iteration)
        chosen = next(s for s in config.sparsities if view_name(s) == result.view)
        if iteration == config.iterations or chosen == config.target_sparsity:
            return result
        link = Link(lab.assistant(result, chosen), lab.source(result.folder), chosen)
        iteration += 1


def direct(config: MiniDiscConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `direct`: a model of the student's size, no assistant.

    The target is cut out of the sorted teacher and distilled from the teacher. The number of steps
    is the number of steps in which the target has learned, which is the sum over all trials.
    """
    del student
    teacher = lab.teacher()
    ranked = lab.work.unit_scores(teacher)
    view = view_of(config, lab, ranked, config.target_sparsity)
    start = lab.work.cut(ranked.source, view, "cut-direct")
    meaning = "the student's size, cut out of the teacher and taught by it without an assistant"
    stage = leg(lab, "direct", teacher=teacher, start=start, meaning=meaning)
    steps = sum(result.steps for result in lab.results if result.name.startswith(TRIAL))
    train = dataclasses.replace(lab.config.train, max_steps=steps) if steps else None
    return dataclasses.replace(stage, train=train)


BASELINES = {"direct": direct}


def trial(
    config: MiniDiscConfig, lab: Lab, ranked: SortedTeacher, link: Link, iteration: int
) -> Stage:
    """Return the stage of a trial: all candidates from the link's sparsity on learn together."""
    sparsities = [s for s in config.sparsities if s >= link.sparsity]
    metric, views = lab.facts.metric(), views_of(config, lab, ranked, sparsities)
    # Units that no candidate has would take memory and communication without being trained.
    start = lab.work.cut(link.start, views[view_name(sparsities[0])], f"start-{iteration}")
    judge = TradeoffJudge(metric, tuple(sparsities), config.tradeoff, config.target_sparsity)
    is_last = iteration == config.iterations
    return Stage(
        name=f"{TRIAL}{iteration}",
        meaning="candidates of several sparsities that learn together; the chosen one teaches the "
        "next trial, or is the student",
        teachers=(link.teacher,),
        start=start,
        objective=objective_of(lab),
        strategy=Sandwich(link.teacher, tuple(views), config.passes_per_backward or len(views)),
        views=views,
        judge=MetricJudge(metric, view_name(config.target_sparsity)) if is_last else judge,
    )


def _rows(
    config: MiniDiscConfig, lab: Lab, stage: Stage, result: StageResult, iteration: int
) -> Iterator[Row]:
    """Yield the rows of the report for a trial, with scores of the evaluation that decided."""
    metric = lab.facts.metric()
    for sparsity in config.sparsities:
        name = view_name(sparsity)
        if name not in stage.views:
            continue
        value = metric.mean(result.scores[name])
        row: Row = {
            "iteration": iteration,
            "sparsity": sparsity,
            "parameters": lab.facts.parameters(stage.start, stage.views[name]).parameters,
            "metric_name": metric.name,
            "metric": value,
            "tradeoff": tradeoff(value, sparsity, config.tradeoff),
            "chosen": name == result.view,
        }
        if row["chosen"]:
            row["kept_metric"] = metric.mean(result.metrics)
        yield row


@plain_dataclass(frozen=True)
class Sandwich(Strategy):
    """A strategy in which all views learn in every step; the loss is the mean of their losses.

    at_once: number of views that share a backward.
    """

    teacher: str
    names: tuple[str, ...]
    at_once: int

    def passes(self, step: int) -> tuple[Pass, ...]:
        del step
        first = Pass(teacher=self.teacher, scale=1 / len(self.names))
        return tuple(
            dataclasses.replace(first, view=name, backward=number // self.at_once)
            for number, name in enumerate(self.names)
        )


@plain_dataclass(frozen=True)
class TradeoffJudge:
    """A judge that compares all candidates by the trade-off of metric and sparsity."""

    metric: Metric
    sparsities: tuple[float, ...]
    tradeoff: float
    target: float

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the best candidate by trade-off, or the target if that candidate is sparser.

        Evaluations are compared by their highest trade-off, also if the target is chosen instead.
        If the target wins, it is the student and ends the schedule, so the best evaluation of the
        target is kept as well.
        """
        metrics = {s: self.metric.mean(scores[view_name(s)]) for s in self.sparsities}
        sparsity, highest = choose(metrics, weight=self.tradeoff, target=self.target)
        return Verdict(highest, view_name(sparsity), {view_name(self.target): metrics[self.target]})
