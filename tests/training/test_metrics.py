"""Metrics of a run, and their values against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from sklearn import metrics as theirs
from tiny_runs import config_tree, write_config, write_reviews
from whole_run import finish, read, records

from megakd.config.run import EvalConfig
from megakd.contract.tasks import METRICS
from megakd.errors import ConfigError
from megakd.scoring.metrics import task_metrics

LABELS = ("bad", "fine", "good")
TRUTH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, -100])
SAID = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 2, 1])
OUTPUTS = torch.nn.functional.one_hot(SAID, 3).float()
KNOWN = TRUTH != -100


def chosen(labels=LABELS, task="classification", official=("accuracy",), **keys):
    return task_metrics(EvalConfig(**keys), task, official, labels)


@pytest.mark.parametrize("name", ["f1_macro", "precision_macro", "recall_macro", "f1_weighted"])
def test_a_mean_over_labels_is_that_of_scikit_learn(name):
    kind, average = name.split("_")

    values = chosen(metric=name).of(OUTPUTS, TRUTH)

    of = getattr(theirs, f"{kind}_score")
    assert values[name] == pytest.approx(of(TRUTH[KNOWN], SAID[KNOWN], average=average))
    assert values["accuracy"] == pytest.approx(6 / 9)  # the official one stays


def test_every_metric_that_a_config_may_name_can_be_computed():
    names = METRICS["classification"]
    assert set(chosen(metrics=names, positive_label="bad").of(OUTPUTS, TRUTH)) == set(names)
    names = METRICS["regression"]
    values = chosen((), "regression", ("pearson",), metrics=names).of(
        torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 2.0])
    )
    assert set(values) == set(names)
    assert values["loss"] == pytest.approx(4 / 3)


def test_f1_precision_and_recall_are_about_the_label_that_is_named():
    names, outputs, truth = ("precision", "recall", "f1"), torch.eye(2)[[0, 0, 1]], [0, 1, 1]

    values = chosen(metrics=names, positive_label="good").of(OUTPUTS, TRUTH)

    # Three of four are found, and three of four that are said are right.
    assert [values[name] for name in names] == [0.75, 0.75, 0.75]
    for keys, recall in (({}, 0.5), ({"positive_label": "no"}, 1.0)):  # the second of two labels
        two = chosen(("no", "yes"), metric="recall", **keys).of(outputs, torch.tensor(truth))
        assert two["recall"] == recall


def test_every_label_has_the_precision_and_recall_of_its_counts_also_if_the_label_is_absent():
    actual = chosen((*LABELS, "absent")).of_classes(
        torch.nn.functional.one_hot(SAID, 4).float(), TRUTH
    )

    by_class = actual["per_class"]

    of = theirs.precision_recall_fscore_support
    wanted = zip(*of(TRUTH[KNOWN], SAID[KNOWN], labels=range(4), zero_division=0), strict=True)
    assert [row["label"] for row in by_class] == [*LABELS, "absent"]
    for row, values in zip(by_class, wanted, strict=True):
        assert [row[key] for key in ("precision", "recall", "f1", "rows")] == pytest.approx(values)
    counts = theirs.confusion_matrix(TRUTH[KNOWN], SAID[KNOWN], labels=range(4))
    shown = actual["confusion"]
    assert [[shown[a].get(b, 0) for b in shown] for a in shown] == counts.tolist()
    assert shown["bad"] == {"bad": 2, "fine": 1}


def test_very_many_labels_are_counted_without_a_table_of_their_pairs():
    predicted = torch.nn.functional.one_hot(torch.tensor([70_000, 3]), 100_000).float()

    actual = chosen(tuple(map(str, range(100_000)))).of_classes(predicted, torch.tensor([3, 3]))

    assert actual["confusion"]["3"] == {"3": 1, "70000": 1}
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


def test_the_official_metrics_rank_evaluations_unless_one_is_chosen():
    both = ("accuracy", "f1")

    assert chosen(("a", "b"), official=both).main.name == "mean_accuracy_f1"
    result = chosen(("a", "b"), official=both, metric="loss")
    assert (result.main.name, result.main.higher_is_better) == ("loss", False)
    assert result.names == (*both, "loss")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": "f1"}, "f1 needs one of the 3 labels; set the key to one of bad, fine, good, "),
        (
            {"metrics": ("recall",)},
            "eval.positive_label: missing, and recall needs one .* use recall_macro",
        ),
        ({"metric": "f1", "positive_label": "goood"}, 'no label "goood"; did you mean "good"'),
        ({"positive_label": "good"}, "no metric of this run uses a positive label; remove the key"),
    ],
)
def test_a_positive_label_that_is_missing_wrong_or_idle_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        chosen(**keys)


@pytest.fixture(scope="module")
def out(one_rank, tmp_path_factory):
    """A run that is ranked by the F1 of one label."""
    folder = tmp_path_factory.mktemp("metrics")
    task = {"type": "classification", "dataset": str(write_reviews(folder / "reviews"))}
    named = {"metric": "f1", "metrics": ["f1_macro"], "positive_label": "negative"}
    tree = config_tree(folder / "out", task, eval={"eval_steps": 2, **named})
    outcome = finish(one_rank, write_config(folder / "run.yaml", tree))
    (folder / "said").write_text(outcome.out)
    return folder / "out"


def test_a_run_keeps_the_best_evaluation_by_the_chosen_metric_and_reports_it(out):
    report = read(out)
    evaluations = [r for r in records(out, "student") if "eval/f1" in r]

    assert report["metric_name"] == "f1"
    assert {"accuracy", "f1", "f1_macro", "loss"} == set(report["student"]["metrics"])
    best = max(record["eval/f1"] for record in evaluations)
    assert report["stages"][0]["metrics"]["f1"] == best == report["student"]["metrics"]["f1"]


def test_the_report_has_the_scores_of_every_label(out):
    negative, positive = read(out)["student"]["per_class"]

    assert (negative["label"], positive["label"]) == ("negative", "positive")
    assert negative["f1"] == read(out)["student"]["metrics"]["f1"]
    assert negative["rows"] + positive["rows"] == 26
    answer, page = (out.parent / "said").read_text(), (out / "report.html").read_text()
    assert "student, by label  precision  recall" in answer
    assert "student, by label  as negative  as positive" in answer
    assert "Scores by label" in page
    assert ">Confusions<" in page
