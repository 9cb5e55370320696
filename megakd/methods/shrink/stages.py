"""Stages of shrink: a trial of candidates as views of one model, the repair of a cut, and a series.

In a series, students of several sizes learn as views of one model, then each by itself. Differs
from Nemotron Elastic and Flextron: no router chooses the shapes, and each student is cut out at
last and repaired with weights of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.contract.lab import Lab, Model
from megakd.contract.metric import Metric
from megakd.contract.results import CandidateReport
from megakd.contract.stage import Constant, Judge, Pass, Scores, Stage, StageResult, Verdict
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT
from megakd.contract.terms import TermConfig, source_of, term_name
from megakd.contract.views import View
from megakd.methods.minidisc import Sandwich
from megakd.methods.shrink.candidates import Budget, Candidate

if TYPE_CHECKING:
    from megakd.methods.shrink import ShrinkConfig

SHARE_OF_REPAIR = 0.3
"""The trial takes this share of the repair's steps by default; a tenth chose worse candidates."""
TRIAL = "trial-"
ALL_SIZES = "all-sizes"
"""A view that contains all others, and does not learn itself."""
SHARED = "shared"
"""The stage in which the chosen students of a series learn together."""
ALONE = 0.5
"""Share of the repair that each student of a series has by itself."""
Named = dict[str, Candidate]


class Hop(NamedTuple):
    """The way from a teacher to a smaller model: its start.

    teacher: name of the model that teaches.
    start: the model that contains the candidates.
    layer_scores: importance of each layer of `start`.
    """

    teacher: str
    start: Model
    layer_scores: tuple[float, ...]

    def view(self, one: Candidate) -> View:
        return one.view(self.layer_scores, self.start.units)

    def at(self, start: Model, kept: Sequence[int]) -> Hop:
        """Return the hop from a cut of `start` that has kept these layers, numbered from 1."""
        scores = tuple(self.layer_scores[layer - 1] for layer in kept)
        return self._replace(start=start, layer_scores=scores)


def trial(
    config: ShrinkConfig, lab: Lab, hop: Hop, views: Mapping[str, View], judge: Judge, number: int
) -> Stage:
    """Return a stage in which views of one model learn at the same time."""
    steps = config.trial_steps or max(1, round(SHARE_OF_REPAIR * repair_steps(config, lab)))
    return Stage(
        name=f"{TRIAL}{number}",
        teachers=(hop.teacher,),
        start=hop.start,
        objective=objective_of(lab),
        strategy=Sandwich(hop.teacher, tuple(name for name in views if name != ALL_SIZES)),
        views=views,
        judge=judge,
        passes_per_backward=config.passes_per_backward,
        measures_losses=True,
        train=train_of(lab, steps),
    )


def repair(config: ShrinkConfig, lab: Lab, teacher: str, start: Model, steps: int | None) -> Stage:
    """Return the stage that repairs a cut in `steps`, and finishes it on its own texts."""
    rollout = lab.config.rollout
    if rollout is not None:
        first = steps or repair_steps(config, lab)
        steps = first + config.on_policy_steps
        rollout = dataclasses.replace(rollout, from_step=first)
    return Stage(
        name=STUDENT,
        teachers=(teacher,),
        start=start,
        objective=objective_of(lab),
        strategy=Constant((Pass(teacher=teacher),)),
        rollouts=rollout,
        train=train_of(lab, steps),
    )


def repair_steps(config: ShrinkConfig, lab: Lab) -> int:
    """Return the number of steps of a student after the trial."""
    return config.repair_steps or lab.steps_of_student()


def train_of(lab: Lab, steps: int | None) -> Any:
    """Return the section `train` with another number of steps; None: as the config has it."""
    return None if steps is None else dataclasses.replace(lab.config.train, max_steps=steps)


