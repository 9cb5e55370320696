"""MaxiDisc: a student is trained with every teacher assistant, and the best student wins.

MaxiDisc is the baseline of MiniDisc (Zhang et al. 2024, arXiv 2205.14570). For each sparsity up to
the target, an assistant is cut out of the teacher and distilled, and then a student is cut out of
the assistant and distilled. The leg of the target itself is a student without an assistant. A leg
that has finished is not trained again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic.dataclasses import dataclass

from megakd.config.terms import STRICT
from megakd.methods.assistants import (
    AssistantOptions,
    leg,
    ranked_teacher,
    tradeoff,
    view_name,
    view_of,
)
from megakd.stage import StageResult
from megakd.training.lab import Lab

if TYPE_CHECKING:
    from megakd.training.allocation import SortedTeacher


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MaxiDiscConfig(AssistantOptions):
    """Every assistant of the grid up to the target is trained, and a student through each."""

    @property
    def used_sparsities(self) -> tuple[float, ...]:
        return tuple(s for s in self.sparsities if s <= self.target_sparsity)


class Route(NamedTuple):
    """An assistant and the student that it taught; both are the same stage without an assistant."""

    sparsity: float
    assistant: StageResult
    student: StageResult


def run(config: MaxiDiscConfig, lab: Lab) -> StageResult:
    """Train two legs per assistant, and return the student with the best validation score."""
    _, ranked = ranked_teacher(config, lab)
    metric = lab.facts.metric()
    routes = [_route(config, lab, ranked, sparsity) for sparsity in config.used_sparsities]
    best = max(routes, key=lambda route: metric.mean(route.student.metrics))
    for route in routes:
        value = metric.mean(route.assistant.metrics)
        view = view_of(config, lab, ranked, route.sparsity)
        lab.record.candidates.append(
            {
                "iteration": 1,
                "sparsity": route.sparsity,
                "parameters": lab.facts.parameters(ranked.source, view).parameters,
                "metric_name": metric.name,
                "metric": value,
                "tradeoff": tradeoff(value, route.sparsity, config.tradeoff),
                "chosen": route is best,
                "student_metric": metric.mean(route.student.metrics),
            }
        )
    if best.assistant is not best.student:
        lab.assistant(best.assistant, best.sparsity)
    return best.student


def _route(config: MaxiDiscConfig, lab: Lab, ranked: SortedTeacher, sparsity: float) -> Route:
    view = view_of(config, lab, ranked, sparsity)
    name = view_name(sparsity)
    start = lab.work.cut(ranked.source, view, f"cut-{name}")
    meaning = f"the teacher without a share of {sparsity:g} of its units, taught by the teacher"
    stage = leg(lab, f"leg-{name}", teacher=lab.teacher(), start=start, meaning=meaning)
    first = lab.train(stage)
    if sparsity == config.target_sparsity:
        return Route(sparsity, first, first)
    target = view_of(config, lab, ranked, config.target_sparsity)
    assistant = lab.as_teacher(first)
    start = lab.work.cut(lab.source(first.folder), target, f"cut-through-{name}")
    meaning = f"the student's size, cut out of leg-{name} and taught by it"
    stage = leg(lab, f"student-through-{name}", teacher=assistant, start=start, meaning=meaning)
    second = lab.train(stage)
    return Route(sparsity, first, second)
