"""Splits: what is held out, labels that are kept, data sets of the Hub, files named one by one."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_jsonl, write_text

from megakd.config.task import MixtureSource
from megakd.data import splits
from megakd.data.rows import at_most, cut_validation, keep_labels
from megakd.data.splits import Splits
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

    assert 1 <= len(validation) == len(texts) - len(train) < len(texts)
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


@pytest.mark.parametrize("often", range(40))
def test_a_text_of_many_rows_is_trained_on_whatever_its_hash(often):
    texts = [f"text {often}"] * 60 + [f"text {n}" for n in range(40)]

    assert 1 <= len(cut_validation(rows_of(texts), name="x")[1]) <= 10


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

    few, more, other = (
        np.array(keep_labels(rows, count, seed=seed, name="x")["label"]) >= 0
        for count, seed in ((20, 1), (50, 1), (50, 2))
    )

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
        (["train_sft", "test_sft"], r"no split named 'train'; .* test_sft: .* {train: train_sft}"),
        (["train", "validation", "dev"], r"somedata: 'validation' and 'dev' are names of the same"),
    ],
)
def test_splits_of_the_hub_that_cannot_be_used_are_refused(load, hub, names, message):
    hub.update(dict.fromkeys(names, rows_of(["a", "b"])))

    with pytest.raises(DataError, match=message):
        load("someone/somedata")


STREAMED = {"type": "mlm", "streaming": True}


def write_corpus(folder: Path) -> None:
    """Write the splits `train_sft`, with 10 texts, and `test_sft`, with 4."""
    (folder / "data").mkdir()
    for name, count in (("train_sft", 10), ("test_sft", 4)):
        rows = rows_of([f"{name} {n}" for n in range(count)])
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


def test_splits_of_any_name_and_parts_of_them_are_read_from_the_hub(load, hub_folder):
    write_corpus(hub_folder)
    named = {"train": "train_sft[:6]", "validation": "test_sft", "test": "train_sft[-2:]"}

    splits = load("user/corpus", splits=named, revision="v2")

    assert splits.train["text"][:] == [f"train_sft {n}" for n in range(6)]
    assert splits.validation["text"][:] == [f"test_sft {n}" for n in range(4)]
    assert splits.test["text"][:] == ["train_sft 8", "train_sft 9"]
    whole = {"train": "train_sft", "validation": "test_sft"}
    assert load("user/corpus", splits=whole).content_hash != splits.content_hash
    streamed = load("user/corpus", **STREAMED, splits=whole)
    assert len([*streamed.stream.read()]) == 10


@pytest.mark.parametrize(
    ("split", "keys", "message"),
    [
        ("nope", {}, r"user/corpus cannot be loaded from the Hub: .*nope"),
        ("train_sft[:6", {}, r"user/corpus cannot be loaded .*train_sft"),
        ("train_sft[:6]", STREAMED, r"no split 'train_sft\[:6\]', .* test_sft, train_sft"),
    ],
)
def test_a_split_that_the_hub_does_not_have_is_refused(load, hub_folder, split, keys, message):
    write_corpus(hub_folder)

    with pytest.raises(DataError, match=message):
        load("user/corpus", splits={"train": split}, **keys)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder as the Hub has it: two configurations that its card names, and other split names."""
    folder = tmp_path / "copied"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for split, count in (("train_sft", 8), ("test_sft", 3)):
            rows = rows_of([f"{name} {split} {n}" for n in range(count)])
            rows.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    listed = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - {{split: {s}, path: {name}/{s}-*}}\n" for s in ("train_sft", "test_sft"))
        for name in ("one", "two")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n# Rows\n")
    return folder


SPLITS = {"train": "train_sft[:6]", "validation": "test_sft"}