def objective_of(lab: Lab) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the default.

    The default is the divergence from the teacher. A labelled row of a classifier or a regression
    also has the loss on its label; a classifier's weighs as much as the divergence of the row.
    """
    if lab.config.objective is not None:
        return lab.config.objective
    soft, is_language = lab.soft_terms(1.0), lab.config.task.type in LANGUAGE_TASKS
    return soft if is_language else (*soft, *lab.hard_terms(per_row=True))


def metric_of(config: ShrinkConfig, lab: Lab) -> Metric:
    """Return the metric by which candidates are compared."""
    if config.metric is not None:
        return lab.metric(config.metric, weighed=False)
    (soft,) = lab.soft_terms(1.0)
    judges = filter(None, (judging_name(term, soft.loss) for term in objective_of(lab)))
    name = next(judges, soft.loss)  # one candidate is not compared
    return Metric(name=name, parts=(name,), higher_is_better=False)


def judging_name(term: TermConfig, divergence: str) -> str | None:
    """Return the name of a term that compares candidates on held-out texts, which are data."""
    is_judge = term.loss == divergence and source_of(term) != "rollouts"
    return term_name(term) if is_judge else None


def rows_of(
    lab: Lab,
    hop: Hop,
    candidates: Mapping[str, Candidate],
    scores: Scores,
    *,
    judge: BestCandidate,
    iteration: int,
) -> Iterator[CandidateReport]:
    """Yield the rows of the report for candidates by view, with the scores that decided."""
    metric, count, chosen = judge.metric, lab.pruning.parameters, judge(scores, 0).view
    whole = count(hop.start, hop.start.units._replace(head_width=None)).parameters
    for name, one in candidates.items():
        parameters = count(hop.start, hop.view(one)).parameters
        yield {
            "iteration": iteration,
            "sparsity": round(1 - parameters / whole, 4),
            "parameters": parameters,
            "metric_name": metric.name,
            "metric": metric.of(scores[name]),
            "tradeoff": metric.worth(scores[name]),
            "chosen": name == chosen,
            "shape": one.shape(),
        }


@plain_dataclass(frozen=True)
class BestCandidate:
    """A judge that compares candidates of one size by one metric; of equal ones, the first wins."""

    metric: Metric
    names: tuple[str, ...]

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the best candidate; a value that is not a number loses."""
        del step
        values = {name: self.metric.worth(scores[name]) for name in self.names}
        known = {name: -math.inf if math.isnan(v) else v for name, v in values.items()}
        best = max(self.names, key=lambda name: known[name])
        return Verdict(known[best], best)


def train_series(
    config: ShrinkConfig, lab: Lab, hop: Hop, groups: Mapping[Budget, Sequence[Candidate]]
) -> list[StageResult]:
    """Choose a shape for each size, train the shapes together, then each by itself."""
    named = [{f"{size.name}-{one.name}": one for one in ones} for size, ones in groups.items()]
    hop, shapes = _best_of_each(config, lab, hop, named)
    alone = max(1, round(ALONE * repair_steps(config, lab)))
    together = train_of(lab, max(1, repair_steps(config, lab) - alone))
    stage = _stage(config, lab, hop, [{name: one} for name, one in shapes.items()])
    result = lab.train(dataclasses.replace(stage, name=SHARED, train=together))
    hop = _within(hop, lab.source(result.folder), shapes)
    results: list[StageResult] = []
    for size, one in zip(groups, shapes.values(), strict=True):
        start = lab.pruning.cut(hop.start, hop.view(one), f"start-{size.name}")
        stage = repair(config, lab, hop.teacher, start, alone)
        name = STUDENT if len(results) == len(groups) - 1 else f"{STUDENT}-{size.name}"
        results.append(lab.train(dataclasses.replace(stage, name=name)))
    return results


def _best_of_each(
    config: ShrinkConfig, lab: Lab, hop: Hop, groups: Sequence[Named]
) -> tuple[Hop, Named]:
    """Return a model that contains the best candidate of each size in a trial, and these."""
    every = shapes = _all_of(groups)
    if len(every) > len(groups):  # there is something to choose
        result, shapes = lab.train(_stage(config, lab, hop, groups)), {}
        for number, named in enumerate(groups, start=1):
            judge = BestCandidate(metric_of(config, lab), tuple(named))
            lab.record.candidates += rows_of(
                lab, hop, named, result.scores, judge=judge, iteration=number
            )
            chosen = judge(result.scores, 0).view
            shapes[chosen] = named[chosen]
        hop = _within(hop, lab.source(result.folder), every)
    # Units that no student has would take time without being trained.
    start = lab.pruning.cut(hop.start, hop.view(_union(shapes)), f"start-{SHARED}")
    return _within(hop, start, shapes), shapes


def _stage(config: ShrinkConfig, lab: Lab, hop: Hop, groups: Sequence[Named]) -> Stage:
    # Its model is cut to the units of all candidates.
    every, metric = _all_of(groups), metric_of(config, lab)
    views = {name: hop.view(one) for name, one in {ALL_SIZES: _union(every), **every}.items()}
    judges = tuple(BestCandidate(metric, tuple(named)) for named in groups)
    return trial(config, lab, hop, views, BestSeries(judges), 1)


def _all_of(groups: Sequence[Named]) -> Named:
    return {name: one for named in groups for name, one in named.items()}


def _within(hop: Hop, start: Model, named: Named) -> Hop:
    return hop.at(start, hop.view(_union(named)).layers or ())


def _union(named: Named) -> Candidate:
    """Return the smallest shape that contains all candidates."""
    layers, heads, neurons, _, widths = zip(*named.values(), strict=True)
    width = None if None in widths else max(widths)
    return Candidate(max(layers), max(heads), max(neurons), 0, width)


@plain_dataclass(frozen=True)
class BestSeries:
    """A judge that keeps the units of all candidates, and compares the best of each size."""

    judges: tuple[BestCandidate, ...]

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the sum of the best scores of each size."""
        return Verdict(sum(judge(scores, step).score for judge in self.judges), ALL_SIZES)
