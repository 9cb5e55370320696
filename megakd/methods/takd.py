"""TAKD: a sequence of teachers, each taught by the previous teacher; the last teaches the student.

A baseline of SKDBERT (Mirzadeh et al. 2020, https://arxiv.org/abs/1902.03393). The largest teacher
is fine-tuned or given. Every smaller teacher starts from its own weights and is distilled from the
previous teacher, with the learning rate and the steps of its section `finetune` if it has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab
from megakd.contract.options import MethodOptions, no_such_teacher
from megakd.contract.stage import Constant, Pass, Stage, StageResult
from megakd.contract.terms import STRICT
from megakd.errors import ConfigError
from megakd.methods.pools import soft_objective


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TakdConfig(MethodOptions):
    """From teacher to teacher, the largest first, and on to the student.

    order: names of teachers, the first to the last; null: all teachers, the largest first.
    """

    learns_adapters: ClassVar[bool] = True
    name: Literal["takd"]
    order: tuple[str, ...] | None = None

    def problems(self, config: Any) -> Iterator[str]:
        """Yield a line for every teacher in `order` that does not exist or is listed twice.

        The chain is checked too if the config says how the chain begins. A teacher that is the
        student without its adapters has no weights to train.
        """
        for name in config.base_teachers:
            yield (
                f'{config.key_of(name)}.model: method "takd" trains the teachers, and the student '
                "without its adapters has no weights of its own to train; set a model"
            )
        for name, count in Counter(self.order or ()).items():
            if name not in config.teacher_specs:
                yield no_such_teacher(config, "method.order", name)
            if count > 1:
                yield f'method.order: "{name}" is listed {count} times; list every teacher once'
        if self.order and not set(self.order) - config.teacher_specs.keys():
            yield from _problems_of_chain(config, self.order)


def run(config: TakdConfig, lab: Lab) -> StageResult:
    """Train one leg per teacher after the first teacher, then the leg of the student."""
    first, *others = chain = config.order or lab.pruning.largest_first()
    problems = "\n".join(_problems_of_chain(lab.config, chain))
    if problems:
        raise ConfigError(problems)
    teacher = lab.teacher(first)
    for name in others:
        leg = lab.train(_leg(lab, f"{name}-taught", learner=name, teacher=teacher))
        teacher = lab.assistant(leg, None, like=name)
    return lab.train(_leg(lab, "student", learner="student", teacher=teacher))


def _problems_of_chain(config: Any, chain: Sequence[str]) -> Iterator[str]:
    """Yield a line for every setting that needs a later teacher as it was before its leg."""
    first, *later = chain
    for name in later:
        key, cache = config.key_of(name), config.teacher_specs[name].cache
        if cache is not None:
            yield (
                f'{key}.cache: method "takd" trains {name} before {name} teaches, so the answers '
                f"in {cache} do not apply; remove the key (only the first teacher, {first}, can "
                "have a cache)"
            )
    if config.start_role in later:
        yield (
            f'student.teacher: method "takd" trains {config.start_role}, but the student would '
            f"start from {config.start_role} without this training; set student.teacher to "
            f"{first}, or set student.model to a model"
        )


def _leg(lab: Lab, name: str, *, learner: str, teacher: str) -> Stage:
    return Stage(
        name=name,
        learners={learner: 1.0},
        teachers=(teacher,),
        objective=soft_objective(lab),
        strategy=Constant((Pass(teacher=teacher),)),
    )
