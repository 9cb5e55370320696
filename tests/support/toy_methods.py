"""Methods of another package that use every seam a coming method needs, each as small as can be."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from dataclasses import field
from itertools import pairwise
from typing import Any

import torch
from pydantic.dataclasses import dataclass

from megakd.contract.metric import WHOLE, Metric
from megakd.contract.options import MethodOptions
from megakd.contract.stage import (
    Constant,
    Pass,
    Stage,
    StepReport,
    Strategy,
    Verdict,
    Window,
)
from megakd.contract.terms import STRICT
from megakd.contract.views import Cut, UnitOrder, View

LAYERS, HEADS, WIDTH = 2, 2, 16


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Pruner(MethodOptions):
    """Prune neurons by their sensitivity while distilling, in windows of one run.

    ends: steps at which a window ends; after each the student has `keep` neurons per layer.
    """

    ends: tuple[int, ...] = (3, 6)
    keep: tuple[int, ...] = (24, 16)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Pair(MethodOptions):
    """Train two models at once, one of which teaches the other and reads other token numbers."""


def run(config: Any, lab: Any) -> Any:
    return (_prune if isinstance(config, Pruner) else _pair)(config, lab)


def _prune(config: Pruner, lab: Any) -> Any:
    teacher, start = lab.teacher(), None
    for number, (first, last) in enumerate(pairwise((0, *config.ends))):
        there, keep = (32, *config.keep)[number : number + 2]
        sensitivity = Sensitivity(teacher, lab.probe(f"window-{number}"))
        result = lab.train(
            Stage(
                name=f"window-{number}",
                teachers=(teacher,),
                start=start,
                objective=lab.soft_terms(),
                strategy=sensitivity,
                judge=KeepSensitive(sensitivity, lab.metric(None), there, keep, last),
                window=Window(first, last, config.ends[-1]),
            )
        )
        start = lab.source(result.folder)
    return result


@plain_dataclass(frozen=True)
class Sensitivity(Strategy):
    """Adds up |weight * gradient| of every neuron, as no rank could do for itself."""

    teacher: str
    probe: Any = None
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def passes(self, step: int) -> tuple[Pass, ...]:
        return (Pass(teacher=self.teacher),)

    def before_update(self, step: int, student: Any) -> None:
        for shard in student.local_shards():
            if not shard.name.endswith("intermediate.dense.weight"):
                continue
            neurons = (shard.offset + torch.arange(len(shard.weight))) // WIDTH
            known = self.sums.setdefault(shard.name, torch.zeros(32))
            known.index_add_(0, neurons, (shard.weight.detach() * shard.gradient).abs())

    def after_update(self, report: StepReport) -> None:
        pass

    def order(self) -> list[tuple[int, ...]]:
        """Return the neurons of every layer by falling sensitivity over all ranks."""
        names = [f"bert.encoder.layer.{n}.intermediate.dense.weight" for n in range(LAYERS)]
        here = torch.stack([self.sums.get(name, torch.zeros(32)) for name in names])
        ranked = self.probe.add_up(here).argsort(descending=True, stable=True)
        return [tuple(layer) for layer in ranked.tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: values.clone() for name, values in self.sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.update(state["sums"])


@plain_dataclass(frozen=True)
class KeepSensitive:
    """Gives the most sensitive neurons, but not before the window ends."""

    sensitivity: Sensitivity
    metric: Metric
    there: int  # neurons that the model of this window has; those beyond were never summed
    keep: int
    last: int

    @property
    def facts(self) -> dict[str, Any]:
        return {"keep": self.keep, "last": self.last}

    def __call__(self, scores: Any, step: int) -> Verdict:
        score = self.metric.of(scores[WHOLE]) if step == self.last else float("nan")
        heads, here = tuple(range(HEADS)), len(next(iter(self.sensitivity.sums.values()), ()))
        assert here == 32 or not self.sensitivity.sums
        listed = [layer[: self.there] for layer in self.sensitivity.order()]
        order = UnitOrder((heads,) * LAYERS, tuple(listed))
        return Verdict(score, WHOLE, cut=Cut(order, View((HEADS,) * LAYERS, (self.keep,) * LAYERS)))


def _pair(config: Pair, lab: Any) -> Any:
    del config
    passes = (
        Pass(learner="teacher", weights={"soft_target_kl": 0.0}),
        Pass(teacher="teacher", weights={"hard_cross_entropy": 0.0}),
    )
    return lab.train(
        Stage(
            name="student",
            learners={"student": 1.0, "teacher": 1.0},
            objective=(*lab.hard_terms(), *lab.soft_terms()),
            strategy=Constant(passes),
        )
    )
