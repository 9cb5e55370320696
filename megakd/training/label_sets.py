"""Scores of labels, and the threshold of a label where rows have any number of them.

Shapes: N rows, C classes. `predicted` are logits [N, C], `truth` is [N, C] 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megakd.contract.results import Row

Numbers = NDArray[np.float64]
THRESHOLDS = np.arange(1, 100) / 100


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


def decided(predicted: Numbers, threshold: float) -> NDArray[np.bool_]:
    """Return [N, C] whether a row has a label."""
    return _sigmoid(predicted) >= threshold


def _sigmoid(logits: Numbers) -> Numbers:
    return 0.5 + 0.5 * np.tanh(logits / 2)  # does not overflow


def score_of(name: str, guessed: NDArray, truth: Numbers) -> float:
    """Return a metric of `contract.tasks.METRICS` of classes [N] or of sets of labels [N, C].

    As scikit-learn computes it: over the labels that occur or are predicted.
    """
    if name in ("exact_match", "accuracy"):
        return float((guessed == truth).reshape(len(truth), -1).all(axis=1).mean())
    from sklearn import metrics

    kind, _, average = name.partition("_")
    of = getattr(metrics, f"{kind}_score")
    return float(of(truth, guessed, average=average, zero_division=0))


def scores_by_label(guessed: NDArray, truth: NDArray, label_names: Sequence[str]) -> list[Row]:
    """Return a row of scores for each label."""
    from sklearn import metrics

    scores: Any = metrics.precision_recall_fscore_support
    parts = scores(truth, guessed, labels=range(len(label_names)), average=None, zero_division=0)
    columns = (np.asarray(part).tolist() for part in parts)
    return [
        {"label": label, "precision": precision, "recall": recall, "f1": f1, "rows": int(rows)}
        for label, precision, recall, f1, rows in zip(label_names, *columns, strict=True)
    ]
