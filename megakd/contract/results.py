"""Results of a method and of a run, and the metric that decides between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.stage import Scores, Verdict
from megakd.errors import ConfigError

Report = dict[str, Any]
"""The content of report.json: one flat mapping, see docs/report.md.

A number of a model has the key `NAME.NUMBER`, such as `student.accuracy`; `teacher` is the largest
teacher. Lists hold names, texts, or rows such as those of the stages.
"""


Row = dict[str, Any]
"""A row of a list of the report, such as a candidate of a trial or a label's scores."""


class ParameterCounts(NamedTuple):
    """Numbers of weights; `encoder_parameters` excludes embeddings, pooler, decoder and heads."""

    parameters: int
    encoder_parameters: int


class Assistant(NamedTuple):
    """A teacher assistant: a model between the teacher and the student in size.

    sparsity: share of the teacher's units that the assistant lacks; None if it was not cut.
    """

    name: str
    sparsity: float | None
    folder: Path


@dataclass
class MethodRecord:
    """Results that a method adds to the report.

    candidates: what the method compared; all are scored in the same evaluation.
    asked: the size that the student was cut to: `what` (parameters, flops, speedup) and `value`.
    layers: the layers of the teacher that the student is made of; None: all, or none.
    pool: how often each of several teachers taught: `distribution`, and rows of `teachers`.
    pruning: the student of a method that prunes during training, at each evaluation.
    dev_scores: by name, the scores by which teachers were ranked.
    """

    candidates: list[Row] = field(default_factory=list)
    assistants: list[Assistant] = field(default_factory=list)
    asked: Row | None = None
    layers: tuple[int, ...] | None = None
    pool: Row | None = None
    pruning: list[Row] = field(default_factory=list)
    dev_scores: dict[str, float] = field(default_factory=dict)


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

    def of(self, values: Mapping[str, float]) -> float:
        """Return the mean of the official metrics in `parts`."""
        return sum(values[part] for part in self.parts) / len(self.parts)

    def worth(self, values: Mapping[str, float]) -> float:
        """Return the mean, negated if lower values are better."""
        return self.of(values) if self.higher_is_better else -self.of(values)


WHOLE = "whole"
"""The key of the model itself where scores are kept by view."""


@dataclass(frozen=True)
class MetricJudge:
    """A judge that compares evaluations by one metric of one view, or of the model itself."""

    metric: Metric
    view: str = WHOLE

    def __call__(self, scores: Scores, step: int) -> Verdict:
        del step
        return Verdict(self.metric.worth(scores[self.view]), self.view)
