"""Scores of a classifier by label, its confusions, and the calibration of its probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megakd.contract.results import ClassifierReport, ClassReport

BINS = 15

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]


def classifier_report(
    predicted: Numbers, truth: Numbers, label_names: Sequence[str]
) -> ClassifierReport:
    """Return the scores of [N, C] logits on rows with the class numbers [N]."""
    classes, truths, guesses = len(label_names), truth.astype(np.int64), predicted.argmax(axis=1)
    # Of many classes, a table of all pairs would not fit into memory.
    pairs, numbers = np.unique(truths * classes + guesses, return_counts=True)
    confusion = {label: dict[str, int]() for label in label_names}
    for pair, number in zip(pairs, numbers, strict=True):
        label, guessed = (label_names[int(n)] for n in divmod(pair, classes))
        confusion[label][guessed] = int(number)
    right, rows, predictions = (
        np.bincount(of, minlength=classes) for of in (truths[truths == guesses], truths, guesses)
    )
    return {
        "per_class": _by_class(right, rows, predictions, label_names),
        "confusion": confusion,
        "calibration_error": calibration_error(predicted, truth),
    }


def _by_class(
    right: Counts, rows: Counts, predictions: Counts, label_names: Sequence[str]
) -> list[ClassReport]:
    # As in scikit-learn, a score without rows is 0.
    scores = (
        share / np.maximum(1, whole)
        for share, whole in ((right, predictions), (right, rows), (2 * right, rows + predictions))
    )
    columns = (column.tolist() for column in (*scores, rows))
    return [
        {"label": label, "precision": precision, "recall": recall, "f1": f1, "rows": number}
        for label, precision, recall, f1, number in zip(label_names, *columns, strict=True)
    ]


def calibration_error(predicted: Numbers, truth: Numbers) -> float:
    """Return the expected calibration error (Guo et al. 2017, eq. 3), a share.

    A row with the largest probability p is in bin m of `BINS` if (m - 1) / BINS < p <= m / BINS;
    the error is sum_m |B_m| / N * |accuracy(B_m) - mean p of B_m|.
    """
    shares = np.exp(predicted - predicted.max(axis=1, keepdims=True))
    confidence = shares.max(axis=1) / shares.sum(axis=1)
    right = predicted.argmax(axis=1) == truth
    bins = np.ceil(confidence * BINS).astype(np.int64) - 1
    gaps = np.bincount(bins, weights=right - confidence)
    return float(np.abs(gaps).sum() / len(truth))
