"""The baseline of every classifier: the words of its texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import bert, write_config
from whole_run import read

from megakd.config.file import config_of
from megakd.data.splits import load_splits
from megakd.scoring.metrics import task_metrics
from megakd.scoring.words import score_words


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    task = {"type": "classification", "dataset": str(folder), "max_length": 32}
    models = {"student": {"model": bert(1)}, "method": {"name": "finetune"}}
    return {"output_dir": str(folder / "out"), "task": task, **models, **sections}


def write_texts(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    for name, rows in (("train", train), ("validation", test), ("test", test)):
        table = "".join(f"{text},{label}\n" for text, label in rows)
        (folder / f"{name}.csv").write_text(f"text,label\n{table}")


def words_of(folder: Path) -> dict[str, float]:
    config = config_of(tree(folder))
    splits = load_splits(config.task, seed=0, cache_dir=folder / "cache")
    metrics = task_metrics(config.eval, "classification", splits.metrics, splits.label_names)
    return dict(score_words(splits, metrics))


NAMED = [(f"the {word} number {n}", word) for n in range(8) for word in ("sun", "moon")]


def test_words_are_learned_from_labelled_rows_and_scored_on_held_out_ones(tmp_path):
    write_texts(tmp_path, [*NAMED, ("a text about the sun", "")], NAMED)

    scores = words_of(tmp_path)

    assert (scores["accuracy"], scores["f1_macro"]) == (1.0, 1.0)
    assert 0 < scores["loss"] < 0.7


def test_a_class_without_a_training_row_is_never_guessed(tmp_path):
    other = [*NAMED[:6], ("the star number 1", "star"), ("the star number 2", "star")]
    write_texts(tmp_path, [*NAMED, ("the star", "star")], other)

    assert words_of(tmp_path)["accuracy"] >= 6 / 8


def test_where_nothing_can_be_learned_from_words_there_is_no_baseline(tmp_path):
    write_texts(tmp_path, [("?!", "sun"), ("!", "moon")] * 4, NAMED[:2])

    assert words_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("baselines", "listed"), [(None, ["tfidf"]), ([], []), (["alone", "tfidf"], ["alone", "tfidf"])]
)
def test_a_classifiers_table_has_the_words_unless_other_baselines_are_listed(
    one_rank, tmp_path, baselines, listed
):
    write_texts(tmp_path, NAMED, NAMED)
    short = {"max_steps": 2, "per_device_train_batch_size": 4}
    run = tree(tmp_path, train=short, eval={"latency": False}, baselines=baselines)

    outcome = one_rank.train("--config", write_config(tmp_path / "run.yaml", run), code=0)

    report = read(tmp_path / "out")
    assert report["baselines"] == listed
    assert report["models"] == ["student", *listed]
    assert bool(re.search(r"^tfidf +- +- +- .*100\.0%", outcome.out, re.MULTILINE)) is (
        "tfidf" in listed
    )
