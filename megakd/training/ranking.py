"""The metric that ranks evaluations, and the judge of a stage that asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megakd.errors import ConfigError
from megakd.plugins import is_metric, metric_of
from megakd.stage import Scores, Verdict

LOWER_IS_BETTER = ("perplexity", "loss", "nats_per_character")

LOSSES = ("hard_", "soft_target_", "hidden_", "embedding_", "attention_", "relation_")
"""Beginnings of the names of loss terms, which an evaluation may report too."""


def lower_is_better(name: str) -> bool:
    """Return whether lower values of a metric are better; False if its package is missing."""
    if not is_metric(name):
        return name in LOWER_IS_BETTER or name.startswith(LOSSES)
    try:
        return not getattr(metric_of(name), "higher_is_better", True)
    except ConfigError:
        return False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number of an evaluation, and whether higher values are better."""

    name: str
    parts: tuple[str, ...]
    higher_is_better: bool

    def mean(self, values: Mapping[str, float]) -> float:
        """Return the mean of the official metrics in `parts`."""
        return sum(values[part] for part in self.parts) / len(self.parts)

    def worth(self, values: Mapping[str, float]) -> float:
        """Return the mean, negated if lower values are better."""
        return self.mean(values) if self.higher_is_better else -self.mean(values)


WHOLE = "whole"
"""The key of the model itself where scores are kept by view."""


@dataclass(frozen=True)
class MetricJudge:
    """A judge that compares evaluations by one metric of a view, by its name, or of the model."""

    metric: Metric
    scored: str = WHOLE

    def __call__(self, scores: Scores, step: int) -> Verdict:
        del step
        return Verdict(self.metric.worth(scores[self.scored]), self.scored)
