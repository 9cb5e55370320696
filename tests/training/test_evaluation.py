"""Metrics against hand values, degenerate inputs, and scores of every real row once."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from megakd.contract.batch import IGNORE, Batch, Predictions
from megakd.contract.metric import WHOLE, MetricJudge
from megakd.contract.stage import Verdict
from megakd.engine.distributed import Ranks
from megakd.errors import DataError, MegakdError, TrainingError
from megakd.scoring.metrics import TaskMetrics
from megakd.scoring.scorer import Scorer
from megakd.scoring.scores import Evaluation, headline, language_model_metrics
from megakd.storage.atomic import json_text


def metrics_of(names: tuple[str, ...], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics, without the loss that is always there."""
    values = TaskMetrics(names=names, main=headline(names)).of(outputs, labels)
    assert values.pop("loss") >= 0
    return values


def logits_of(classes: list[int], count: int = 2) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


@pytest.mark.parametrize(
    ("names", "outputs", "labels", "wanted"),
    [
        # 2 true positives, 1 false positive, 1 false negative: F1 = 4 / 6.
        (
            ("accuracy", "f1"),
            [1, 1, 0, 0, 1],
            [1, 0, 1, 0, 1],
            {"accuracy": 3 / 5, "f1": 2 / 3, "mean_accuracy_f1": (3 / 5 + 2 / 3) / 2},
        ),
        # (2·2 - 1·1) / sqrt(3·3·3·3) = 1/3
        (
            ("matthews_correlation",),
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 1],
            {"matthews_correlation": 1 / 3},
        ),
        (("accuracy",), [1, 1, 0], [1, -100, 0], {"accuracy": 1.0}),
        (("f1",), [1], [1], {"f1": 1.0}),
    ],
    ids=["two metrics", "matthews", "row without a class", "one row"],
)
def test_metrics_of_classes_are_the_hand_values(names, outputs, labels, wanted) -> None:
    said = logits_of(outputs)

    assert metrics_of(names, said, torch.tensor(labels)) == pytest.approx(wanted)
    assert metrics_of(names, said.bfloat16(), torch.tensor(labels)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "scores", "labels", "wanted"),
    [
        # deviations (-2.5, -1.5, -0.5, 4.5) and (-1.5, -0.5, 0.5, 1.5): 11 / sqrt(29 · 5)
        ("pearson", [1.0, 2, 3, 8], [1.0, 2, 3, 4], 11 / math.sqrt(29 * 5)),
        ("spearman", [1.0, 2, 3, 8], [1.0, 2, 3, 4], 1.0),
        ("pearson", [1.0, math.nan, 2.0], [3.0, math.nan, 4.0], 1.0),  # a row without a score
        ("spearman", [-90.0, 1.0, 2.0], [-100.0, 1.0, 2.0], 1.0),  # -100 is a score
    ],
)
def test_correlations_are_the_hand_values(name, scores, labels, wanted) -> None:
    values = metrics_of((name,), torch.tensor(scores)[:, None], torch.tensor(labels))

    assert values[name] == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("scores", "labels", "what"),
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "predictions"),
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], "labels"),
        ([1.0], [1.0], "predictions"),
    ],
    ids=["constant predictions", "constant labels", "one row"],
)
def test_an_undefined_correlation_is_0_and_said(name, scores, labels, what, caplog) -> None:
    with caplog.at_level(logging.INFO):
        values = metrics_of((name,), torch.tensor(scores), torch.tensor(labels))

    assert values[name] == 0.0
    assert f"{name} is undefined because all {what} are" in caplog.text


def test_nearly_constant_scores_raise_no_warning() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    scores[0] += 1e-15

    assert math.isfinite(metrics_of(("pearson",), scores, torch.tensor([1.0, 2, 3]))["pearson"])


@pytest.mark.parametrize(
    ("names", "outputs", "labels"),
    [
        (("matthews_correlation", "f1"), [0, 0, 0], [1, 0, 1]),
        (("f1",), [0, 0], [0, 0]),
    ],
    ids=["one predicted class", "no positive"],
)
def test_a_metric_of_classes_that_is_undefined_is_0_and_said(
    names, outputs, labels, caplog
) -> None:
    with caplog.at_level(logging.INFO):
        values = metrics_of(names, logits_of(outputs), torch.tensor(labels))

    assert [values[name] for name in names] == [0.0] * len(names)
    assert f"{names[0]} is undefined" in caplog.text


