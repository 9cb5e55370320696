"""Metrics against hand values and scikit-learn, their run, and the baseline of words."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from loss_scene import Scene
from sklearn import metrics as theirs
from tiny_runs import config_tree, review_task, write_config
from torch import Tensor
from whole_run import finish, finish_in, read, records

from megakd.config.file import config_of
from megakd.config.run import EvalConfig
from megakd.config.task import METRICS, ONE_LABEL_METRICS
from megakd.config.terms import HardCrossEntropy
from megakd.data.batch import Pass
from megakd.data.splits import load_splits
from megakd.errors import ConfigError, DataError, TrainingError
from megakd.stage import MetricJudge, Verdict
from megakd.training.evaluation import HeldOutLosses, few
from megakd.training.metrics import (
    TaskMetrics,
    headline,
    language_model_metrics,
    loss_of_guessing,
    same_class,
    score_of,
    task_metrics,
)
from megakd.training.tfidf import score_words


def metrics_of(names: tuple[str, ...], outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """The metrics, without the loss that is always there."""
    values = TaskMetrics(names=names, main=headline(names)).values(outputs, labels)
    assert values.pop("loss") >= 0
    return values


@pytest.mark.parametrize(("task", "count"), [("causal_lm", 32), ("classification", 256)])
def test_a_loss_that_is_measured_often_takes_rows_from_all_over_the_split(task, count):
    numbers = few(Dataset.from_dict({"number": range(1000)}), task)["number"]

    assert len(numbers) == count
    assert numbers[0] == 0
    assert numbers[-1] >= 1000 - 1000 / count - 1
    assert len(few(Dataset.from_dict({"number": range(7)}), task)) == 7


def logits_of(classes: list[int], count: int = 2) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), count).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outputs", "labels", "wanted"),
    [
        # 2 true positives, 1 false positive, 1 false negative: F1 = 4 / 6.
        ([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], (3 / 5, 2 / 3, 1 / 6)),
        # (2·2 - 1·1) / sqrt(3·3·3·3) = 1/3
        ([1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1], (2 / 3, 2 / 3, 1 / 3)),
        ([1, 1, 0], [1, -100, 0], (1.0, 1.0, 1.0)),  # a row without a class
        ([1], [1], (1.0, 1.0, 0.0)),
    ],
)
def test_metrics_of_classes_are_the_hand_values(outputs, labels, wanted, dtype):
    names = ("accuracy", "f1", "matthews_correlation")

    result = metrics_of(names, logits_of(outputs).to(dtype), torch.tensor(labels))

    assert [result[name] for name in names] == pytest.approx(wanted)
    assert result["mean_accuracy_f1_matthews_correlation"] == pytest.approx(sum(wanted) / 3)


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
def test_correlations_are_the_hand_values(name, scores, labels, wanted):
    values = metrics_of((name,), torch.tensor(scores)[:, None], torch.tensor(labels))

    assert values[name] == pytest.approx(wanted)


ALIKE, RISING = torch.full((3,), 2.0), torch.arange(3.0)
ONE_CLASS = logits_of([0, 0, 0])


@pytest.mark.parametrize(
    ("names", "outputs", "labels", "what"),
    [
        (("pearson",), ALIKE, RISING, " because all predictions are"),
        (("spearman",), RISING, ALIKE, " because all labels are"),
        (("spearman",), RISING[:1], RISING[:1], " because all predictions are"),
        # One predicted class, and no positive label.
        (("matthews_correlation", "f1"), ONE_CLASS, torch.tensor([1, 0, 1]), ""),
        (("f1",), ONE_CLASS, torch.tensor([0, 0, 0]), ""),
    ],
)
def test_an_undefined_metric_is_0_and_said(names, outputs, labels, what, caplog):
    with caplog.at_level(logging.INFO):
        values = metrics_of(names, outputs, labels)

    assert [values[name] for name in names] == [0.0] * len(names)
    assert f"{names[0]} is undefined{what}" in caplog.text


def test_what_cannot_be_scored_is_an_error():
    with pytest.raises(DataError, match="none of the 2 held-out rows has a label"):
        metrics_of(("accuracy",), logits_of([0, 1]), torch.tensor([-100, -100]))
    with pytest.raises(TrainingError, match="not finite for 3 of 3 held-out rows"):
        metrics_of(("f1",), logits_of([0, 1, 1]) * math.nan, torch.tensor([0, 1, 1]))
    with pytest.raises(DataError, match="no target to score"):
        language_model_metrics(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(("nats", "perplexity"), [(20.0, math.exp(2)), (1e6, math.inf)])
def test_perplexity_is_the_exponential_of_nats_per_target(nats, perplexity):
    values = language_model_metrics(torch.tensor([nats, 3.0, 10.0], dtype=torch.float64))

    wanted = {"perplexity": perplexity, "loss": nats / 10, "accuracy": 0.3}
    assert values == pytest.approx(wanted)


@pytest.mark.parametrize(("metric", "score"), [("accuracy", 0.6), ("perplexity", -0.6)])
def test_a_judge_says_that_more_is_better_whatever_the_metric(metric, score):
    judge = MetricJudge(headline((metric,)), "narrow")
    assert judge({"wide": {metric: 9.0}, "narrow": {metric: 0.6}}, 0) == Verdict(score, "narrow")


LABELS = ("bad", "fine", "good")
TRUTH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, -100])
PREDICTED = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 2, 1])
OUTPUTS = logits_of(PREDICTED.tolist(), 3)
KNOWN = TRUTH != -100


def chosen(labels=LABELS, task="classification", official=("accuracy",), **keys):
    return task_metrics(EvalConfig(**keys), task, official, labels)


def test_every_metric_that_a_config_may_name_is_that_of_scikit_learn():
    names = tuple(name for name in METRICS["classification"] if name not in ONE_LABEL_METRICS)
    binary = TRUTH[KNOWN] == 2, PREDICTED[KNOWN] == 2

    values = chosen(metrics=names).values(OUTPUTS, TRUTH)
    guessed = logits_of((PREDICTED == 2).long().tolist(), 2)
    of_two = chosen(("other", "good"), metrics=ONE_LABEL_METRICS).values(
        guessed, torch.where(KNOWN, (TRUTH == 2).long(), -100)
    )
    values |= {name: of_two[name] for name in ONE_LABEL_METRICS}

    assert set(values) == set(METRICS["classification"])
    assert values["exact_match"] == values["accuracy"]  # of one label a row
    for name in {*values} - {"accuracy", "exact_match", "matthews_correlation", "loss"}:
        kind, _, average = name.partition("_")
        truth, predicted = (TRUTH[KNOWN], PREDICTED[KNOWN]) if average else binary
        of = getattr(theirs, f"{kind}_score")
        assert values[name] == pytest.approx(of(truth, predicted, average=average or "binary"))
    names = METRICS["regression"]
    values = chosen((), "regression", ("pearson",), metrics=names).values(
        torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 2.0])
    )
    assert set(values) == set(names)
    assert values["loss"] == pytest.approx(4 / 3)


def test_every_label_has_the_precision_and_recall_of_its_counts_also_if_the_label_is_absent():
    actual = chosen((*LABELS, "absent")).of_classes(logits_of(PREDICTED.tolist(), 4), TRUTH)

    by_class = actual["per_class"]

    of = theirs.precision_recall_fscore_support
    wanted = zip(*of(TRUTH[KNOWN], PREDICTED[KNOWN], labels=range(4), zero_division=0), strict=True)
    assert [row["label"] for row in by_class] == [*LABELS, "absent"]
    for row, values in zip(by_class, wanted, strict=True):
        assert [row[key] for key in ("precision", "recall", "f1", "rows")] == pytest.approx(values)
    counts = theirs.confusion_matrix(TRUTH[KNOWN], PREDICTED[KNOWN], labels=range(4))
    shown = {(one["label"], one["predicted"]): one["rows"] for one in actual["confusion"]}
    labels = [row["label"] for row in by_class]
    assert [[shown.get((a, b), 0) for b in labels] for a in labels] == counts.tolist()
    assert (shown["bad", "bad"], shown["bad", "fine"]) == (2, 1)


def test_very_many_labels_are_counted_without_a_table_of_their_pairs():
    names, predicted = tuple(map(str, range(100_000))), logits_of([70_000, 3], 100_000)

    actual = chosen(names).of_classes(predicted, torch.tensor([3, 3]))

    assert actual["confusion"] == [
        {"label": "3", "predicted": guess, "rows": 1} for guess in ("3", "70000")
    ]
    assert actual["per_class"][3]["recall"] == 0.5


def test_the_calibration_error_weighs_the_gap_of_each_of_15_bins_by_its_rows():
    # Probabilities of the predicted class: 0.6 is the end of its bin, 0.61 begins the next one.
    p = torch.tensor([0.6, 0.6, 0.61, 0.99, 0.99, 0.99], dtype=torch.float64)
    outputs = torch.stack([p, 1 - p], dim=1).log()
    truth = torch.tensor([0, 1, 1, 0, 0, 1])

    actual = chosen(("no", "yes")).of_classes(outputs, truth)

    gaps = (2 * abs(0.5 - 0.6), abs(0 - 0.61), 3 * abs(2 / 3 - 0.99))
    assert actual["calibration_error"] == pytest.approx(sum(gaps) / 6)
    assert chosen((), "regression", ("pearson",)).of_classes(outputs[:, :1], truth.double()) == {}


def test_of_tied_classes_a_row_is_right_as_often_as_a_guess():
    outputs = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 1.0], [1.0, 3.0, 1.0], [1.0, 1.0, 0.0]])
    truth = torch.tensor([0, 1, 1, 2])
    metrics = chosen()

    shares = [1 / 3, 1 / 2, 1.0, 0.0]
    assert metrics.values(outputs, truth)["accuracy"] == pytest.approx(sum(shares) / 4)
    collapsed = metrics.of_classes(torch.zeros(4, 3), truth)
    assert collapsed["calibration_error"] == pytest.approx(0.0)
    numbers = [one["rows"] for one in collapsed["confusion"]]
    assert numbers == pytest.approx([n / 3 for n in (1, 1, 1, 2, 2, 2, 1, 1, 1)], abs=1e-3)
    assert [one["recall"] for one in collapsed["per_class"][:3]] == pytest.approx([1 / 3] * 3)
    assert [one["rows"] for one in collapsed["per_class"][:3]] == [1, 2, 1]
    binary = chosen(("no", "yes"), metrics=("f1", "matthews_correlation", "f1_macro"))
    of_two = binary.values(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    wanted = {"accuracy": 0.5, "f1": 0.5, "f1_macro": 0.5, "matthews_correlation": 0.0}
    assert {name: of_two[name] for name in wanted} == pytest.approx(wanted)
    rows = metrics.answers(outputs, truth)
    other = metrics.answers(torch.tensor([[0.0, 0, 0], [2, 1, 2], [1, 1, 3], [2, 1, 0]]), truth)
    assert [*map(same_class, rows, other)] == pytest.approx([1 / 3, 1 / 4, 0.0, 1 / 2])


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        ([0, 0, 0, 1, -100], (math.log(4) + 3 * math.log(4 / 3)) / 4),
        ([2, 2], 0.0),
        ([1.0, 3.0, math.nan], 1.0),  # the variance
        ([[1.0, 0.0], [0.0, 0.0], [math.nan, math.nan]], math.log(2) / 2),
    ],
)
def test_the_loss_of_guessing_is_that_of_the_best_constant_answer(labels, loss):
    assert loss_of_guessing(Dataset.from_dict({"label": labels}), 0) == pytest.approx(loss)
    assert loss_of_guessing(Dataset.from_dict({"text": labels}), 9) == math.log(9)


def test_means_over_labels_are_those_of_scikit_learn():
    """Of classes an absent one is left out; of sets it counts as 0."""
    truth, guessed = np.array([0.0, 0.0, 1.0, 3.0]), np.array([0.0, 1.0, 1.0, 0.0])
    by_class = 2 / 4, 2 / 3, 0.0  # without class 2, with the missed class 3
    assert score_of("f1_macro", guessed, truth) == pytest.approx(sum(by_class) / 3)
    sets, found = np.eye(4)[[0, 0, 1, 3]], np.eye(4)[[0, 1, 1, 0]] == 1
    assert score_of("f1_macro", found, sets) == pytest.approx(sum(by_class) / 4)
    for name in ("f1_macro", "precision_macro", "recall_macro", "f1_weighted"):
        kind, _, average = name.partition("_")
        of = getattr(theirs, f"{kind}_score")
        for a, b in ((truth, guessed), (sets, found)):
            wanted = of(a, b, average=average, zero_division=0)
            assert score_of(name, b, a) == pytest.approx(wanted)


def test_the_official_metrics_rank_evaluations_unless_one_is_chosen():
    both = ("accuracy", "f1")

    assert chosen(("a", "b"), official=both).main.name == "mean_accuracy_f1"
    result = chosen(("a", "b"), official=both, metric="loss")
    assert (result.main.name, result.main.higher_is_better) == ("loss", False)
    assert result.names == (*both, "loss", "f1_macro")


def test_a_metric_of_one_label_is_refused_for_more_than_two():
    with pytest.raises(ConfigError, match=r"f1 is about the second of two labels, .* 3; use f1_ma"):
        chosen(metric="f1")


def test_a_run_keeps_the_best_evaluation_by_the_chosen_metric_and_shows_the_scores_of_every_label(
    one_rank, tmp_path
):
    named = {"metric": "f1", "metrics": ["f1_macro"]}

    outcome = finish_in(one_rank, tmp_path, review_task(tmp_path), eval={"eval_steps": 2, **named})

    report = read(tmp_path / "out")
    assert report["metric_name"] == "f1"
    assert {"accuracy", "f1", "f1_macro", "loss"} == set(report["metrics"])
    best = max(r["eval/f1"] for r in records(tmp_path / "out", "student") if "eval/f1" in r)
    assert report["stages"][0]["f1"] == best == report["student.f1"]
    negative, positive = report["student.per_class"]
    assert (negative["label"], positive["label"]) == ("negative", "positive")
    assert positive["f1"] == best
    assert negative["rows"] + positive["rows"] == report["rows"] == 26
    share = report["student.accuracy"]
    error = report["student.accuracy_standard_error"]
    assert error == pytest.approx((share * (1 - share) / 26) ** 0.5)
    assert [w for w in report["warnings"] if w.startswith("only 26 rows were scored")]
    assert f"{share:.1%} ±{error:.1%}" in outcome.out
    assert "\nScores by label\nlabel     precision  recall" in outcome.out
    page = one_rank.page(tmp_path / "out")
    assert "Scores by label" in page
    assert ">Confusions<" in page
    assert f"{share:.1%} ±{error:.1%}" in page


TERMS = tuple(HardCrossEntropy(loss="hard_cross_entropy", on=on) for on in (None, "rollouts"))


def losses(batches: list[Any], value: float) -> Any:
    """Losses of a model that has the same value at every target."""
    objective = Scene("causal_lm", *TERMS).objective
    bundle: Any = SimpleNamespace(objective=objective, counters=objective.counters)

    def measure(batch: Any, knowledge: object, plan: object) -> Any:
        counted = {unit: count(batch) for unit, count in objective.counters.items()}
        parts = {n: value * counted[u] for n, u in objective.units.items()}
        return SimpleNamespace(parts=parts, predictions=None)

    student = SimpleNamespace(measure=measure)
    trainer: Any = SimpleNamespace(student=student, ask_teachers=lambda plan, batch: {})
    result = HeldOutLosses(trainer, bundle, (Pass(),))
    for batch in batches:
        result.add(batch)
    return result.means()


def test_a_term_on_rollouts_has_no_value_on_texts_of_the_data():
    batch = Scene("causal_lm", *TERMS).batch()

    both = losses([batch, batch._replace(is_rollout=True)], 0.5)
    data = losses([batch], 0.5)

    assert both == pytest.approx({"hard_cross_entropy": 0.5, "hard_cross_entropy_on_rollouts": 0.5})
    assert data == pytest.approx({"hard_cross_entropy": 0.5})


# The baseline of every classifier: the words of its texts.


def words_tree(folder: Path, **sections: Any) -> dict[str, Any]:
    task = {"type": "classification", "dataset": str(folder), "max_length": 32}
    return config_tree(folder / "out", task, **sections)


def write_texts(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]):
    for name, rows in (("train", train), ("validation", test), ("test", test)):
        table = "".join(f"{text},{label}\n" for text, label in rows)
        (folder / f"{name}.csv").write_text(f"text,label\n{table}")


def words_of(folder: Path) -> dict[str, float]:
    config = config_of(words_tree(folder))
    splits = load_splits(config.task, seed=0, cache_dir=folder / "cache")
    metrics = task_metrics(config.eval, "classification", splits.metrics, splits.label_names)
    return dict(score_words(splits, metrics))


NAMED = [(f"the {word} number {n}", word) for n in range(8) for word in ("sun", "moon")]


def test_words_are_learned_from_labelled_rows_and_a_class_without_one_is_never_guessed(tmp_path):
    write_texts(tmp_path, [*NAMED, ("a text about the sun", "")], NAMED)

    scores = words_of(tmp_path)

    assert (scores["accuracy"], scores["f1_macro"]) == (1.0, 1.0)
    assert 0 < scores["loss"] < 0.7
    other = [*NAMED[:6], ("the star number 1", "star"), ("the star number 2", "star")]
    write_texts(tmp_path, [*NAMED, ("the star", "star")], other)
    assert words_of(tmp_path)["accuracy"] >= 6 / 8
    write_texts(tmp_path, [("?!", "sun"), ("!", "moon")] * 4, NAMED[:2])  # there are no words
    assert words_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("baselines", "listed"), [({}, ["tfidf"]), ({"baselines": ["alone"]}, ["alone"])]
)
def test_a_classifiers_table_has_the_words_unless_other_baselines_are_listed(
    one_rank, tmp_path, baselines, listed
):
    write_texts(tmp_path, NAMED, NAMED)
    run = words_tree(tmp_path, train={"max_steps": 2}, **baselines)

    outcome = finish(one_rank, write_config(tmp_path / "run.yaml", run))

    report = read(tmp_path / "out")
    assert report["baselines"] == listed
    assert report["models"] == ["student", *listed]
    shown = re.search(r"^tfidf +- +- +- .*100\.0%", outcome.out, re.MULTILINE)
    assert (shown is not None) is ("tfidf" in listed)
