from __future__ import annotations

import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.data import splits
from megakd.data.arrow import cached_folder
from megakd.data.choosing import at_most, cut_validation, keep_labels
from megakd.data.splits import Splits, load_splits
from megakd.errors import ConfigError, DataError


def rows_of(texts: list[str], labels: list[int] | None = None) -> Dataset:
    labels = labels if labels is not None else [n % 2 for n in range(len(texts))]
    return Dataset.from_dict({"text": texts, "label": labels})


def write_csv(path: Path, count: int) -> Path:
    lines = ["text,label", *(f"text {n},{n % 2}" for n in range(count))]
    path.write_text("\n".join(lines))
    return path


def load(path: Path | str, cache_dir: Path, *, seed: int = 1, **keys) -> Splits:
    task = TaskConfig(**{"type": "classification", "dataset": str(path), **keys})
    return load_splits(task, seed=seed, cache_dir=cache_dir / "cache")


texts_with_repeats = st.lists(st.sampled_from([f"text {n}" for n in range(30)]), min_size=2)


@settings(max_examples=40, deadline=None)
@given(texts_with_repeats.filter(lambda texts: len(set(texts)) > 1))
def test_no_text_is_both_trained_on_and_held_out(texts: list[str]):
    train, validation = cut_validation(rows_of(texts), name="x")

    assert len(validation) >= 1
    assert len(train) >= 1
    assert len(train) + len(validation) == len(texts)
    assert not set(train["text"]) & set(validation["text"])


@settings(max_examples=20, deadline=None)
@given(st.permutations([f"text {n}" for n in range(40)]))
def test_the_cut_does_not_depend_on_the_order_of_the_rows(texts: list[str]):
    _, validation = cut_validation(rows_of(texts), name="x")
    _, expected = cut_validation(rows_of(sorted(texts)), name="x")

    assert set(validation["text"]) == set(expected["text"])


def test_about_five_percent_are_cut_off():
    train, validation = cut_validation(rows_of([f"text {n}" for n in range(4000)]), name="x")

    assert 150 < len(validation) < 250
    assert len(train) + len(validation) == 4000


def test_only_labelled_rows_are_held_out_and_their_texts_leave_training():
    texts = [f"text {n % 200}" for n in range(400)]
    labels = [-100] * 200 + [1] * 200

    train, validation = cut_validation(rows_of(texts, labels), name="x")

    assert set(validation["label"]) == {1}
    assert not set(train["text"]) & set(validation["text"])


@pytest.mark.parametrize("texts", [["same"], ["same", "same"]], ids=["one row", "one text"])
def test_nothing_can_be_cut_from_one_text(texts: list[str]):
    with pytest.raises(
        DataError, match=r"x has no validation split, and megakd cannot cut one from"
    ):
        cut_validation(rows_of(texts), name="x")


@settings(max_examples=40, deadline=None)
@given(texts_with_repeats, st.integers(0, 3), st.data())
def test_exactly_as_many_labels_are_kept_as_asked_for(texts: list[str], seed: int, data):
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


def test_kept_labels_have_the_natural_class_sizes():
    rows = rows_of([f"text {n}" for n in range(4000)], [int(n % 10 == 0) for n in range(4000)])

    labels = np.array(keep_labels(rows, 1000, seed=1, name="x")["label"][:])

    assert 70 < (labels == 1).sum() < 130


def test_scores_that_are_not_kept_become_nan(tmp_path: Path):
    (tmp_path / "train.csv").write_text("text,score\na,1.5\nb,2.5\nc,\n")
    (tmp_path / "dev.csv").write_text("text,score\na,1.5\n")

    splits = load(tmp_path, tmp_path, type="regression", labelled_examples=1)

    labels = splits.train["label"][:]
    assert sum(not math.isnan(label) for label in labels) == 1
    assert splits.train.features["label"] == Value("float32")
    assert splits.train.column_names == ["text", "label"]