def test_no_labelled_row_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the 2 held-out rows has a label"):
        metrics_of(("accuracy",), logits_of([0, 1]), torch.tensor([-100, -100]))


def test_outputs_that_are_not_finite_are_an_error() -> None:
    outputs = logits_of([0, 1, 1])
    outputs[1, 0] = float("nan")

    with pytest.raises(TrainingError, match="not finite for 1 of 3 held-out rows"):
        metrics_of(("accuracy",), outputs, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(
    ("sums", "perplexity"), [([20.0, 3.0, 10.0], math.exp(2)), ([1e6, 3.0, 10.0], math.inf)]
)
def test_perplexity_is_the_exponential_of_nats_per_target(sums, perplexity) -> None:
    values = language_model_metrics(torch.tensor(sums, dtype=torch.float64))

    wanted = {"perplexity": perplexity, "loss": sums[0] / 10, "accuracy": 0.3}
    assert values == pytest.approx(wanted)


def test_a_text_without_targets_is_an_error() -> None:
    with pytest.raises(DataError, match="no target to score"):
        language_model_metrics(torch.zeros(3, dtype=torch.float64))


def test_the_headline_of_two_metrics_is_their_mean() -> None:
    metric = headline(("pearson", "spearman"))

    assert metric.name == "mean_pearson_spearman"
    assert metric.of({"pearson": 0.8, "spearman": 0.6, "loss": 9.0}) == pytest.approx(0.7)
    assert metric.higher_is_better
    assert headline(("matthews_correlation",)).name == "matthews_correlation"


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.6), ("perplexity", -0.6)])
def test_a_judge_says_that_more_is_better_whatever_the_metric(metric, score) -> None:
    judge = MetricJudge(headline((metric,)), "narrow")

    verdict = judge({"wide": {metric: 9.0}, "narrow": {metric: 0.6}}, 0)

    assert verdict == Verdict(score, "narrow")


def test_an_evaluation_is_read_as_it_was_recorded() -> None:
    scores = {"wide": {"accuracy": 0.5}, "narrow": {"accuracy": 0.25}}
    evaluation, endless = Evaluation(scores, "narrow"), Evaluation({WHOLE: {"x": math.inf}}, WHOLE)

    read, nothing = (
        Evaluation.read(json.loads(json_text(one.record()))) for one in (evaluation, endless)
    )

    assert read == evaluation
    assert evaluation.metrics == {"accuracy": 0.25}
    assert math.isnan(nothing.metrics["x"])


def test_the_log_shows_every_view_and_what_is_kept() -> None:
    evaluation = Evaluation({"wide": {"accuracy": 0.5}, "narrow": {"accuracy": 0.25}}, "narrow")
    whole = Evaluation({WHOLE: {"accuracy": 0.5}}, WHOLE)

    assert evaluation.scalars() == {
        "eval/wide/accuracy": 0.5,
        "eval/narrow/accuracy": 0.25,
        "eval/accuracy": 0.25,
    }
    assert whole.scalars() == {"eval/accuracy": 0.5}


ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))


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
@pytest.mark.parametrize(
    ("labels", "accuracy"), [([1, 0, 1, 1, 1], 0.8), ([1, IGNORE, 0, IGNORE, 1], 2 / 3)]
)
def test_metrics_are_of_the_labelled_rows_whatever_the_batch_size(batch_size, labels, accuracy):
    rows = Dataset.from_dict({"number": [1, 2, 3, 4, 5], "label": labels})
    one = scorer(("accuracy",), batch_size)

    found = one.score(odd_or_even, rows)

    assert found["accuracy"] == pytest.approx(accuracy)
    # The loss beside the metrics is that of a pass of its own.
    assert found["loss"] == pytest.approx(one.loss(odd_or_even, rows), abs=1e-12)


def test_a_classifier_is_scored_by_label_too():
    rows = Dataset.from_dict({"number": [1, 2, 3, 4, 5], "label": [1, 0, 0, IGNORE, 1]})

    even, odd = scorer(("accuracy",), 2).scored(odd_or_even, rows).by_class

    scores = {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3)}
    assert even == {"label": "even", **scores, "rows": 2}
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
