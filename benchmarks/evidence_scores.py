"""Answers of finished classifiers to the test rows, with plain transformers."""

from __future__ import annotations

import csv
import operator
import threading
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ANSWERS = "answers.npz"
BATCH = 100
LOADING = threading.Lock()
"""Two cells may end at the same time, and `from_pretrained` may not run in two threads at once."""


class Answered(NamedTuple):
    """The answers of a classifier. logits: [N, C]. labels: names of the C classes, in order."""

    logits: np.ndarray
    labels: Sequence[str]


def answers_of(model: Path, texts: Sequence[str], max_length: int) -> Answered:
    """Return the answers of the classifier in a folder, one row per text."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with LOADING:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
        network = AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=True)
    network.eval()
    rows = []
    with torch.inference_mode():
        for first in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            )
            rows.append(network(**batch).logits.float().numpy())
    names = network.config.id2label
    return Answered(np.concatenate(rows), [names[number] for number in range(len(names))])


def test_rows(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts and the labels of a split."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    return [text for text, _ in rows], [label for _, label in rows]


def accuracy(answered: Answered, labels: Sequence[str]) -> float:
    """Return the share of rows whose most likely class is the label, in points."""
    said = [answered.labels[number] for number in answered.logits.argmax(axis=-1)]
    return 100 * sum(map(operator.eq, said, labels)) / len(labels)


def score_teacher(folder: Path, rows: Path, max_length: int) -> float:
    """Return the accuracy of the model in `final/`; write its logits next to the model."""
    texts, labels = test_rows(rows)
    answered = answers_of(folder / "final", texts, max_length)
    np.savez(folder / ANSWERS, logits=answered.logits, max_length=max_length)
    return accuracy(answered, labels)


def score_student(student: Path, teacher: Path, rows: Path) -> tuple[float, float]:
    """Return the accuracy of a student, and the mean KL(teacher || student) in nats.

    Args:
        student: folder of a model.
        teacher: folder with the teacher's stored answers.
        rows: file of the split that the teacher has answered.
    """
    stored, (texts, labels) = np.load(teacher / ANSWERS), test_rows(rows)
    answered = answers_of(student, texts, int(stored["max_length"]))
    return accuracy(answered, labels), mean_divergence(stored["logits"], answered.logits)


def mean_divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Return the mean KL(softmax(teacher) || softmax(student)) in nats. Both [N, C]."""
    target, ours = _log_softmax(teacher), _log_softmax(student)
    return float((np.exp(target) * (target - ours)).sum(axis=-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
