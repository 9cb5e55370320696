"""Metrics of outputs, by task and by label.

Shapes: N rows, C classes. `predicted` are logits [N, C]; `truth` is [N] classes or scores, or of
rows with any number of labels [N, C] 0 or 1.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megakd.config.run import EvalConfig
from megakd.config.task import (
    LANGUAGE_TASKS,
    METRICS,
    ONE_LABEL_METRICS,
    SET_METRICS,
    TaskType,
)
from megakd.data.arrow import column_of
from megakd.data.batch import IGNORE, has_label
from megakd.data.rows import is_labelled
from megakd.errors import ConfigError, DataError, MegakdError, TrainingError, one_line
from megakd.models.thresholds import Threshold, named_threshold, threshold_in
from megakd.plugins import is_metric, metric_of
from megakd.stage import Metric, lower_is_better
from megakd.training.record import Row

logger = logging.getLogger(__name__)

Numbers = NDArray[np.float64]

Guesses = tuple[NDArray, NDArray, Numbers | None]
"""Predictions, labels and weights: of one label, a row once for each of its tied classes."""

LOSS, BINS, THRESHOLDS = "loss", 15, np.arange(1, 100) / 100


def best_threshold(predicted: Numbers, truth: Numbers) -> float:
    """Return the hundredth with the highest micro F1; of equal ones, that nearest to 0.5."""
    # After the reversed sums, place k counts the probabilities that reach threshold k.
    reached = np.searchsorted(THRESHOLDS, _sigmoid(predicted).ravel(), side="right")
    size = len(THRESHOLDS) + 1
    guessed = np.bincount(reached, minlength=size)[::-1].cumsum()[::-1][1:]
    right = np.bincount(reached, truth.ravel(), size)[::-1].cumsum()[::-1][1:]
    f1 = 2 * right / np.maximum(1, guessed + truth.sum())
    nearest = np.abs(THRESHOLDS - 0.5)
    return float(THRESHOLDS[np.lexsort((nearest, -f1))[0]])


def best_by_label(predicted: Numbers, truth: Numbers) -> tuple[float, ...]:
    """Return the threshold of each label with its best F1; without a row, the common one."""
    common, columns = best_threshold(predicted, truth), zip(predicted.T, truth.T, strict=True)
    return tuple(best_threshold(p, t) if t.any() else common for p, t in columns)


def decided(predicted: Numbers, threshold: Threshold) -> NDArray[np.bool_]:
    """Return [N, C] whether a row has a label."""
    return _sigmoid(predicted) >= threshold


def _sigmoid(logits: Numbers) -> Numbers:
    return 0.5 + 0.5 * np.tanh(logits / 2)  # does not overflow


def score_of(name: str, guessed: NDArray, truth: Numbers, weights: NDArray | None = None) -> float:
    """Return a metric of `config.task.METRICS` of classes [N] or of sets of labels [N, C].

    Means over labels are scikit-learn's, with 0 for an undefined score: of classes over those that
    occur or are predicted; of sets over all labels, so that an absent one counts as 0.
    """
    if name in ("exact_match", "accuracy"):
        right = (guessed == truth).reshape(len(truth), -1).all(axis=1)
        return float(np.average(right, weights=weights))
    kind, _, average = name.partition("_")
    score = partial(_sklearn(f"{kind}_score"), sample_weight=weights, zero_division=0)
    return float(score(truth, guessed, average=average or "binary"))


def _are_top(predicted: Numbers) -> NDArray[np.bool_]:
    return predicted == predicted.max(axis=1, keepdims=True)


def right_shares(predicted: Numbers, truth: NDArray) -> Numbers:
    """Return [N], whether a row is right; of tied classes each is right as often as a guess."""
    is_top = _are_top(predicted)
    return is_top[np.arange(len(truth)), truth.astype(np.int64)] / is_top.sum(axis=1).clip(min=1)


def same_class(one: int, other: int) -> float:
    """Return the probability that two sets of tied classes, as bits, choose the same at random."""
    return (one & other).bit_count() / max(1, one.bit_count() * other.bit_count())


def scores_by_label(
    label_names: Sequence[str], guessed: NDArray, truth: NDArray, weights: NDArray | None = None
) -> list[Row]:
    """Return a row of scores for each label."""
    scores, labels = _sklearn("precision_recall_fscore_support"), range(len(label_names))
    parts = scores(truth, guessed, labels=labels, sample_weight=weights, zero_division=0)
    columns = (np.asarray(part).tolist() for part in parts)
    return [
        {"label": label, "precision": precision, "recall": recall, "f1": f1, "rows": round(rows)}
        for label, precision, recall, f1, rows in zip(label_names, *columns, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """The metrics that an evaluation computes.

    names: metric names in the order of the report; the loss on labels is always computed too.
    threshold: the probability from which a row with any number of labels has a label; None: the
        best of the rows that are scored, which are then validation rows.
    by_label: whether the best is chosen for each label.
    """

    names: tuple[str, ...]
    main: Metric
    label_names: tuple[str, ...] = ()
    threshold: Threshold | None = None
    by_label: bool = False

    def values(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return one value per name, the number that ranks evaluations, and the mean loss.

        `outputs` are [N, C] logits, or [N, 1] or [N] scores; `labels` are [N] class numbers (-100 =
        none) or scores (NaN = none), or [N, C] 0 or 1 (NaN = none).
        """
        predicted, truth = _scored_rows(outputs, labels)
        guesses = self._guesses(predicted, truth)
        values = {n: _score_named(n, predicted, truth, guesses) for n in self.names if n != LOSS}
        if truth.ndim == 2:
            values |= named_threshold(self._threshold(predicted, truth), self.label_names)
        total, count = summed_loss(outputs, labels).tolist()
        values[LOSS] = total / count
        return values | {self.main.name: self.main.mean(values)}

    def decided_on(self, values: Mapping[str, float]) -> TaskMetrics:
        """Return the metrics with the threshold that was best for rows with these values."""
        return replace(self, threshold=threshold_in(values))

    def _threshold(self, predicted: Numbers, truth: Numbers) -> Threshold:
        if self.threshold is not None:
            return self.threshold
        return (best_by_label if self.by_label else best_threshold)(predicted, truth)

    def _guesses(self, predicted: Numbers, truth: Numbers) -> Guesses:
        if truth.ndim == 2:
            return decided(predicted, self._threshold(predicted, truth)), truth, None
        is_top = _are_top(predicted)
        rows, classes = is_top.nonzero()
        return classes, truth[rows].astype(np.int64), 1 / is_top.sum(axis=1)[rows]

    def of_classes(self, outputs: Tensor, labels: Tensor) -> Row:
        """Return scores by class, and of one label confusions and calibration; or nothing."""
        if not self.label_names:
            return {}
        (predicted, truth), names = _scored_rows(outputs, labels), self.label_names
        guesses, truths, weights = self._guesses(predicted, truth)
        per_class = scores_by_label(names, guesses, truths, weights)
        if truth.ndim == 2:
            threshold = self._threshold(predicted, truth)
            if isinstance(threshold, tuple):
                for row, one in zip(per_class, threshold, strict=True):
                    row["threshold"] = one
            return {"per_class": per_class}
        # Of many classes, a table of all pairs would not fit into memory.
        pairs, places = np.unique(truths * len(names) + guesses, return_inverse=True)
        counts = np.bincount(places, weights).round(3).tolist()  # of ties shares of rows
        confusion = [
            {
                "label": names[pair // len(names)],
                "predicted": names[pair % len(names)],
                "rows": int(count) if count.is_integer() else count,
            }
            for pair, count in zip(pairs.tolist(), counts, strict=True)
        ]
        return {
            "per_class": per_class,
            "confusion": confusion,
            "calibration_error": calibration_error(predicted, truth),
        }

    def answers(self, outputs: Tensor, labels: Tensor) -> list[int]:
        """Return a number for each row, whose bits are its most likely classes or its labels."""
        predicted = outputs.double().numpy()
        if labels.dim() == 1:
            chosen = _are_top(predicted)
        else:
            chosen = decided(predicted, self._threshold(*_scored_rows(outputs, labels)))
        return [int.from_bytes(row.tobytes()) for row in np.packbits(chosen, axis=1)]


def _score_named(name: str, predicted: Numbers, truth: Numbers, guesses: Guesses) -> float:
    if name in ("pearson", "spearman"):
        from scipy import stats

        of: Callable[..., Any] = getattr(stats, f"{name}r")
        return _correlation(name, lambda a, b: of(a, b)[0], predicted[:, 0], truth)
    if is_metric(name):
        return _of_plugin(name, predicted, truth)
    guessed, truths, weights = guesses
    if name == "matthews_correlation":
        of = partial(_sklearn("matthews_corrcoef"), sample_weight=weights)
        return _correlation(name, of, guessed, truths)
    if name in ONE_LABEL_METRICS:
        guessed, truths = guessed == 1, truths == 1
        if not truths.any() and not guessed.any():
            logger.info(
                "%s is undefined because no label and no prediction is positive: counted as 0",
                name,
            )
    return score_of(name, guessed, truths, weights)


def _of_plugin(name: str, predicted: Numbers, truth: Numbers) -> float:
    try:
        return float(metric_of(name)(predicted, truth))
    except MegakdError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the metric {name} failed on outputs of shape {predicted.shape} and labels of shape "
            f"{truth.shape}: {type(error).__name__}: {one_line(error)}; it must return a number"
        ) from error


