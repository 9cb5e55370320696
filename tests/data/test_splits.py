"""Splits: what is held out, which labels are kept, and data sets of the Hub."""

from __future__ import annotations

import logging
import math

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data import splits
from megakd.data.choosing import at_most, cut_validation, keep_labels
from megakd.errors import DataError


def rows_of(texts: list[str], labels: list[int] | None = None) -> Dataset:
    labels = labels if labels is not None else [n % 2 for n in range(len(texts))]
    return Dataset.from_dict({"text": texts, "label": labels})


def numbered(count: int) -> list[tuple[str, int]]:
    return [(f"text {n}", n % 2) for n in range(count)]


texts_with_repeats = st.lists(st.sampled_from([f"text {n}" for n in range(30)]), min_size=2)


@settings(max_examples=20)
@given(texts_with_repeats.filter(lambda texts: len(set(texts)) > 1))
def test_no_text_is_both_trained_on_and_held_out_whatever_the_order_of_the_rows(texts):
    train, validation = cut_validation(rows_of(texts), name="x")

    assert len(validation) >= 1
    assert len(train) >= 1
    assert len(train) + len(validation) == len(texts)
    assert not set(train["text"]) & set(validation["text"])
    _, of_sorted = cut_validation(rows_of(sorted(texts)), name="x")
    assert set(of_sorted["text"]) == set(validation["text"])


def test_only_labelled_rows_are_held_out_and_their_texts_leave_training():
    texts = [f"text {n % 200}" for n in range(400)]
    labels = [-100] * 200 + [1] * 200

    train, validation = cut_validation(rows_of(texts, labels), name="x")

    assert set(validation["label"]) == {1}
    assert not set(train["text"]) & set(validation["text"])
    with pytest.raises(DataError, match=r"x has no validation split, and megakd cannot cut one"):
        cut_validation(rows_of(["same", "same"]), name="x")


def test_a_text_of_many_rows_is_trained_on_whatever_its_hash():
    for often in range(40):
        texts = [f"text {often}"] * 60 + [f"text {n}" for n in range(40)]

        _, validation = cut_validation(rows_of(texts), name="x")

        assert 1 <= len(validation) <= 10


@settings(max_examples=20)
@given(texts_with_repeats, st.integers(0, 3), st.data())
def test_exactly_as_many_labels_are_kept_as_asked_for(texts, seed, data):
    count = data.draw(st.integers(1, len(texts)))

    kept = keep_labels(rows_of(texts), count, seed=seed, name="x")

    labels = kept["label"][:]
    assert sum(label != -100 for label in labels) == count
    assert all(label in (-100, n % 2) for n, label in enumerate(labels))
    assert kept["text"][:] == texts


def test_more_labels_contain_the_fewer_of_the_same_seed():
    rows = rows_of([f"text {n}" for n in range(200)])

    few = np.array(keep_labels(rows, 20, seed=1, name="x")["label"][:]) >= 0
    more = np.array(keep_labels(rows, 50, seed=1, name="x")["label"][:]) >= 0
    other = np.array(keep_labels(rows, 50, seed=2, name="x")["label"][:]) >= 0

    assert (more | ~few).all()
    assert (other != more).any()


def test_scores_that_are_not_kept_become_nan(load, tmp_path):
    (tmp_path / "train.csv").write_text("text,score\na,1.5\nb,2.5\nc,\n")
    (tmp_path / "dev.csv").write_text("text,score\na,1.5\n")

    splits = load(tmp_path, type="regression", labelled_examples=1)

    assert sum(not math.isnan(label) for label in splits.train["label"]) == 1
    assert splits.train.features["label"] == Value("float32")
    assert splits.train.column_names == ["text", "label"]


