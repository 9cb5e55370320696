"""MiniDisc's selection of the candidate that becomes the teacher assistant.

Zhang et al. 2024, https://arxiv.org/abs/2205.14570.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from megakd.errors import ConfigError, TrainingError

# Computed correlations may be slightly above 1 because of rounding.
_ABOVE_ONE = 1e-6


def tradeoff(metric: float, sparsity: float, weight: float) -> float:
    """Return the trade-off of a candidate: metric + lambda * sparsity.

    The metric is from 0 (a correlation from -1) to 1, higher is better.
    """
    return metric + weight * sparsity


def choose(scores: Mapping[float, float], *, weight: float, target: float) -> tuple[float, float]:
    """Return the sparsity with the highest trade-off, at most the target, and that trade-off.

    For equal trade-offs, the sparser candidate is chosen: it is smaller and as good, and in the
    limit of a large lambda, the sparsest candidate is chosen.

    Differs from the authors' code, which compares the metric of the target with the trade-offs of
    the other candidates, each from its best evaluation. Here, all values are trade-offs of the same
    evaluation.

    Args:
        scores: metric by sparsity.
        weight: the lambda of the trade-off.
        target: the sparsity at which the schedule ends.
    """
    for sparsity, metric in scores.items():
        check_metric(metric, sparsity)
    highest, best = max((tradeoff(metric, s, weight), s) for s, metric in scores.items())
    return min(best, target), highest


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
