"""A method of another package with two models that learn, as small as can be."""

from __future__ import annotations

from typing import Any

from pydantic.dataclasses import dataclass

from megakd.contract.options import MethodOptions
from megakd.contract.stage import Constant, Pass, Stage
from megakd.contract.terms import STRICT


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Pair(MethodOptions):
    """Train two models at once, one of which teaches the other and reads other token numbers."""


def run(config: Pair, lab: Any) -> Any:
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
