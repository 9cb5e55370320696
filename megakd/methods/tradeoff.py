"""MiniDisc's selection of the candidate that becomes the teacher assistant.

Zhang et al. 2024, https://arxiv.org/abs/2205.14570.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from megakd.errors import ConfigError, TrainingError

# Computed correlations may be slightly above 1 because of rounding.
_ABOVE_ONE = 1e-6


class Choice(NamedTuple):
    """The chosen candidate.

    sparsity: sparsity of the candidate.
    value: trade-off of the candidate, also if the target was chosen in place of a sparser one.
    is_target: whether the candidate is the target, which ends the schedule.
    highest: the highest trade-off of all candidates that could win.
    """

    sparsity: float
    value: float
    is_target: bool
    highest: float


def tradeoff(metric: float, sparsity: float, weight: float) -> float:
    """Return the trade-off of a candidate: metric + lambda * sparsity.

    The metric is from 0 (a correlation from -1) to 1, higher is better.
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
    """Return the candidate with the highest trade-off, or the target if the candidate is sparser.

    For equal trade-offs, the sparser candidate is chosen: it is smaller and as good, and in the
    limit of a large lambda, the sparsest candidate is chosen.

    Differs from the authors' code, which compares the metric of the target with the trade-offs of
    the other candidates, each from its best evaluation. Here, all values are trade-offs of the same
    evaluation.

    Args:
        scores: metric by sparsity; candidates less sparse than the teacher are ignored.
        teacher_sparsity: sparsity of the candidates' teacher; 0 for the original teacher.
        target: the sparsity at which the schedule ends.
        target_may_win: False excludes the target and sparser candidates, so that an assistant is
            chosen.
    """
    candidates = {s: metric for s, metric in scores.items() if s >= teacher_sparsity}
    if target not in candidates:
        known = ", ".join(f"{s:g}" for s in sorted(candidates)) or "none"
        raise ConfigError(
            f"method.target_sparsity {target:g} is not among the candidates that are at least as "
            f"sparse as their teacher ({teacher_sparsity:g}): {known}; add the value to "
            "method.sparsities"
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
    """Check that a metric can be traded off against sparsity."""
    if math.isnan(metric):
        raise TrainingError(
            f"the candidate of sparsity {sparsity:g} has no score (nan), so no candidate can be "
            "chosen; lower train.learning_rate if training has diverged"
        )
    if abs(metric) > 1 + _ABOVE_ONE:
        raise ConfigError(
            f"the candidate of sparsity {sparsity:g} scores {metric:g}: the trade-off needs a "
            "metric from 0 to 1 (a correlation from -1), where higher is better; perplexity and "
            "loss are not supported: set method.metric, for example to accuracy"
        )
