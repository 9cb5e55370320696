"""The baseline of every classifier: the words of the texts, weighed by the labels alone."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from megakd.contract.tasks import TFIDF, THRESHOLD
from megakd.data.choosing import is_labelled
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a label that all rows have, or none
            model = OneVsRestClassifier(model).fit(learned, np.array(labels))
        return _score_sets(splits, metrics, words, model)
    model.fit(learned, labels)
    held_out, truth = _labelled(splits.held_out)
    shares = np.zeros((len(held_out), len(splits.label_names)))  # a class without a row gets none
    shares[:, model.classes_] = model.predict_proba(words.transform(held_out))
    logger.info("%s: %d labels learned in %.1f s", TFIDF, count, time.perf_counter() - began)
    return metrics.of(torch.from_numpy(shares).clamp(min=1e-6).log(), torch.tensor(truth))


def _score_sets(
    splits: Splits, metrics: TaskMetrics, words: Any, model: Any
) -> Mapping[str, float]:
    def scored(rows: Dataset, metrics: TaskMetrics) -> Mapping[str, float]:
        texts, truth = _labelled(rows)
        shares = torch.from_numpy(model.predict_proba(words.transform(texts)))
        return metrics.of(shares.double().logit(1e-6), torch.tensor(truth).double())

    threshold = scored(splits.validation, metrics)[THRESHOLD]
    return scored(splits.held_out, replace(metrics, threshold=threshold))


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
