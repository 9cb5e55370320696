"""TAKD: a sequence of teachers, each taught by the previous teacher; the last teaches the student.

A baseline of SKDBERT (Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393). The largest teacher
is fine-tuned or given. Every smaller teacher starts from its own weights and is distilled from the
previous teacher, with the learning rate and the steps of its section `finetune` if it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.methods import MethodOptions, no_such_teacher
from megakd.contract.stage import Constant, Pass, Stage
from megakd.contract.terms import STRICT
from megakd.methods.pools import soft_objective

if TYPE_CHECKING:
    from megakd.contract.lab import Lab
    from megakd.contract.stage import StageResult


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TakdConfig(MethodOptions):
    """From teacher to teacher, the largest first, and on to the student.

    order: names of teachers, the first to the last; null: all teachers, the largest first.
    """

    name: Literal["takd"]
    order: tuple[str, ...] | None = None

    def problems(self, config: Any) -> Iterator[str]:
        """Yield a line for every teacher in `order` that does not exist or is listed twice."""
        for name, count in Counter(self.order or ()).items():
            if name not in config.teacher_specs:
                yield no_such_teacher(config, "method.order", name)
            if count > 1:
                yield f'method.order: "{name}" is listed {count} times'


def run(config: TakdConfig, lab: Lab) -> StageResult:
    """Train one leg per teacher after the first teacher, then the leg of the student."""
    first, *others = config.order or lab.largest_first()
    teacher = lab.teacher(first)
    for name in others:
        leg = lab.train(_leg(lab, f"{name}-taught", role=name, teacher=teacher))
        teacher = lab.as_teacher(leg, like=name)
    return lab.train(_leg(lab, "student", role="student", teacher=teacher))


def _leg(lab: Lab, name: str, *, role: str, teacher: str) -> Stage:
    return Stage(
        name=name,
        role=role,
        teachers=(teacher,),
        objective=soft_objective(lab),
        strategy=Constant((Pass(teacher=teacher),)),
    )