def test_a_folder_copied_from_the_hub_is_read_by_its_card(load, copied):
    splits = load(str(copied), dataset_config="two", splits=SPLITS)

    assert splits.train["text"][:] == [f"two train_sft {n}" for n in range(6)]
    assert splits.validation["text"][:] == [f"two test_sft {n}" for n in range(3)]
    whole = {"train": "train_sft", "validation": "test_sft"}
    streamed = load(str(copied), dataset_config="one", splits=whole, **STREAMED)
    assert len([*streamed.stream.read()]) == 8


def test_a_folder_without_a_card_has_the_splits_that_datasets_reads(load, tmp_path, write_rows):
    (tmp_path / "plain" / "data").mkdir(parents=True)
    for split, count in (("train", 8), ("test", 3)):
        rows = rows_of([f"{split} {n}" for n in range(count)])
        rows.to_parquet(tmp_path / "plain" / "data" / f"{split}-00000-of-00001.parquet")

    splits = load(str(tmp_path / "plain"))

    assert len(splits.train) + len(splits.validation) == 8
    assert splits.test["text"][:] == [f"test {n}" for n in range(3)]


def test_a_folder_that_is_replaced_at_the_same_times_is_read_anew(load, copied):
    keys = {"dataset_config": "one", "splits": SPLITS}
    file = copied / "one" / "train_sft-00000-of-00001.parquet"
    before, facts = load(str(copied), **keys), file.stat()
    rows_of([f"one train_sfT {n}" for n in range(8)]).to_parquet(file)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    after = load(str(copied), **keys)

    assert after.train["text"][0] == "one train_sfT 0"
    assert before.content_hash != after.content_hash


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"splits": SPLITS}, r"copied cannot be loaded: .*Config name is missing"),
        ({"dataset_config": "three", "splits": SPLITS}, r"'three' not found.*'one', 'two'"),
        ({"dataset_config": "one"}, r"copied \(one\) has no split named 'train'; .* test_sft"),
        ({"dataset_config": "one", "splits": {"train": "dev"}}, r'"dev".*train_sft'),
    ],
)
def test_what_a_copied_folder_lacks_is_named_with_what_it_has(load, copied, keys, message):
    with pytest.raises(DataError, match=message):
        load(str(copied), **keys)


def test_a_copied_folder_and_files_are_mixed(load, copied, folder):
    copy = MixtureSource(
        dataset=str(copied), dataset_config="one", split="train_sft[:50%]", weight=1
    )
    files = MixtureSource(files="one.jsonl", weight=1)

    splits = load(
        type="causal_lm", mixture={"copy": copy, "files": files}, validation_files="dev.jsonl"
    )

    assert Counter(splits.train["source"]) == {"copy": 4, "files": 2}


def test_files_and_splits_of_the_hub_are_mixed(load, hub_folder, folder):
    write_corpus(hub_folder)
    hub = MixtureSource(dataset="user/corpus", split="train_sft[:50%]", weight=1)
    files = MixtureSource(files="one.jsonl", weight=1)

    keys = {"mixture": {"hub": hub, "files": files}, "validation_files": "dev.jsonl"}
    splits = load(type="causal_lm", **keys)

    assert Counter(splits.train["source"]) == {"hub": 5, "files": 2}
    assert splits.train["text"][:2] == ["train_sft 0", "train_sft 1"]
    assert splits.train["place"][0] == "corpus (train_sft[:50%]), row 1"


def test_a_hub_data_set_that_is_a_script_is_refused_with_other_ways(load, monkeypatch):
    refusal = RuntimeError("Dataset scripts are no longer supported, but found somedata.py")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=refusal))

    message = r"somedata cannot be loaded from the Hub: .* found somedata\.py; .* local file"
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
    (message,) = caplog.messages
    assert (
        f"3 of the {len(whole.validation)} rows that are held out are scored; task.max" in message
    )


