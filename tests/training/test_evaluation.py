"""Metrics against hand values, and what degenerate inputs give."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import Tensor

from megakd.contract.metric import WHOLE, MetricJudge
from megakd.contract.stage import Verdict
from megakd.errors import DataError, TrainingError
from megakd.scoring.metrics import TaskMetrics
from megakd.scoring.scores import Evaluation, headline, language_model_metrics
from megakd.storage.atomic import json_text


def metrics_of(names: tuple[str, ...], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics, without the loss that is always there."""
    values = TaskMetrics(names=names, main=headline(names)).of(outputs, labels)
    assert values.pop("loss") >= 0
    return values


def logits_of(classes: list[int], count: int = 2) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


def test_accuracy_and_f1_are_the_hand_values_and_the_mean_is_added() -> None:
    predicted = logits_of([1, 1, 0, 0, 1])
    labels = torch.tensor([1, 0, 1, 0, 1])

    values = metrics_of(("accuracy", "f1"), predicted, labels)

    # 2 true positives, 1 false positive, 1 false negative: F1 = 4 / 6.
    assert values == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "mean_accuracy_f1": (3 / 5 + 2 / 3) / 2}
    )


def test_matthews_correlation_is_the_hand_value() -> None:
    values = metrics_of(
        ("matthews_correlation",), logits_of([1, 1, 0, 0, 1, 0]), torch.tensor([1, 1, 0, 0, 0, 1])
    )

    # (2·2 - 1·1) / sqrt(3·3·3·3) = 1/3
    assert values == {"matthews_correlation": pytest.approx(1 / 3)}


def test_correlations_of_scores_are_the_hand_values() -> None:
    scores = torch.tensor([[1.0], [2.0], [3.0], [8.0]])

    values = metrics_of(("pearson", "spearman"), scores, torch.tensor([1.0, 2.0, 3.0, 4.0]))

    # deviations (-2.5, -1.5, -0.5, 4.5) and (-1.5, -0.5, 0.5, 1.5): 11 / sqrt(29 · 5)
    assert values["pearson"] == pytest.approx(11 / math.sqrt(29 * 5))
    assert values["spearman"] == pytest.approx(1.0)


def test_rows_without_a_class_are_left_out() -> None:
    labels = torch.tensor([1, -100, 0])

    assert metrics_of(("accuracy",), logits_of([1, 1, 0]), labels) == {"accuracy": 1.0}


def test_rows_without_a_score_are_left_out_even_if_their_output_is_not_finite() -> None:
    scores = torch.tensor([1.0, float("nan"), 2.0])
    labels = torch.tensor([3.0, float("nan"), 4.0])

    assert metrics_of(("pearson",), scores, labels)["pearson"] == pytest.approx(1.0)


def test_a_score_of_minus_100_is_a_score() -> None:
    scores = torch.tensor([-90.0, 1.0, 2.0])
    labels = torch.tensor([-100.0, 1.0, 2.0])

    assert metrics_of(("spearman",), scores, labels)["spearman"] == pytest.approx(1.0)


def test_half_precision_outputs_are_scored() -> None:
    outputs = logits_of([1, 0]).bfloat16()

    assert metrics_of(("accuracy",), outputs, torch.tensor([1, 0])) == {"accuracy": 1.0}


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


def test_one_predicted_class_gives_0_for_matthews_and_f1(caplog) -> None:
    with caplog.at_level(logging.INFO):
        values = metrics_of(
            ("matthews_correlation", "f1"), logits_of([0, 0, 0]), torch.tensor([1, 0, 1])
        )

    assert values["matthews_correlation"] == 0.0
    assert values["f1"] == 0.0
    assert "matthews_correlation is undefined" in caplog.text


def test_an_f1_without_any_positive_is_0_and_said(caplog) -> None:
    with caplog.at_level(logging.INFO):
        values = metrics_of(("f1",), logits_of([0, 0]), torch.tensor([0, 0]))

    assert values == {"f1": 0.0}
    assert "f1 is undefined" in caplog.text


def test_one_row_of_one_class_has_an_f1() -> None:
    assert metrics_of(("f1",), logits_of([1]), torch.tensor([1])) == {"f1": 1.0}


def test_no_labelled_row_is_an_error() -> None:
    with pytest.raises(DataError, match="none of the 2 held-out rows has a label"):
        metrics_of(("accuracy",), logits_of([0, 1]), torch.tensor([-100, -100]))


def test_outputs_that_are_not_finite_are_an_error() -> None:
    outputs = logits_of([0, 1, 1])
    outputs[1, 0] = float("nan")

    with pytest.raises(TrainingError, match="not finite for 1 of 3 held-out rows"):
        metrics_of(("accuracy",), outputs, torch.tensor([0, 1, 1]))


def test_perplexity_is_the_exponential_of_nats_per_target() -> None:
    values = language_model_metrics(torch.tensor([20.0, 3.0, 10.0], dtype=torch.float64))

    assert values == pytest.approx({"perplexity": math.exp(2), "loss": 2.0, "accuracy": 0.3})


def test_a_hopeless_perplexity_does_not_overflow() -> None:
    values = language_model_metrics(torch.tensor([1e6, 0.0, 10.0], dtype=torch.float64))

    assert values["perplexity"] == math.inf


def test_a_text_without_targets_is_an_error() -> None:
    with pytest.raises(DataError, match="no target to score"):
        language_model_metrics(torch.zeros(3, dtype=torch.float64))


def test_the_headline_of_two_metrics_is_their_mean() -> None:
    metric = headline(("pearson", "spearman"))

    assert metric.name == "mean_pearson_spearman"
    assert metric.of({"pearson": 0.8, "spearman": 0.6, "loss": 9.0}) == pytest.approx(0.7)
    assert metric.higher_is_better


def test_the_headline_of_one_metric_is_that_metric() -> None:
    assert headline(("matthews_correlation",)).name == "matthews_correlation"


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.6), ("perplexity", -0.6)])
def test_a_judge_says_that_more_is_better_whatever_the_metric(metric, score) -> None:
    judge = MetricJudge(headline((metric,)), "narrow")

    verdict = judge({"wide": {metric: 9.0}, "narrow": {metric: 0.6}}, 0)

    assert verdict == Verdict(score, "narrow")


def test_an_evaluation_is_read_as_it_was_recorded() -> None:
    scores = {"wide": {"accuracy": 0.5}, "narrow": {"accuracy": 0.25}}
    evaluation = Evaluation(scores, "narrow")

    assert Evaluation.read(json.loads(json_text(evaluation.record()))) == evaluation
    assert evaluation.metrics == {"accuracy": 0.25}


def test_a_score_that_is_not_finite_is_read_as_none() -> None:
    evaluation = Evaluation({WHOLE: {"perplexity": math.inf}}, WHOLE)

    read = Evaluation.read(json.loads(json_text(evaluation.record())))

    assert math.isnan(read.metrics["perplexity"])


def test_the_log_shows_every_view_and_what_is_kept() -> None:
    evaluation = Evaluation({"wide": {"accuracy": 0.5}, "narrow": {"accuracy": 0.25}}, "narrow")
    whole = Evaluation({WHOLE: {"accuracy": 0.5}}, WHOLE)

    assert evaluation.scalars() == {
        "eval/wide/accuracy": 0.5,
        "eval/narrow/accuracy": 0.25,
        "eval/accuracy": 0.25,
    }
    assert whole.scalars() == {"eval/accuracy": 0.5}
