"""The baseline of every classifier: the words of the texts, weighed by the labels alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from megakd.contract.tasks import TFIDF, THRESHOLD
from megakd.data.choosing import is_labelled
from megakd.data.splits import Splits
from megakd.scoring.metrics import TaskMetrics

logger = logging.getLogger(__name__)
MOST_ROWS, MOST_TERMS, MOST_CHARACTERS = 20_000, 50_000, 1_000
"""Rows that are learned at most, of more rows evenly spaced ones; words and pairs of words; and the
characters that are read of a text. The baseline takes seconds."""
SURE = 9.0
"""Log-odds of a label that all training rows have, or its negative of one that none has."""


def score_words(splits: Splits, metrics: TaskMetrics) -> Mapping[str, float]:
    """Return the metrics of TF-IDF with logistic regression on the held-out rows.

    Empty if the training rows have labels of fewer than two classes, or no words.
    """
    from sklearn.base import clone
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier

    began = time.perf_counter()
    texts, labels = _labelled(splits.train, most=MOST_ROWS)
    if not splits.multi_label and len(set(labels)) < 2:
        return {}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_TERMS)
    try:
        learned = words.fit_transform(texts)
    except ValueError:  # no text has a word
        return {}
    # As good as `LogisticRegression(C=10)` on banking77 and SST-2, and ten times faster there.
    passes, count = min(100, max(10, 100_000 // len(labels))), len(labels)
    options: Any = {"tol": None}  # as many passes, whatever the loss
    model: Any = SGDClassifier(
        loss="log_loss", alpha=0.1 / count, max_iter=passes, random_state=0, **options
    )
    if splits.multi_label:
        # One class against all others; one that all rows have, or none, needs no words.
        columns = np.array(labels).T
        models = [clone(model).fit(learned, c) if 0 < c.mean() < 1 else c[0] for c in columns]

        def logits(texts: list[str]) -> NDArray:
            seen, sure = words.transform(texts), np.full(len(texts), SURE)
            of = [sure * (2 * m - 1) if m in (0, 1) else m.decision_function(seen) for m in models]
            return np.stack(of, axis=1)

        return _score_sets(splits, metrics, logits)
    model.fit(learned, labels)
    held_out, truth = _labelled(splits.held_out)
    shares = np.zeros((len(held_out), len(splits.label_names)))  # a class without a row gets none
    shares[:, model.classes_] = model.predict_proba(words.transform(held_out))
    logger.info("%s: %d labels learned in %.1f s", TFIDF, count, time.perf_counter() - began)
    return metrics.of(torch.from_numpy(shares).clamp(min=1e-6).log(), torch.tensor(truth))


def _score_sets(
    splits: Splits, metrics: TaskMetrics, logits: Callable[[list[str]], NDArray]
) -> Mapping[str, float]:
    def scored(rows: Dataset) -> Mapping[str, float]:
        texts, truth = _labelled(rows)
        return metrics.of(torch.from_numpy(logits(texts)), torch.tensor(truth).double())

    threshold = scored(splits.validation)[THRESHOLD]
    metrics = replace(metrics, threshold=threshold)
    return scored(splits.held_out)


def _labelled(rows: Dataset, *, most: int | None = None) -> tuple[list[str], list[Any]]:
    numbers = is_labelled(rows).nonzero()[0]
    if most is not None:
        numbers = numbers[:: max(1, -(-len(numbers) // most))]
    chosen = rows.select(numbers)[:]
    texts = [text[:MOST_CHARACTERS] for text in chosen["text"]]
    if "text_pair" in chosen:
        pairs = zip(texts, chosen["text_pair"], strict=True)
        texts = [f"{text} {pair[:MOST_CHARACTERS]}" for text, pair in pairs]
    return texts, chosen["label"]