def test_more_labels_than_rows_are_refused_with_both_numbers(tmp_path: Path):
    write_csv(tmp_path / "train.csv", 10)
    write_csv(tmp_path / "dev.csv", 4)

    with pytest.raises(DataError, match=r"task\.labelled_examples: 11, .* has 10 labelled rows"):
        load(tmp_path, tmp_path, labelled_examples=11)


def test_labels_of_a_language_model_are_refused(tmp_path: Path):
    for kind in ("mlm", "causal_lm"):
        with pytest.raises(ConfigError, match=rf"task\.labelled_examples: {kind} has no labels"):
            load(tmp_path, tmp_path, type=kind, labelled_examples=1)


def test_held_out_rows_are_cut_to_the_same_few_in_their_old_order(tmp_path: Path):
    for name, count in (("train", 30), ("dev", 20), ("test", 20)):
        write_csv(tmp_path / f"{name}.csv", count)

    splits = load(tmp_path, tmp_path, max_eval_examples=7)
    other_seed = load(tmp_path, tmp_path, max_eval_examples=7, seed=2)

    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 7, 7)
    numbers = [int(text.split()[1]) for text in splits.validation["text"]]
    assert numbers == sorted(numbers)
    assert other_seed.validation["text"][:] == splits.validation["text"][:]


def test_a_smaller_split_is_not_cut():
    rows = rows_of(["a", "b"])

    assert at_most(rows, 7) is rows
    assert at_most(rows, None) is rows


def test_a_validation_split_without_labels_is_refused(tmp_path: Path):
    write_csv(tmp_path / "train.csv", 10)
    (tmp_path / "dev.csv").write_text("text,label\na,\n")

    with pytest.raises(DataError, match=r"the validation split of .* has no labelled rows"):
        load(tmp_path, tmp_path)


def test_the_content_hash_tells_choices_apart(tmp_path: Path):
    path = write_csv(tmp_path / "x.csv", 100)

    hashes = {
        load(path, tmp_path).content_hash,
        load(path, tmp_path, labelled_examples=10).content_hash,
        load(path, tmp_path, labelled_examples=10, seed=2).content_hash,
        load(path, tmp_path, max_eval_examples=2).content_hash,
    }

    assert len(hashes) == 4
    assert load(path, tmp_path, seed=2).content_hash in hashes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_dir": Path("glue")}, r"task\.data_dir: glue is used only for glue/<task>"),
        ({"dataset_config": "en"}, r"task\.dataset_config: 'en' names a configuration on the Hub"),
    ],
    ids=["data_dir", "dataset_config"],
)
def test_keys_of_other_sources_are_refused(keys: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        load(write_csv(tmp_path / "x.csv", 4), tmp_path, **keys)


def test_a_hub_that_cannot_be_reached_is_said_in_one_message(tmp_path: Path):
    # tests/conftest.py sets HF_HUB_OFFLINE
    message = r"the Hub cannot be reached to load the data set someone/somedata \(en\), .* pydocs"
    with pytest.raises(DataError, match=message):
        load("someone/somedata", tmp_path, dataset_config="en")


def test_an_id_that_no_hub_can_have_is_said_in_one_message(tmp_path: Path):
    with pytest.raises(DataError, match=r"the data set what is this\?"):
        load("what is this?", tmp_path)


def test_a_hub_data_set_is_read_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["neg", "pos"]),
            "tokens": datasets.List(Value("int64")),
        }
    )
    train = {"text": ["a", "b", "c"], "label": [1, -1, 0], "tokens": [[1], [2], [3]]}
    hub = DatasetDict(
        {
            "train": Dataset.from_dict(train, features=features),
            "validation": Dataset.from_dict(train, features=features),
            "test": Dataset.from_dict(train | {"label": [-1, -1, -1]}, features=features),
            "unsupervised": Dataset.from_dict(train, features=features),
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)

    splits = load("someone/somedata", tmp_path)

    assert splits.label_names == ("neg", "pos")
    assert splits.train["label"][:] == [1, -100, 0]
    assert splits.test is None
    assert len(splits.content_hash) == 64


def test_a_hub_data_set_without_a_training_split_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub = DatasetDict({"everything": rows_of(["a", "b"])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)

    with pytest.raises(DataError, match=r"someone/somedata has no split named 'train'"):
        load("someone/somedata", tmp_path)


def test_a_folder_that_fails_to_be_built_is_not_there(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "half.arrow").write_text("half")
        raise DataError("stop")

    with pytest.raises(DataError, match="stop"):
        cached_folder(tmp_path / "rows" / "key", fail)

    assert not (tmp_path / "rows" / "key").exists()
    assert not list(tmp_path.rglob("half.arrow"))


def test_a_folder_wanted_by_many_at_once_is_built_once(tmp_path: Path):
    built = []

    def fill(folder: Path) -> None:
        time.sleep(0.05)
        built.append(folder)
        (folder / "rows.txt").write_text("all")

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: cached_folder(tmp_path / "key", fill), range(4)))

    assert len(built) == 1
    assert {(folder / "rows.txt").read_text() for folder in folders} == {"all"}