def _try_plugins(metrics: TaskMetrics, task: TaskType, *, multi_label: bool) -> None:
    # On random outputs, before anything is trained.
    classes = len(metrics.label_names)
    random = np.random.default_rng(0)
    truth = random.random(32) if task == "regression" else np.arange(32.0) % max(classes, 2)
    if multi_label:
        truth = np.eye(classes)[truth.astype(np.int64)]
    shape = (32,) if task == "regression" else (32, max(classes, 2))
    for name in filter(is_metric, metrics.names):
        _of_plugin(name, random.random(shape), truth)


def task_metrics(
    config: EvalConfig,
    task: TaskType,
    official: Sequence[str],
    label_names: Sequence[str] = (),
    *,
    multi_label: bool = False,
) -> TaskMetrics:
    """Return the metrics of a run: the official metrics of its data, and those in the config."""
    chosen = () if config.metric is None else (config.metric,)
    names = METRICS[task] if task in LANGUAGE_TASKS else (*official, *chosen, *config.metrics)
    if task == "classification":  # accuracy alone hides classes that are never recognised
        names = (*names, *(SET_METRICS[:3] if multi_label else ("f1_macro",)))
    names = tuple(dict.fromkeys(names))
    for name in names if multi_label else ():
        if name not in SET_METRICS and not is_metric(name):
            raise ConfigError(
                f"eval.metric: {name} is about rows with one label, and a row of these data has "
                f"any number; use one of {', '.join(SET_METRICS)}"
            )
    about_one = [name for name in names if name in ONE_LABEL_METRICS]
    if about_one and len(label_names) > 2:
        raise ConfigError(
            f"eval.metric: {about_one[0]} is about the second of two labels, and the data have "
            f"{len(label_names)}; use {about_one[0]}_macro"
        )
    if config.threshold == "each" and not multi_label:
        raise ConfigError(
            "eval.threshold: each is about rows with any number of labels, and a row of these data "
            "has one; remove the key"
        )
    metrics = TaskMetrics(
        names=names,
        main=headline(chosen or official),
        label_names=tuple(label_names),
        by_label=config.threshold == "each",
    )
    _try_plugins(metrics, task, multi_label=multi_label)
    return metrics


