"""Weights of classes and smoothed labels: what a config may ask for and what stages get."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from datasets import Dataset
from loss_scene import term_of
from tiny_runs import config_tree, llama, review_task, write_config
from whole_run import finish, records

from megakd.config.file import load_config
from megakd.config.terms import source_of
from megakd.data.conversations import ChatColumns
from megakd.data.rows import RowKind
from megakd.data.splits import Splits
from megakd.errors import ConfigError
from megakd.losses.objective import with_class_weights
from megakd.training.lab import label_terms

KL = term_of("soft_target_kl")
KIND = RowKind("classification", ChatColumns(text=("text",), label="label"))


def resolved(class_weights: Any, labels: list[int]) -> Any:
    term = term_of("hard_cross_entropy", class_weights=class_weights)
    train, nothing = Dataset.from_dict({"label": labels}), cast("Any", None)
    splits = Splits(train, nothing, None, ("bad", "good", "rare"), ("accuracy",), "rows", KIND)
    return with_class_weights((KL, term), splits)


def test_weights_are_those_of_scikit_learn_or_come_in_the_order_of_the_data():
    kl, balanced = resolved("balanced", [0, 0, 0, 0, 1, 1, 1, 2, -100, -100])
    _, named = resolved({"rare": 3.0, "bad": 1.0, "good": 2.0}, [0, 1, 2])

    assert kl is KL
    # 1 on average over the labelled rows.
    assert balanced.class_weights == pytest.approx({"bad": 8 / 12, "good": 8 / 9, "rare": 8 / 3})
    assert [*named.class_weights.items()] == [("bad", 1.0), ("good", 2.0), ("rare", 3.0)]


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ({"bad": 1.0, "goood": 1.0}, [0], 'no label "goood"; did you mean "good"'),
        ({"bad": 1.0}, [0], "no weight for good, rare; set a weight for every label"),
        ("balanced", [0, 1, -100], "no training row has the label rare"),
    ],
)
def test_weights_that_do_not_fit_the_labels_are_refused(given, labels, message):
    with pytest.raises(ConfigError, match=message):
        resolved(given, labels)


def test_stages_without_generated_texts_learn_a_term_of_texts_on_the_data(tmp_path):
    term = {"loss": "hard_cross_entropy", "on": "rollouts"}
    texts = {"rollout": {"max_new_tokens": 4, "by": "teacher"}, "method": {"name": "single"}}
    task, teacher = {"type": "causal_lm", "dataset": "texts"}, {"teacher": {"model": llama(2)}}
    tree = config_tree(tmp_path / "out", task, objective=[term], **texts, **teacher)

    (alone,) = label_terms(load_config(write_config(tmp_path / "run.yaml", tree)))

    assert source_of(alone) is None


@pytest.fixture
def path(tmp_path):
    """The config of a run with class weights and smoothed labels."""
    term = {"loss": "hard_cross_entropy", "weight": 0.3, "class_weights": "balanced"}
    objective = [term | {"label_smoothing": 0.1}]
    tree = config_tree(tmp_path / "out", review_task(tmp_path), objective=objective)
    return write_config(tmp_path / "run.yaml", tree)


def test_a_baseline_learns_as_the_objective_says_and_a_teacher_is_never_smoothed(path):
    config = load_config(path)

    (alone,), (teacher,) = label_terms(config), label_terms(config, smoothed=False)

    assert alone == term_of("hard_cross_entropy", class_weights="balanced", label_smoothing=0.1)
    assert (teacher.class_weights, teacher.label_smoothing) == ("balanced", 0.0)  # type: ignore[union-attr]


def test_a_run_minimises_the_weighted_loss(tmp_path, path, one_rank):
    weights = "{positive: 3.0, negative: 1.0}"
    term = f"{{loss: hard_cross_entropy, class_weights: {weights}, label_smoothing: 0.2}}"

    finish(one_rank, path, f"objective=[{term}]")

    weighed = records(tmp_path / "out", "student")[0]["train/hard_cross_entropy"]
    # At the start every class has half the probability, ln 2 nats; the mean weight is 2.
    assert weighed == pytest.approx(2 * math.log(2), rel=0.2)