def rows(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the test runs in."""
    folder = tmp_path / "here"
    write_jsonl(folder / "one.jsonl", rows("t1", "t2"))
    write_jsonl(folder / "two.jsonl", rows("t3", "t4"))
    write_jsonl(folder / "dev.jsonl", rows("d1", "d2", "d3"))
    write_jsonl(folder / "hard.jsonl", rows("h1"))
    monkeypatch.chdir(folder)
    return folder


def texts(rows: Dataset) -> Sequence[str]:
    return rows["text"][:]


@pytest.mark.parametrize("train", [("one.jsonl", "two.jsonl"), "[ot]*.jsonl"])
def test_files_are_named_in_a_list_or_by_a_pattern(load, folder, train):
    splits = load(train_files=train, validation_files="dev.jsonl", test_files="hard.jsonl")

    assert texts(splits.train) == ["t1", "t2", "t3", "t4"]
    assert texts(splits.validation) == ["d1", "d2", "d3"]
    assert texts(splits.test) == ["h1"]
    assert not splits.is_cut
    cut = load(train_files=train, evaluation_sets={"hard": "hard.jsonl"})
    assert cut.is_cut
    assert len(cut.train) + len(cut.validation) == 4
    assert texts(cut.evaluation_sets["hard"]) == ["h1"]


def test_evaluation_sets_are_whole_and_have_the_training_rows_classes(load, folder):
    write_jsonl(folder / "b.jsonl", [{"text": "x", "label": "b"}])
    for name in ("a.txt", "b.txt"):
        write_text(folder / name, documents=4)

    sets = {"hard": "hard.jsonl", "only-b": "b.jsonl", "both": ("dev.jsonl", "b.jsonl")}
    splits = load(train_files="one.jsonl", validation_files="dev.jsonl", evaluation_sets=sets)
    files = {"train_files": "a.txt", "validation_files": "b.txt"}
    books = load(type="causal_lm", **files, evaluation_sets={"books": ("a.txt", "b.txt")})

    assert [len(splits.evaluation_sets[name]) for name in sets] == [1, 1, 4]
    assert splits.evaluation_sets["only-b"]["label"][:] == [1]
    assert len(books.evaluation_sets["books"]) == len(books.train) + len(books.validation)


def test_every_file_counts_in_the_hash(load, folder):
    files = {"train_files": "one.jsonl", "validation_files": "dev.jsonl", "test_files": "two.jsonl"}

    def content() -> str:
        return load(**files, evaluation_sets={"hard": "hard.jsonl"}).content_hash

    result = {content()}
    for name in ("one", "dev", "two", "hard"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"text": "more", "label": "a"}\n')
        result.add(content())

    assert len(result) == 5


def write_classes(path: Path, names: Sequence[str], labels: dict[str, int]) -> None:
    """Write texts and class numbers, with the names of the classes in the schema."""
    kind = ClassLabel(names=list(names))
    columns = {"text": list(labels), "label": list(labels.values())}
    features = Features({"text": Value("string"), "label": kind})
    Dataset.from_dict(columns, features=features).to_parquet(path)


ROWS = {
    "body": {"body": "x", "label": "a"},
    "pairs": {"text1": "x", "text2": "y", "label": "a"},
    "c": {"text": "x", "label": "c"},
    "none": {"text": "x", "label": None},
}
TWO, ALSO = ("one.jsonl", "two.jsonl"), r".*link\.jsonl is also a file of task\.train_files \(as "
# The keys of the task, and the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_files": "gone.jsonl"}, r"task\.train_files: .*gone\.jsonl does not exist"),
    ({"test_files": "gone*.jsonl"}, r"task\.test_files: no file matches .*gone\*\.jsonl"),
    ({"train_files": "."}, r"task\.train_files: .* is a folder; name its files"),
    ({"train_files": "x.xml"}, r"task\.train_files: .*x\.xml has an unsupported ending"),
    # Files that occur twice
    ({"train_files": ("one.jsonl", "o*.jsonl")}, r"task\.train_files: .*one\.jsonl is listed more"),
    ({"train_files": ("../here/one.jsonl", "one.jsonl")}, r"more than once \(as .*\.\./"),
    ({"train_files": TWO, "validation_files": "link.jsonl"}, rf"task\.validation_files: {ALSO}"),
    ({"train_files": TWO, "test_files": "link.jsonl"}, rf"task\.test_files: {ALSO}"),
    # Columns
    ({"train_files": ("one.jsonl", "body.jsonl")}, r"body\.jsonl has the columns body, label, but"),
    ({"test_files": "body.jsonl"}, r"body\.jsonl: column 'text' .* does not exist"),
    # A word True of a csv file and a true of a jsonl file would be two classes.
    ({"train_files": ("one.jsonl", "numbers.csv")}, r"numbers\.csv and .*one\.jsonl have diff"),
    # Evaluation sets, before the training rows are read
    ({"train_files": "x.txt", "evaluation_sets": {"a": "gone.jsonl"}}, r"sets\.a: .* does not exi"),
    ({"evaluation_sets": {"p": "pairs.jsonl"}}, r"task\.evaluation_sets\.p: .* holds pairs of tex"),
    ({"evaluation_sets": {"c": ("hard.jsonl", "c.jsonl")}}, r"line 1: label 'c' is not one of the"),
    ({"evaluation_sets": {"n": "none.jsonl"}}, r"none\.jsonl has no labelled rows to score"),
    # Classes
    ({"train_files": ("classes.parquet", "other.parquet")}, r"'other' is not one .* \(neg, pos\)"),
    ({"train_files": "digits.parquet", "test_files": "numbers.csv"}, r"'0' is not .* \(1, 2, 3\)"),
    ({"validation_files": "seven.parquet"}, r"seven\.parquet, row 2: label '7' is not one of the"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_files_that_cannot_be_used_are_refused_with_their_key(load, folder, keys, message):
    for name, row in ROWS.items():
        write_jsonl(folder / f"{name}.jsonl", [row])
    (folder / "x.xml").touch()
    (folder / "link.jsonl").symlink_to(folder / "two.jsonl")
    write_classes(folder / "classes.parquet", ["neg", "pos"], {"a": 0, "b": 1})
    write_classes(folder / "other.parquet", ["neg", "other"], {"c": 0, "d": 1})
    write_classes(folder / "digits.parquet", ["1", "2", "3"], {"one": 0, "two": 1, "three": 2})
    (folder / "numbers.csv").write_text("text,label\none,0\ntwo,1\n")
    write_classes(folder / "seven.parquet", ["a", "b"], {})
    schema = pq.read_schema(folder / "seven.parquet")
    wrong = pa.table({"text": ["x", "y"], "label": [0, 7]}, schema=schema)
    pq.write_table(wrong, folder / "seven.parquet")

    with pytest.raises(DataError, match=message):
        load(**{"train_files": "one.jsonl", **keys})


def named_labels(splits: Splits, part: Dataset) -> dict[str, str | None]:
    labels = [splits.label_names[label] if label >= 0 else None for label in part["label"][:]]
    return dict(zip(part["text"][:], labels, strict=True))


def test_files_of_one_list_with_other_orders_of_the_classes_are_matched_by_name(load, folder):
    write_classes(folder / "x.parquet", ["neg", "pos"], {"n1": 0, "p1": 1})
    write_classes(folder / "y.parquet", ["pos", "neg"], {"p2": 0, "n2": 1, "none": -1})
    write_jsonl(folder / "v.jsonl", [{"text": "v", "label": "pos"}])

    splits = load(train_files=("x.parquet", "y.parquet"), validation_files="v.jsonl")

    labels = {"n1": "neg", "p1": "pos", "p2": "pos", "n2": "neg", "none": None}
    assert named_labels(splits, splits.train) == labels
    assert set(splits.train["label"]) == {0, 1, -100}


def test_classes_with_digits_as_names_are_matched_by_name(load, folder):
    write_classes(folder / "x.parquet", ["1", "2", "3"], {"one": 0, "two": 1, "three": 2})
    write_classes(folder / "y.parquet", ["2", "3", "1"], {"two": 0, "three": 1, "one": 2})
    (folder / "z.csv").write_text("text,label\none,1\ntwo,2.0\nthree,3\n")

    sets = {"csv": "z.csv", "parquet": "y.parquet"}
    splits = load(train_files="x.parquet", validation_files="y.parquet", evaluation_sets=sets)

    expected = {"one": "1", "two": "2", "three": "3"}
    for part in (splits.train, splits.validation, *splits.evaluation_sets.values()):
        assert named_labels(splits, part) == expected


@pytest.mark.parametrize("order", [["neg", "pos"], ["pos", "neg"]])
def test_words_and_numbers_with_these_names_are_the_same_classes(load, folder, order):
    (folder / "words.csv").write_text("text,label\na,neg\nb,pos\n")
    labels = {"n": order.index("neg"), "p": order.index("pos"), "none": -1}
    write_classes(folder / "y.parquet", order, labels)

    splits = load(train_files="words.csv", validation_files="y.parquet")

    assert named_labels(splits, splits.validation) == {"n": "neg", "p": "pos", "none": None}


MRPC = ClassLabel(names=["not_equivalent", "equivalent"])


@pytest.fixture
def glue(monkeypatch):
    """Pairs of each split that the Hub has, and the list of what it is asked for."""
    asked, hub = [], DatasetDict()

    def write(splits, columns=("sentence1", "sentence2"), label=MRPC):
        features = Features(dict.fromkeys(columns, Value("string")) | {"label": label})
        for name, labels in splits.items():
            texts = {c: [f"{c} {name} {n}" for n in range(len(labels))] for c in columns}
            hub[name] = Dataset.from_dict({**texts, "label": labels}, features=features)

        def load_dataset(path, *, name, split, revision):
            asked.append((path, name, split))
            return hub[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return write


def test_a_task_has_the_splits_classes_and_metrics_of_the_hub(load, glue):
    asked = glue({"train": [1, 0], "validation": [0], "test": [-1, -1]})

    splits = load("glue/mrpc")

    assert asked == [("nyu-mll/glue", "mrpc", split) for split in ("train", "validation")]
    row = {"text": "sentence1 train 0", "text_pair": "sentence2 train 0", "label": 1}
    assert splits.train[0] == row
    assert splits.label_names == tuple(MRPC.names)
    assert splits.metrics == ("accuracy", "f1")
    assert (len(splits.validation), splits.test) == (1, None)


def test_scores_of_stsb_are_a_regression(load, glue):
    glue({"train": [3.75, 0.5], "validation": [5.0]}, label=Value("float32"))

    splits = load("glue/stsb", type="regression")

    assert splits.train["label"][:] == [3.75, 0.5]
    assert splits.metrics == ("pearson", "spearman")


def test_mnli_is_scored_on_the_validation_split_it_names(load, glue):
    splits = {"train": [0, 1], "validation_matched": [1], "validation_mismatched": [0, 1]}
    asked = glue(splits, columns=("premise", "hypothesis"))

    counts = {n: len(load(f"glue/mnli{n}").validation) for n in ("", "_matched", "_mismatched")}

    assert counts == {"": 1, "_matched": 1, "_mismatched": 2}
    assert {configuration for _, configuration, _ in asked} == {"mnli"}


@pytest.mark.parametrize(
    ("name", "train", "validation"), [("MRPC", 3668, 408), ("RTE", 2490, 277), ("WNLI", 635, 71)]
)
def test_the_files_of_glue_have_all_their_rows(load, name, train, validation, shared_data):
    """Without quotes, with a byte order mark, and with words or numbers as labels."""
    folder = shared_data / "glue" / name
    mrpc = {"text_columns": ("#1 String", "#2 String"), "label_column": "Quality"}

    files = {"train_files": str(folder / "train.tsv"), "validation_files": str(folder / "dev.tsv")}
    splits = load(**files, **(mrpc if name == "MRPC" else {}))

    assert (len(splits.train), len(splits.validation)) == (train, validation)
    assert len(splits.label_names) == 2
