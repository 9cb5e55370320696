"""MiniDisc: the best teacher assistant in one trial (Zhang et al. 2024, arXiv 2205.14570).

Heads and neurons are sorted by importance, so that a candidate of any sparsity is a prefix of
every weight. All candidates learn from the teacher at once, sharing their weights; the one with
the best trade-off between score and size becomes the assistant, and teaches in the same way,
until the target is read out.

Differs from the paper's code: the candidates of one evaluation are compared, and what is kept are
the weights that were scored (the code compares the best values ever seen and saves the current
weights). The embeddings of a step are looked up once for all candidates, with one dropout. A trial
stops early only if `train.early_stopping_patience` is set.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.contract.stage import Pass, Scores, Stage, StageResult, Stateless, Verdict
from megakd.contract.terms import STRICT, Count
from megakd.methods.assistants import (
    AssistantOptions,
    leg,
    objective_of,
    ranked_teacher,
    ranked_units,
    size_at,
    view_name,
    view_of,
    views_of,
)
from megakd.methods.tradeoff import choose, tradeoff

if TYPE_CHECKING:
    from megakd.contract.lab import Lab, Model, SortedModel
    from megakd.contract.metrics import Metric
    from megakd.contract.results import CandidateReport, CostReport


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MiniDiscConfig(AssistantOptions):
    """All candidate assistants in one trial, chosen by the trade-off of score and size.

    iterations: trials; the last one gives the student (2: one assistant).
    target_may_win: whether the target may win a trial before the last, and so end the schedule
        without an assistant; false weighs only the candidates that are less sparse.
    sampled_candidates: how many between the widest and the narrowest learn in a step; null: all.
    passes_per_backward: how many candidates keep their activations at a time; null: all.
    """

    name: Literal["minidisc"]
    iterations: Count = 2
    target_may_win: bool = True
    sampled_candidates: Annotated[int, Field(ge=0)] | None = None
    passes_per_backward: Count | None = None

    def problems(self, config: Any) -> Iterator[str]:
        """Yield, after what no schedule can work with, a grid without an assistant."""
        yield from super().problems(config)
        wants_assistant = not self.target_may_win and self.iterations > 1
        if wants_assistant and min(self.sparsities) >= self.target_sparsity:
            yield (
                f"method.target_may_win: false leaves no candidate, for none of method.sparsities "
                f"is below method.target_sparsity {self.target_sparsity:g}; add one, set it to "
                "true, or set method.iterations to 1"
            )


TRIAL = "trial-"


class Link(NamedTuple):
    """Where a trial begins: who teaches, the model that candidates are part of, its sparsity."""

    teacher: str
    start: Model
    sparsity: float


class Tried(NamedTuple):
    """A trial and what came of it; how sparse its teacher was."""

    stage: Stage
    result: StageResult
    taught_by: float


def run(config: MiniDiscConfig, lab: Lab) -> StageResult:
    """SortedModel, then trials: the model that each one chooses teaches the next."""
    teacher, ranked = ranked_teacher(config, lab)
    link = Link(teacher, ranked.source, 0.0)
    tried: list[Tried] = []
    for iteration in range(1, config.iterations + 1):
        stage = _trial(config, lab, ranked, link, iteration)
        result = lab.train(stage)
        lab.record.candidates += _rows(config, lab, stage, result, iteration)
        tried.append(Tried(stage, result, link.sparsity))
        chosen = next(s for s in config.sparsities if view_name(s) == result.view)
        if iteration == config.iterations or chosen == config.target_sparsity:
            break
        link = Link(lab.assistant(result, chosen), lab.source(result.folder), chosen)
    lab.record.cost = _cost(config, lab, ranked, tried)
    return tried[-1].result


def direct(config: MiniDiscConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `direct`: the student's size without an assistant.

    The target is cut out of the sorted teacher and distilled from it, with as many steps as the
    target has learned in: those of all trials.
    """
    del student
    teacher = lab.teacher()
    ranked = ranked_units(config, lab, teacher)
    view = view_of(config, lab, ranked, config.target_sparsity)
    start = lab.cut(ranked.source, view, "cut-direct")
    stage = leg(config, lab, "direct", teacher=teacher, start=start)
    steps = sum(result.steps for result in lab.results if result.name.startswith(TRIAL))
    train = dataclasses.replace(lab.config.train, max_steps=steps) if steps else None
    return dataclasses.replace(stage, train=train)


BASELINES = {"direct": direct}


