"""Scores of a split: every real row once, whatever the batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from megakd.contract.batch import IGNORE, Batch, Predictions
from megakd.engine import distributed
from megakd.engine.distributed import Ranks
from megakd.errors import MegakdError
from megakd.scoring.metrics import TaskMetrics
from megakd.scoring.scorer import Scorer
from megakd.scoring.scores import headline

ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def collate(rows: Any, *, dummy_rows: int = 0) -> Batch:
    """One token per row: its number, which the fake models answer from."""
    numbers, labels = (rows[name].to_pylist() for name in ("number", "label"))
    ids = torch.tensor([*numbers, *[0] * dummy_rows])[:, None]
    valid = torch.tensor([*[True] * len(numbers), *[False] * dummy_rows])[:, None]
    return Batch({"input_ids": ids}, torch.tensor([*labels, *[IGNORE] * dummy_rows]), valid)


def scorer(names: tuple[str, ...], batch_size: int) -> Scorer:
    metrics = TaskMetrics(names=names, main=headline(names), label_names=("even", "odd"))
    return Scorer(metrics=metrics, collate=collate, batch_size=batch_size, ranks=ONE_RANK)  # type: ignore[arg-type]


def odd_or_even(batch: Batch) -> Predictions:
    """Says class number % 2; of a dummy row nothing that could be scored."""
    said = torch.nn.functional.one_hot(batch.inputs["input_ids"][:, 0] % 2, 2).float()
    return Predictions(outputs=said.masked_fill(~batch.valid, math.nan), sums=None)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_metrics_are_of_the_real_rows_whatever_the_batch_size(batch_size):
    rows = Dataset.from_dict({"number": [1, 2, 3, 4, 5], "label": [1, 0, 1, 1, 1]})

    found = scorer(("accuracy",), batch_size).score(odd_or_even, rows)

    assert found["accuracy"] == 0.8


def test_rows_without_a_label_are_left_out():
    rows = Dataset.from_dict({"number": [1, 2, 3], "label": [1, IGNORE, 0]})

    assert scorer(("accuracy",), 2).score(odd_or_even, rows)["accuracy"] == 0.5


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_loss_beside_the_metrics_is_that_of_a_pass_of_its_own(batch_size):
    rows = Dataset.from_dict({"number": [1, 2, 3, 4], "label": [1, IGNORE, 0, 0]})
    one = scorer(("accuracy",), batch_size)

    found = one.score(odd_or_even, rows)["loss"]

    assert found == pytest.approx(one.loss(odd_or_even, rows), abs=1e-12)


def test_a_classifier_is_scored_by_label_too():
    rows = Dataset.from_dict({"number": [1, 2, 3, 4, 5], "label": [1, 0, 0, IGNORE, 1]})

    even, odd = scorer(("accuracy",), 2).scored(odd_or_even, rows).by_class

    assert even == {
        "label": "even",
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "rows": 2,
    }
    assert (odd["label"], odd["rows"]) == ("odd", 2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_language_models_metrics_come_from_sums_over_all_batches(batch_size):
    rows = Dataset.from_dict({"number": [1, 2, 3, 4, 5], "label": [0] * 5})

    def predict(batch: Batch) -> Predictions:
        numbers = batch.inputs["input_ids"][batch.valid].double()
        right, targets = (numbers > 3).sum().double(), numbers.sum()  # a row of n has n targets
        return Predictions(outputs=None, sums=torch.stack([2 * targets, right, targets]))

    found = scorer(("perplexity",), batch_size).score(predict, rows)

    assert found == pytest.approx({"loss": 2.0, "perplexity": math.exp(2), "accuracy": 2 / 15})


def test_a_split_that_cannot_be_scored_is_an_error():
    rows = Dataset.from_dict({"number": [1, 2], "label": [IGNORE, IGNORE]})

    with pytest.raises(MegakdError, match="label"):
        scorer(("accuracy",), 2).score(odd_or_even, rows)
