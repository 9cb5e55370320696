"""The score of TF-IDF and a logistic regression, beside which a model is read."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from megakd.config.task import TFIDF
from megakd.data.rows import is_labelled
from megakd.data.splits import Splits
from megakd.training.metrics import TaskMetrics

logger = logging.getLogger(__name__)

MOST_ROWS, MOST_TERMS, MOST_CHARACTERS = 20_000, 50_000, 1_000
"""Rows that are learned at most, of more rows evenly spaced ones; words and pairs of words; and the
characters that are read of a text. The baseline takes seconds."""


def score_words(splits: Splits, metrics: TaskMetrics) -> Mapping[str, float]:
    """Return the metrics of TF-IDF with logistic regression on the held-out rows.

    Empty if the training rows have labels of fewer than two classes, or no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.multiclass import OneVsRestClassifier

    began = time.perf_counter()
    texts, labels = _labelled(splits.train, most=MOST_ROWS)
    is_set = labels.ndim == 2  # a row has any number of labels
    if not is_set and len(np.unique(labels)) < 2:
        return {}
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=MOST_TERMS)
    try:
        learned = words.fit_transform(texts)
    except ValueError:  # no text has a word
        return {}
    # As good as `LogisticRegression(C=10)` on banking77 and SST-2, and ten times faster there.
    passes, count = min(100, max(10, 100_000 // len(labels))), len(labels)
    model: Any = SGDClassifier(
        loss="log_loss",
        alpha=0.1 / count,
        max_iter=passes,
        random_state=0,
        tol=None,  # type: ignore[arg-type]  # as many passes, whatever the loss
    )
    if is_set:
        model = OneVsRestClassifier(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a label that all rows have, or none
        model.fit(learned, labels)

    def scored(rows: Dataset, metrics: TaskMetrics) -> Mapping[str, float]:
        texts, truth = _labelled(rows)
        shares = np.zeros((len(texts), len(splits.label_names)))  # a class without a row gets none
        shares[:, model.classes_] = model.predict_proba(words.transform(texts))
        outputs, truth = torch.from_numpy(shares), torch.from_numpy(truth)
        if is_set:
            return metrics.values(outputs.logit(1e-6), truth.double())
        return metrics.values(outputs.clamp(min=1e-6).log(), truth)

    if is_set:
        metrics = metrics.decided_on(scored(splits.validation, metrics))
    logger.info("%s: %d labels learned in %.1f s", TFIDF, count, time.perf_counter() - began)
    return scored(splits.held_out, metrics)


def _labelled(rows: Dataset, *, most: int | None = None) -> tuple[list[str], NDArray]:
    numbers = is_labelled(rows).nonzero()[0]
    if most is not None:
        numbers = numbers[:: max(1, -(-len(numbers) // most))]
    chosen = rows.select(numbers)[:]
    texts = [text[:MOST_CHARACTERS] for text in chosen["text"]]
    if "text_pair" in chosen:
        pairs = zip(texts, chosen["text_pair"], strict=True)
        texts = [f"{text} {pair[:MOST_CHARACTERS]}" for text, pair in pairs]
    return texts, np.array(chosen["label"])
