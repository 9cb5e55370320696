"""Which candidate becomes the teacher assistant: MiniDisc's selection.

Zhang et al. 2024, https://arxiv.org/abs/2205.14570.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from megakd.errors import ConfigError, TrainingError

# Correlations come out of their formulas a little above 1.
_ABOVE_ONE = 1e-6


class Choice(NamedTuple):
    """The chosen candidate.

    value: its own trade-off, also where it is the target in place of a sparser one.
    highest: the highest trade-off of all candidates that could win.
    is_target: whether the schedule ends with it.
    """

    sparsity: float
    value: float
    is_target: bool
    highest: float


def tradeoff(metric: float, sparsity: float, weight: float) -> float:
    """How good a candidate is for its size: metric + lambda * sparsity.

    Args:
        metric: from 0 (a correlation from -1) to 1, more is better.
        sparsity: share that the candidate lacks.
        weight: lambda.
    """
    return metric + weight * sparsity


def choose(
    scores: Mapping[float, float],
    *,
    tradeoff: float,
    teacher_sparsity: float,
    target: float,
    target_may_win: bool = True,
) -> Choice:
    """The candidate of the highest trade-off, or the target where that lies at or beyond it.

    Equal trade-offs go to the sparser one: it costs less and is as good, and in the limit of a
    large lambda it is the sparsest.

    Differs from the authors' code, which compares the target's plain metric with the others'
    trade-offs, each the best of all evaluations: here all are trade-offs of one evaluation.

    Args:
        scores: metric by sparsity; candidates less sparse than the teacher are left out.
        tradeoff: lambda.
        teacher_sparsity: of the model that teaches them; 0 for the original teacher.
        target: the sparsity at which the schedule ends.
        target_may_win: False leaves out the target and all that is sparser: an assistant is chosen.

    Raises:
        ConfigError: the target is no candidate, or the metric no fraction.
        TrainingError: a metric is not a number.
    """
    candidates = {s: metric for s, metric in scores.items() if s >= teacher_sparsity}
    if target not in candidates:
        known = ", ".join(f"{s:g}" for s in sorted(candidates)) or "there are none"
        raise ConfigError(
            f"method.target_sparsity {target:g} is not among the candidates that are at least as "
            f"sparse as their teacher ({teacher_sparsity:g}): {known}; add it to method.sparsities"
        )
    for sparsity, metric in candidates.items():
        check_metric(metric, sparsity)
    values = _weighed(candidates, tradeoff)
    if not target_may_win:
        values = {s: value for s, value in values.items() if s < target}
    best = max(values, key=lambda s: (values[s], s))
    chosen = min(best, target)
    return Choice(chosen, values[chosen], chosen == target, values[best])


def _weighed(candidates: Mapping[float, float], weight: float) -> dict[float, float]:
    return {s: tradeoff(metric, s, weight) for s, metric in candidates.items()}


def check_metric(metric: float, sparsity: float) -> None:
    """Refuses what lambda cannot be weighed against.

    Raises:
        ConfigError: it is no fraction and no correlation.
        TrainingError: it is not a number.
    """
    if math.isnan(metric):
        raise TrainingError(
            f"the candidate of sparsity {sparsity:g} has no score (nan), so that none can be "
            f"chosen; lower train.learning_rate if training has diverged"
        )
    if abs(metric) > 1 + _ABOVE_ONE:
        raise ConfigError(
            f"the candidate of sparsity {sparsity:g} scores {metric:g}: the trade-off needs a "
            f"metric from 0 to 1 (a correlation from -1), of which more is better; perplexity and "
            f"loss are none, set method.metric: accuracy"
        )
