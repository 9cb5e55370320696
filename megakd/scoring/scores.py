"""Evaluations, and the single metric that ranks them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from torch import Tensor

from megakd.contract.metric import WHOLE, Metric, lower_is_better
from megakd.contract.stage import Scores
from megakd.contract.views import Cut
from megakd.errors import ConfigError, DataError

_CUT = TypeAdapter(Cut | None)


class Evaluation(NamedTuple):
    """The scores of all views of a model, or of the model itself, and the view that is kept.

    cut: how the model is cut when it is written; None if `view` defines the cut.
    """

    scores: Scores
    view: str | None
    cut: Cut | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the view that is kept."""
        return {} if self.view is None else self.scores[self.view]

    def scalars(self) -> dict[str, float]:
        """Return the values for the log: the kept metrics, and every view's metrics by name."""
        named = {
            f"eval/{view}/{name}": value
            for view, values in self.scores.items()
            for name, value in values.items()
            if view != WHOLE
        }
        return named | {f"eval/{name}": value for name, value in self.metrics.items()}

    def record(self) -> dict[str, Any]:
        """Return the evaluation in a form that JSON can store."""
        scores = {v: dict(s) for v, s in self.scores.items()}
        cut = None
        if self.cut is not None:
            cut = {name: part and part._asdict() for name, part in self.cut._asdict().items()}
        return {"view": self.view, "scores": scores, "cut": cut}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation of a `record`; JSON stores a number that is not finite as null."""
        scores = {view: numbers(values) for view, values in record["scores"].items()}
        return Evaluation(scores, record["view"], _CUT.validate_python(record["cut"]))


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return metrics that were read from JSON, which stores a number that is not finite as null."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def headline(metrics: Sequence[str]) -> Metric:
    """Return the main metric of a task: the mean if the task has several official metrics."""
    parts = tuple(metrics)
    name = parts[0] if len(parts) == 1 else "mean_" + "_".join(parts)
    return Metric(name=name, parts=parts, higher_is_better=not lower_is_better(parts[0]))


def metric_named(
    name: str | None, main: Metric, metrics: Sequence[str], *, weighed: bool
) -> Metric:
    """Return a metric of a task; without a name `main`, the metric that ranks evaluations.

    A metric that is `weighed` against sparsity is at most 1, and higher is better.
    """
    choices = [main, *(headline([metric]) for metric in metrics)]
    known = {one.name: one for one in choices if one.higher_is_better or not weighed}
    fitting = ", ".join(known)
    if name is None and main.name not in known:
        raise ConfigError(
            f"method.metric: {main.name}, the default of this task, cannot be weighed against "
            f"sparsity, because it is not a score between 0 and 1; set method.metric to {fitting}"
        )
    if name is not None and name not in known:
        what = "weighed against sparsity" if weighed else "computed"
        raise ConfigError(
            f"method.metric: {name} cannot be {what} in this task; use one of {fitting}, or remove "
            "the key"
        )
    return known[name or main.name]


def language_model_metrics(sums: Tensor) -> dict[str, float]:
    """Return the loss in nats per target, its perplexity, and the share of correct targets.

    `sums` [3]: see `Predictions.sums`, cross-entropy in nats, correct tokens, targets; or [4],
    followed by the characters of the targets: the loss in nats per character compares models with
    different vocabularies.
    """
    nats, right, targets, *characters = (float(value) for value in sums.tolist())
    if targets == 0:
        raise DataError(
            "the held-out text has no target to score: it is empty, has only one token, or has "
            "only unknown tokens"
        )
    loss = nats / targets
    # Above 700 nats the exponential overflows fp64; the perplexity is reported as infinite.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    metrics = {"perplexity": perplexity, "loss": loss, "accuracy": right / targets}
    if characters:
        metrics["nats_per_character"] = nats / max(1.0, characters[0])
    return metrics