def test_held_out_rows_are_cut_to_the_same_few_in_their_old_order(load, write_rows, tmp_path):
    for name, count in (("train", 30), ("dev", 20), ("test", 20)):
        write_rows(tmp_path / f"{name}.csv", numbered(count))

    splits, other_seed = (load(tmp_path, max_eval_examples=7, seed=seed) for seed in (1, 2))

    assert [len(part) for part in splits[:3]] == [30, 7, 7]
    numbers = [int(text.split()[1]) for text in splits.validation["text"]]
    assert numbers == sorted(numbers)
    assert other_seed.validation["text"][:] == splits.validation["text"][:]


def test_held_out_rows_with_a_label_are_chosen_before_those_without():
    labels = [n % 2 if n % 50 == 0 else -100 for n in range(1000)]
    rows = rows_of([f"text {n}" for n in range(1000)], labels)

    chosen, fewer = at_most(rows, 50), at_most(rows, 7)

    assert sum(label != -100 for label in chosen["label"]) == 20
    assert (len(chosen), len(fewer)) == (50, 7)
    assert all(label != -100 for label in fewer["label"])
    assert at_most(rows, 1001) is rows


def test_the_content_hash_tells_choices_apart(load, write_rows, tmp_path):
    path = write_rows(tmp_path / "x.csv", numbered(100))
    choices = ({}, {"labelled_examples": 10}, {"labelled_examples": 10, "seed": 2})

    hashes = {load(path, **keys).content_hash for keys in (*choices, {"max_eval_examples": 2})}

    assert len(hashes) == 4
    assert load(path, seed=2).content_hash in hashes


def test_a_cache_that_cannot_be_written_is_said_with_its_folder(load, write_rows, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(
        DataError, match=r"cannot write prepared data to .*/cache/rows: .* make the folder"
    ):
        load(write_rows(tmp_path / "x.csv", numbered(4)))


def test_a_hub_data_set_is_read_with_its_class_names(load, hub):
    kinds = {"label": ClassLabel(names=["neg", "pos"]), "tokens": datasets.List(Value("int64"))}
    features = Features({"text": Value("string"), **kinds})
    for split in ("train", "validation", "test", "unsupervised"):
        labels = [-1, -1, -1] if split == "test" else [1, -1, 0]
        columns = {"text": ["a", "b", "c"], "label": labels, "tokens": [[1], [2], [3]]}
        hub[split] = Dataset.from_dict(columns, features=features)

    splits = load("someone/somedata")

    assert splits.label_names == ("neg", "pos")
    assert splits.train["label"][:] == [1, -100, 0]
    assert splits.test is None
    assert len(splits.content_hash) == 64


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["everything"], r"someone/somedata has no split named 'train'"),
        (["train", "validation", "dev"], r"somedata: 'validation' and 'dev' are names of the same"),
    ],
    ids=["no training split", "two names"],
)
def test_splits_of_the_hub_that_cannot_be_used_are_refused(load, hub, names, message):
    hub.update(dict.fromkeys(names, rows_of(["a", "b"])))

    with pytest.raises(DataError, match=message):
        load("someone/somedata")


def test_a_hub_data_set_that_is_a_script_is_refused_with_other_ways(load, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Dataset scripts are no longer supported, but found somedata.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)

    message = r"somedata is a script, .* found somedata\.py\); use .* parquet .* local files"
    with pytest.raises(DataError, match=message):
        load("someone/somedata")


def test_a_cut_validation_split_is_scored_up_to_a_limit_that_the_log_names(
    load, write_rows, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, logger="megakd")
    monkeypatch.setattr(splits, "MOST_CUT_ROWS", 3)
    path = write_rows(tmp_path / "rows.csv", numbered(400))

    limited, whole = load(path), load(path, max_eval_examples=1000)

    assert len(limited.validation) == 3 < len(whole.validation)
    assert len(limited.train) == len(whole.train)
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.csv", numbered(20))
    assert len(load(tmp_path).validation) == 20  # a split of the data has no limit
    assert caplog.messages == [
        f"validation: 3 of the {len(whole.validation)} rows that are held out are scored; "
        "task.max_eval_examples sets another number"
    ]