def _cost(
    config: MiniDiscConfig, lab: Lab, ranked: SortedModel, tried: Sequence[Tried]
) -> CostReport | None:
    """What the trials took, and what MaxiDisc's legs would have taken at the same pace.

    A forward takes as long as the encoder has weights, and learning three times as long. None
    where MaxiDisc would try nothing but the target.
    """
    if min(config.sparsities) >= config.target_sparsity:
        return None
    size = functools.cache(lambda s: size_at(config, lab, ranked, s))
    seconds = sum(trial.result.seconds for trial in tried)
    work = 0.0
    for trial in tried:
        learners = sum(size(s) for s in config.sparsities if view_name(s) in trial.stage.views)
        work += trial.result.steps * (size(trial.taught_by) + 3 * learners)
    target = config.target_sparsity
    legs = [size(0.0) + 3 * size(s) for s in config.sparsities if s <= target]
    legs += [size(s) + 3 * size(target) for s in config.sparsities if s < target]
    pace = seconds / max(work, 1.0)
    return {
        "trials": 1,
        "seconds": seconds,
        "alternative": "MaxiDisc",
        "alternative_does": "every assistant tried",
        "alternative_trials": sum(s <= target for s in config.sparsities),
        "alternative_seconds": pace * tried[0].result.steps * sum(legs),
    }


def _trial(
    config: MiniDiscConfig, lab: Lab, ranked: SortedModel, link: Link, iteration: int
) -> Stage:
    from megakd.contract.metrics import MetricJudge

    sparsities = [s for s in config.sparsities if s >= link.sparsity]
    metric, views = lab.metric(config.metric), views_of(config, lab, ranked, sparsities)
    # What no candidate has would take memory and traffic, and learn nothing.
    start = lab.cut(link.start, views[view_name(sparsities[0])], f"start-{iteration}")
    judge = TradeoffJudge(
        metric,
        tuple(sparsities),
        config.tradeoff,
        config.target_sparsity,
        target_may_win=config.target_may_win,
    )
    is_last = iteration == config.iterations
    return Stage(
        name=f"{TRIAL}{iteration}",
        teachers=(link.teacher,),
        start=start,
        objective=objective_of(config, lab),
        strategy=Sandwich(link.teacher, tuple(views), config.sampled_candidates, lab.config.seed),
        views=views,
        judge=MetricJudge(metric, view_name(config.target_sparsity)) if is_last else judge,
        passes_per_backward=config.passes_per_backward,
    )


def _rows(
    config: MiniDiscConfig, lab: Lab, stage: Stage, result: StageResult, iteration: int
) -> Iterator[CandidateReport]:
    """What the report says of a trial: all scores are of the evaluation that made the choice."""
    metric = lab.metric(config.metric)
    for sparsity in config.sparsities:
        name = view_name(sparsity)
        if name not in stage.views:
            continue
        value = metric.of(result.scores[name])
        row: CandidateReport = {
            "iteration": iteration,
            "sparsity": sparsity,
            "parameters": lab.parameters(stage.start, stage.views[name]).parameters,
            "metric": value,
            "tradeoff": tradeoff(value, sparsity, config.tradeoff),
            "chosen": name == result.view,
        }
        if row["chosen"]:
            row["kept_metric"] = metric.of(result.metrics)
        yield row


@plain_dataclass(frozen=True)
class Sandwich(Stateless):
    """All candidates learn in every step, or the ends of the grid and some drawn between them.

    names: of the views, the widest first.
    sampled: how many of the middle are drawn per step; None: all learn.
    """

    teacher: str
    names: tuple[str, ...]
    sampled: int | None = None
    seed: int = 0

    def passes(self, step: int) -> tuple[Pass, ...]:
        """One pass per candidate: the step's loss is the mean of theirs."""
        names = self._drawn(step)
        return tuple(Pass(teacher=self.teacher, view=name, scale=1 / len(names)) for name in names)

    def _drawn(self, step: int) -> tuple[str, ...]:
        middle = self.names[1:-1]
        if self.sampled is None or self.sampled >= len(middle):
            return self.names
        drawn = random.Random(f"{self.seed}:{step}").sample(range(len(middle)), self.sampled)
        return (self.names[0], *(middle[i] for i in sorted(drawn)), self.names[-1])


@plain_dataclass(frozen=True)
class TradeoffJudge:
    """Weighs what each candidate scores against what it leaves out; all that are given count."""

    metric: Metric
    sparsities: tuple[float, ...]
    tradeoff: float
    target: float
    target_may_win: bool = True

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """The candidate of the highest trade-off; the target where that lies beyond it.

        Evaluations are compared by their highest trade-off, whichever candidate is kept. The
        target ends the schedule as the student, so its own best evaluation is kept as well.
        """
        metrics = {s: self.metric.of(scores[view_name(s)]) for s in self.sparsities}
        choice = choose(
            metrics,
            tradeoff=self.tradeoff,
            teacher_sparsity=self.sparsities[0],
            target=self.target,
            target_may_win=self.target_may_win,
        )
        own = {view_name(self.target): metrics[self.target]} if self.target_may_win else {}
        return Verdict(choice.highest, view_name(choice.sparsity), own)