def _scored_rows(outputs: Tensor, labels: Tensor) -> tuple[Numbers, Numbers]:
    labels = labels.detach().cpu() if labels.dim() == 2 else labels.detach().cpu().reshape(-1)
    truth, known = labels.double().numpy(), has_label(labels).numpy()
    known = known[:, 0] if known.ndim == 2 else known
    predicted = outputs.detach().cpu().double().numpy().reshape(len(truth), -1)
    if not known.any():
        raise DataError(
            f"none of the {len(truth)} held-out rows has a label, so no metric can be computed"
        )
    bad = int((~np.isfinite(predicted[known])).any(axis=1).sum())
    if bad:
        raise TrainingError(
            f"the model's outputs are not finite for {bad} of {int(known.sum())} held-out "
            "rows: training has diverged; lower train.learning_rate"
        )
    return predicted[known], truth[known]


def summed_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return [2] fp64: the summed loss of the labelled rows, and their number."""
    if labels.dim() == 2:  # the mean over the classes of a row
        known = has_label(labels[:, 0])
        missed = functional.binary_cross_entropy_with_logits(
            outputs.double()[known], labels.double()[known], reduction="none"
        )
        return torch.stack([missed.mean(dim=1).sum(), known.sum().double()])
    if labels.is_floating_point():
        error = (outputs.double().reshape(len(labels), -1)[:, 0] - labels.double()).square()
        known = has_label(labels)
        return torch.stack([error[known].sum(), known.sum().double()])
    missed = functional.cross_entropy(
        outputs.double(), labels, ignore_index=IGNORE, reduction="sum"
    )
    return torch.stack([missed, has_label(labels).sum().double()])


def loss_of_guessing(rows: Dataset, tokens: int) -> float:
    """Return the loss of the best answer that is the same for all rows: shares, or a mean score.

    Of a language model, all of its `tokens` have equal shares.
    """
    if "label" not in rows.column_names:
        return math.log(tokens)
    labels = column_of(rows, "label")[is_labelled(rows)]
    if labels.ndim == 2:  # the mean over the classes of a row
        shares = np.stack([labels.mean(axis=0), 1 - labels.mean(axis=0)])
    elif labels.dtype.kind == "f":
        return float(labels.var())
    else:
        shares = np.bincount(labels)[:, None] / len(labels)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=0).mean())


def _sklearn(name: str) -> Callable[..., Any]:
    from sklearn import metrics

    return getattr(metrics, name)


def _correlation(
    name: str, of: Callable[[Numbers, Numbers], Any], predicted: Numbers, truth: Numbers
) -> float:
    for what, values in (("predictions", predicted), ("labels", truth)):
        if np.ptp(values) == 0:
            logger.info(
                "%s is undefined because all %s are %g: counted as 0", name, what, values[0]
            )
            return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns about precision for nearly constant values
        value = float(of(truth, predicted))
    if math.isnan(value):
        logger.info("%s is undefined for these %d rows: counted as 0", name, len(truth))
        return 0.0
    return value


def calibration_error(predicted: Numbers, truth: Numbers) -> float:
    """Return the expected calibration error (Guo et al. 2017, eq. 3), a share.

    A row with the largest probability p is in bin m of `BINS` if (m - 1) / BINS < p <= m / BINS;
    the error is sum_m |B_m| / N * |accuracy(B_m) - mean p of B_m|.
    """
    shares = np.exp(predicted - predicted.max(axis=1, keepdims=True))
    confidence = shares.max(axis=1) / shares.sum(axis=1)
    right = right_shares(predicted, truth)
    bins = np.ceil(confidence * BINS).astype(np.int64) - 1
    gaps = np.bincount(bins, weights=right - confidence)
    return float(np.abs(gaps).sum() / len(truth))


def numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return metrics that were read from JSON, which stores a number that is not finite as null."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def headline(metrics: Sequence[str]) -> Metric:
    """Return the main metric of a task: the mean if the task has several official metrics."""
    parts = tuple(metrics)
    name = parts[0] if len(parts) == 1 else "mean_" + "_".join(parts)
    return Metric(name=name, parts=parts, higher_is_better=not lower_is_better(parts[0]))


def check_weighed(main: Metric, metrics: Sequence[str]) -> None:
    """Check that the metric that ranks evaluations can be weighed against sparsity."""
    if not main.higher_is_better:
        fitting = ", ".join(name for name in metrics if not lower_is_better(name))
        raise ConfigError(
            f"eval.metric: {main.name} cannot be weighed against sparsity, because it is not a "
            f"score between 0 and 1; set eval.metric to {fitting}"
        )


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
