"""SKDBERT: at every step, one teacher of a pool is drawn and teaches the student.

Stochastic knowledge distillation (Ding et al. 2023, https://arxiv.org/abs/2211.14466): teachers of
several sizes are fine-tuned and frozen. At every step, one teacher is drawn, independently of
earlier steps, and the student takes a step only on this teacher's soft targets. A step costs as
much as a step with a single teacher. The probabilities are constant during the run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from megakd.config.options import MethodOptions, no_such_teacher
from megakd.config.terms import STRICT, Weight
from megakd.data.batch import Pass
from megakd.methods.pools import soft_objective, taught
from megakd.stage import Stage, StageResult, Strategy
from megakd.training.lab import Lab


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SkdbertConfig(MethodOptions):
    """At every step a teacher of the pool is drawn, and the student learns from it alone.

    distribution: `uniform`; `teacher_rank`, by the teachers' scores on the validation split, of
        which the worst has the weight 1, the next 2; or `weights`.
    weights: weights of the teachers by name, for distribution `weights`; need not sum to 1. A
        teacher of weight 0 is neither fine-tuned nor loaded.
    """

    learns_adapters: ClassVar[bool] = True
    distribution: Literal["uniform", "teacher_rank", "weights"] = "uniform"
    weights: dict[str, Weight] | None = None

    def problems(self, config: Any) -> Iterator[str]:
        if self.distribution == "weights":
            yield from self._problems_of_weights(config)
        elif self.weights is not None:
            yield (
                f"method.weights: method.distribution {self.distribution} does not use weights; "
                'set method.distribution to "weights", or remove the key'
            )

    def _problems_of_weights(self, config: Any) -> Iterator[str]:
        if self.weights is None:
            yield (
                'method.weights: missing, and method.distribution is "weights"; set a weight for '
                "every teacher"
            )
            return
        for name in self.weights:
            if name not in config.teacher_specs:
                yield no_such_teacher(config, "method.weights", name)
        missing = [name for name in config.teacher_specs if name not in self.weights]
        if missing:
            yield (
                f"method.weights: no weight for {', '.join(missing)}; set a weight for every "
                "teacher (0 is allowed)"
            )
        elif not any(self.weights.values()):
            yield "method.weights: every weight is 0; set at least one weight above 0"


def run(config: SkdbertConfig, lab: Lab) -> StageResult:
    """Prepare the teachers and their probabilities, then train the student."""
    specs, given = lab.config.teacher_specs, config.weights
    names = tuple(name for name in specs if given is None or given[name] > 0)
    probabilities = probabilities_of(config, lab, tuple(map(lab.teacher, names)))
    drawn = Drawn(names, tuple(probabilities.values()), lab.config.seed)
    # The likeliest teacher, so that evaluations can be compared.
    likeliest = Pass(teacher=max(probabilities, key=probabilities.__getitem__))
    stage = Stage(
        name="student",
        teachers=names,
        objective=soft_objective(lab),
        strategy=drawn,
        measured=(likeliest,) if lab.config.eval.losses else (),
    )
    never = dict.fromkeys(specs, 0.0)
    return taught(lab, stage, weights=never | probabilities, how=config.distribution)


def probabilities_of(config: SkdbertConfig, lab: Lab, names: Sequence[str]) -> dict[str, float]:
    """Return the probabilities with which teachers are drawn, which sum to 1."""
    if config.distribution == "weights":
        weights = [(config.weights or {})[name] for name in names]
    elif config.distribution == "uniform":
        weights = [1.0] * len(names)
    else:
        scores = [lab.dev_score(name) for name in names]
        lab.record.dev_scores.update(zip(names, scores, strict=True))
        weights = ranks(scores)
    total = sum(weights)
    return {name: weight / total for name, weight in zip(names, weights, strict=True)}


def ranks(scores: Sequence[float]) -> tuple[float, ...]:
    """Return ranks from 1 (lowest score) to N (highest); ties get the mean of their ranks."""
    return tuple(
        sum(other < score for other in scores) + (scores.count(score) + 1) / 2 for score in scores
    )


@plain_dataclass(frozen=True)
class Drawn(Strategy):
    """A strategy that draws one teacher per step, as a function of seed and step on all ranks.

    probabilities: probabilities of the teachers, in the order of `teachers`.
    """

    teachers: tuple[str, ...]
    probabilities: tuple[float, ...]
    seed: int

    def passes(self, step: int) -> tuple[Pass, ...]:
        drawn = random.Random(f"{self.seed}:teacher:{step}")
        (teacher,) = drawn.choices(self.teachers, self.probabilities)
        return (Pass(teacher=teacher),)
