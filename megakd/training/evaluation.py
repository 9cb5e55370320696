"""What an evaluation comes to, and the one number that ranks evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.contract.metrics import WHOLE, Metric, lower_is_better
from megakd.contract.stage import Cut, Scores
from megakd.contract.units import UnitOrder, View
from megakd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


class Evaluation(NamedTuple):
    """The scores of all views of a model, or of the model itself, and the one that is kept.

    cut: how the model is written; None where `view` says that.
    """

    scores: Scores
    view: str | None
    cut: Cut | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of what is kept."""
        return {} if self.view is None else self.scores[self.view]

    def scalars(self) -> dict[str, float]:
        """For the log: what is kept, and every view under its name."""
        named = {
            f"eval/{view}/{name}": value
            for view, values in self.scores.items()
            for name, value in values.items()
            if view != WHOLE
        }
        return named | {f"eval/{name}": value for name, value in self.metrics.items()}

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        scores = {v: dict(s) for v, s in self.scores.items()}
        cut = None if self.cut is None else cut_record(self.cut)
        return {"view": self.view, "scores": scores, "cut": cut}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Evaluation:
        """What `record` gave; JSON has no word for a number that is not finite."""
        scores = {
            view: {k: math.nan if v is None else v for k, v in values.items()}
            for view, values in record["scores"].items()
        }
        cut = record["cut"]
        return Evaluation(scores, record["view"], None if cut is None else read_cut(cut))


def cut_record(cut: Cut) -> dict[str, Any]:
    """Return a cut as JSON can hold it."""
    return {
        "order": None if cut.order is None else cut.order._asdict(),
        "view": cut.view._asdict(),
    }


def read_cut(record: Mapping[str, Any]) -> Cut:
    """Return the cut that `cut_record` gave."""
    order, view = record["order"], record["view"]
    if order is not None:
        layers = {kind: tuple(map(tuple, order[kind])) for kind in ("heads", "neurons")}
        order = UnitOrder(**layers, width=order["width"] and tuple(order["width"]))
    kept = View(tuple(view["heads"]), tuple(view["neurons"]), view["width"])
    return Cut(order, kept)


def headline(metrics: Sequence[str]) -> Metric:
    """The number that stands for a task: the mean where it has several official metrics."""
    parts = tuple(metrics)
    name = parts[0] if len(parts) == 1 else "mean_" + "_".join(parts)
    return Metric(name=name, parts=parts, higher_is_better=not lower_is_better(parts[0]))


def weighable(name: str | None, main: Metric, metrics: Sequence[str]) -> Metric:
    """Return a metric that can be weighed against sparsity: at most 1, and higher is better.

    Args:
        name: of the metric; None takes the one that ranks evaluations.
        main: ranks evaluations.
        metrics: all that an evaluation computes.

    Raises:
        ConfigError: there is no such metric; names the others.
    """
    found = [main, *(headline([metric]) for metric in metrics)]
    known = {metric.name: metric for metric in found if metric.higher_is_better}
    fitting = ", ".join(known)
    if name is None and main.name not in known:
        raise ConfigError(
            f"method.metric: {main.name} stands for this task and cannot be weighed against "
            f"sparsity, because it is not a score between 0 and 1; set method.metric to {fitting}"
        )
    if name is not None and name not in known:
        raise ConfigError(
            f"method.metric: {name} cannot be weighed on this task; use one of {fitting}, or "
            f"leave it out"
        )
    return known[name or main.name]


def language_model_metrics(sums: Tensor) -> dict[str, float]:
    """The loss in nats per target, its perplexity, and the share of targets that are right.

    Args:
        sums: [3], see `Predictions.sums`: cross-entropy in nats, right tokens, targets.

    Raises:
        DataError: there is no target.
    """
    nats, right, targets = (float(value) for value in sums.tolist())
    if targets == 0:
        raise DataError(
            "the held-out text has no target to score: it is empty, one token long, or holds "
            "nothing but unknown tokens"
        )
    loss = nats / targets
    # Past 700 nats the exponential leaves fp64; a loss like that has no perplexity to speak of.
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"perplexity": perplexity, "loss": loss, "accuracy": right / targets}