def test_a_damaged_cache_is_built_anew(tmp_path: Path):
    path = write_csv(tmp_path / "x.csv", 50)
    expected = load(path, tmp_path).train.to_dict()
    (rows,) = tmp_path.rglob("rows.arrow")
    damaged = rows.with_suffix(".damaged")
    damaged.write_bytes(rows.read_bytes()[:-100])
    damaged.replace(rows)

    assert load(path, tmp_path).train.to_dict() == expected


def test_a_cache_that_cannot_be_written_is_said_with_its_folder(tmp_path: Path):
    (tmp_path / "cache").write_text("a file where the folder should be")

    with pytest.raises(DataError, match=r"cannot write the data cache .*/cache/rows"):
        load(write_csv(tmp_path / "x.csv", 4), tmp_path)


def test_held_out_rows_with_a_label_are_chosen_before_those_without():
    labels = [n % 2 if n % 50 == 0 else -100 for n in range(1000)]
    rows = rows_of([f"text {n}" for n in range(1000)], labels)

    chosen, fewer = at_most(rows, 50), at_most(rows, 7)

    assert sum(label != -100 for label in chosen["label"]) == 20
    assert len(chosen) == 50
    assert all(label != -100 for label in fewer["label"])
    assert len(fewer) == 7


def test_two_hub_splits_with_names_of_one_split_are_refused_with_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    part = rows_of(["a", "b"])
    hub = DatasetDict({"train": part, "validation": part, "dev": part})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: hub)

    message = r"someone/somedata: 'validation' and 'dev' are names of the same split \(validation\)"
    with pytest.raises(DataError, match=message):
        load("someone/somedata", tmp_path)


def test_a_hub_data_set_that_is_a_script_is_refused_with_other_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found somedata.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)

    message = (
        r"someone/somedata is a script, .* found somedata\.py\); use .* parquet .* local files"
    )
    with pytest.raises(DataError, match=message):
        load("someone/somedata", tmp_path)


def test_a_cut_validation_split_is_scored_up_to_a_limit_that_the_log_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="megakd")
    monkeypatch.setattr(splits, "MOST_CUT_ROWS", 3)
    path = write_csv(tmp_path / "rows.csv", 400)

    limited, whole = load(path, tmp_path), load(path, tmp_path, max_eval_examples=1000)

    assert len(limited.validation) == 3
    assert len(whole.validation) > 3
    assert len(limited.train) == len(whole.train)
    assert caplog.messages == [
        f"validation: 3 of the {len(whole.validation)} rows that are held out are scored; "
        "task.max_eval_examples sets another number"
    ]


def test_a_validation_split_of_the_data_has_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(splits, "MOST_CUT_ROWS", 3)
    write_csv(tmp_path / "train.csv", 40)
    write_csv(tmp_path / "validation.csv", 20)

    assert len(load(tmp_path, tmp_path / "cache").validation) == 20
