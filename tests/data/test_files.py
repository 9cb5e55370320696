"""Local files of every format: their rows, splits, columns and labels."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.data.readers import pieces
from megakd.data.splits import Splits, load_splits
from megakd.errors import DataError

ROWS = [("one fine day", 0), ("two, she said", 1), ("three", 0), ("vier für alle", 1)]


def load(path: Path, cache_dir: Path, **keys) -> Splits:
    task = TaskConfig(**{"type": "classification", "dataset": str(path), **keys})
    return load_splits(task, seed=1, cache_dir=cache_dir / "cache")


def as_csv(path: Path, rows: list[tuple], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def as_tsv(path: Path, rows: list[tuple]) -> Path:
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def as_jsonl(path: Path, rows: list[tuple]) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def as_json(path: Path, rows: list[tuple]) -> Path:
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))
    return path


def as_parquet(path: Path, rows: list[tuple]) -> Path:
    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), path)
    return path


WRITERS = {
    "csv": as_csv,
    "tsv": as_tsv,
    "jsonl": as_jsonl,
    "json": as_json,
    "parquet": as_parquet,
}


def everything(splits: Splits) -> set[tuple[str, int]]:
    return {(row["text"], row["label"]) for part in splits[:2] for row in part}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path):
    path = WRITERS[kind](tmp_path / f"data.{kind}", ROWS)

    splits = load(path, tmp_path)

    assert everything(splits) == set(ROWS)
    assert splits.label_names == ("0", "1")
    assert splits.metrics == ("accuracy",)
    assert splits.train.features == Features({"text": Value("string"), "label": Value("int64")})
    assert splits.test is None


@pytest.mark.parametrize("kind", WRITERS)
def test_words_as_labels_are_numbered_in_sorted_order(kind: str, tmp_path: Path):
    rows = [("a b", "spam"), ("c d", "ham"), ("e f", "spam"), ("g h", "ham")]
    path = WRITERS[kind](tmp_path / f"data.{kind}", rows)

    splits = load(path, tmp_path)

    assert splits.label_names == ("ham", "spam")
    assert everything(splits) == {("a b", 1), ("c d", 0), ("e f", 1), ("g h", 0)}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_folder_is_read_by_the_names_of_its_splits(name: str, tmp_path: Path):
    as_csv(tmp_path / "train.csv", ROWS)
    as_csv(tmp_path / f"{name}.csv", ROWS[:2])
    as_csv(tmp_path / "test.csv", ROWS[2:])
    (tmp_path / "categories.json").write_text("[]")

    splits = load(tmp_path, tmp_path)

    assert [len(part) for part in splits[:3] if part is not None] == [4, 2, 2]


def test_shards_of_a_split_are_read_one_after_the_other(tmp_path: Path):
    as_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    as_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[2:])
    as_parquet(tmp_path / "validation-00000-of-00001.parquet", ROWS[:1])

    splits = load(tmp_path, tmp_path)

    assert splits.train["text"][:] == [text for text, _ in ROWS]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize(
    ("split", "missing", "first"),
    [("train", 0, 0), ("validation", 2, 0), ("test", 3, 0), ("train", 3, 1)],
)
def test_a_missing_shard_is_refused_with_its_name(
    kind: str, split: str, missing: int, first: int, tmp_path: Path
):
    as_jsonl(tmp_path / "train.jsonl", ROWS)
    if split == "train":
        (tmp_path / "train.jsonl").unlink()
    for number in {*range(first, first + 4)} - {missing}:
        WRITERS[kind](tmp_path / f"{split}-{number:05}-of-00004.{kind}", ROWS)

    message = (
        rf"the shard {split}-{missing:05}-of-00004\.{kind} is missing, and 3 of 00004 are there"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path, tmp_path)


def test_a_shard_that_a_pattern_matches_is_missed_and_others_are_not(tmp_path: Path):
    for number in (0, 1, 3):
        as_jsonl(tmp_path / f"part-{number:05}-of-00004.jsonl", ROWS)

    def texts(pattern: str) -> int:
        task = TaskConfig(type="mlm", train_files=str(tmp_path / pattern))
        splits = load_splits(task, seed=1, cache_dir=tmp_path / "cache")
        return len(splits.train) + len(splits.validation)

    assert texts("part-0000[01]*") == 8
    with pytest.raises(
        DataError, match=r"train_files: the shard part-00002-of-00004\.jsonl is miss"
    ):
        texts("part-*.jsonl")


def test_shards_with_a_hash_in_their_names_are_read(tmp_path: Path):
    for number in range(2):
        as_parquet(tmp_path / f"train-{number:05}-of-00002-{number}f3b9c0d.parquet", ROWS)
    as_parquet(tmp_path / "validation-00000-of-00001-2a4e6f8a0b1c2d3e.parquet", ROWS[:1])

    splits = load(tmp_path, tmp_path)

    assert (len(splits.train), len(splits.validation)) == (8, 1)
    assert not splits.is_cut


def test_a_test_file_without_labels_is_left_out(tmp_path: Path):
    as_csv(tmp_path / "train.csv", ROWS)
    as_csv(tmp_path / "test.csv", [("no label here",)], header=("text",))

    assert load(tmp_path, tmp_path).test is None


def test_pairs_are_found_by_their_usual_names(tmp_path: Path):
    rows = [(f"a{n}", f"b{n}", n % 2) for n in range(6)]
    path = as_csv(tmp_path / "x.csv", rows, header=("premise", "hypothesis", "label"))

    splits = load(path, tmp_path)

    assert splits.train.column_names == ["text", "text_pair", "label"]
    assert {row["text"][1:] == row["text_pair"][1:] for row in splits.train} == {True}


def test_columns_may_be_named(tmp_path: Path):
    rows = [(n % 2, f"text {n}", "x") for n in range(6)]
    path = as_csv(tmp_path / "x.csv", rows, header=("topic", "body", "text"))

    splits = load(path, tmp_path, text_columns=("body",), label_column="topic")

    assert splits.train.column_names == ["text", "label"]
    found = {(row["text"], splits.label_names[row["label"]]) for row in splits.train}
    assert found
    assert found <= {(f"text {n}", str(n % 2)) for n in range(6)}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_label_column_names_those_there(kind: str, tmp_path: Path):
    path = WRITERS[kind](tmp_path / f"data.{kind}", ROWS)

    with pytest.raises(
        DataError,
        match=r"column 'topic' \(task.label_column\) does not exist; "
        r"the columns are text, label",
    ):
        load(path, tmp_path, label_column="topic")


@pytest.mark.parametrize("name", ["nope.csv", "nope/", "./nope", "/nope/at/all", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused(name: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"nope|a/b/c") as caught:
        load_splits(
            TaskConfig(type="classification", dataset=name), seed=1, cache_dir=tmp_path / "cache"
        )

    assert "does not exist" in str(caught.value)


def test_a_json_list_of_texts_is_a_list_of_documents(tmp_path: Path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(["one day", "once upon a time", "the end"]))

    splits = load(path, tmp_path, type="causal_lm")

    assert splits.train.column_names == ["text"]
    assert len(splits.train) + len(splits.validation) == 3
    assert splits.metrics == ("perplexity",)


def test_a_json_object_of_splits_is_read_by_their_names(tmp_path: Path):
    path = tmp_path / "data_full.json"
    tree = {"train": [["a", "x"], ["b", "y"]], "val": [["c", "y"]], "oos_val": [["d", "z"]]}
    path.write_text(json.dumps(tree))

    splits = load(path, tmp_path)

    assert splits.label_names == ("x", "y")
    assert everything(splits) == {("a", 0), ("b", 1), ("c", 1)}


def test_two_text_columns_make_one_document_of_a_language_model(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "why?", "a": "so"}\n{"q": "who?", "a": "me"}\n{"q": " ", "a": ""}\n')

    splits = load(path, tmp_path, type="causal_lm", text_columns=("q", "a"))

    texts = {*splits.train["text"], *splits.validation["text"]}
    assert texts == {"why?\nso", "who?\nme"}


def test_a_folder_of_texts_is_many_documents(tmp_path: Path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name} begins.\n\n{name} ends.\n")

    splits = load(tmp_path, tmp_path, type="causal_lm")

    texts = [*splits.train["text"], *splits.validation["text"]]
    assert sorted(texts) == sorted(f"{n} {verb}." for n in "abc" for verb in ("begins", "ends"))


def test_a_text_with_its_own_validation_file_keeps_long_pieces(tmp_path: Path):
    (tmp_path / "train.txt").write_text("A paragraph.\n\n" * 50)
    (tmp_path / "validation.txt").write_text("Another.\n\n" * 50)

    splits = load(tmp_path, tmp_path, type="causal_lm")

    assert (len(splits.train), len(splits.validation)) == (1, 1)


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=20), st.integers(1, 60))
def test_pieces_hold_all_the_text_in_its_order(blocks: list[str], length: int):
    lines = "\n".join(blocks).splitlines(keepends=True)

    found = list(pieces(iter(lines), length))

    assert "".join("".join(text for _, text in found).split()) == "".join("".join(lines).split())
    assert [first for first, _ in found] == sorted({first for first, _ in found})
    assert all(text.strip() for _, text in found)


def test_rows_are_read_once_and_then_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = as_csv(tmp_path / "x.csv", ROWS)
    first = load(path, tmp_path)
    monkeypatch.setattr("megakd.data.rows.write_rows", None)

    second = load(path, tmp_path)

    assert second.train.to_dict() == first.train.to_dict()
    assert second.content_hash == first.content_hash


def test_the_content_hash_follows_the_content(tmp_path: Path):
    first = load(as_csv(tmp_path / "x.csv", ROWS), tmp_path)
    again = load(as_csv(tmp_path / "x.csv", ROWS), tmp_path)
    other = load(as_csv(tmp_path / "x.csv", [*ROWS, ("five", 0)]), tmp_path)

    assert first.content_hash == again.content_hash
    assert other.content_hash != first.content_hash
    assert len(other.train) + len(other.validation) == 5


def test_empty_labels_are_unlabelled(tmp_path: Path):
    # pandas writes whole numbers as 1.0 where some are missing
    path = as_csv(tmp_path / "train.csv", [("a", "1.0"), ("b", ""), ("c", "0.0"), ("d", -100)])
    as_csv(tmp_path / "dev.csv", ROWS)

    splits = load(tmp_path, tmp_path)

    assert path.exists()
    assert splits.train["label"][:] == [1, -100, 0, -100]
    assert splits.label_names == ("0", "1")


def test_missing_labels_are_unlabelled(tmp_path: Path):
    as_jsonl(tmp_path / "train.jsonl", [("a", 1), ("b", None), ("c", 0)])
    as_jsonl(tmp_path / "dev.jsonl", ROWS)

    assert load(tmp_path, tmp_path).train["label"][:] == [1, -100, 0]


def test_class_names_in_a_parquet_file_are_used(tmp_path: Path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "dev.parquet")

    splits = load(tmp_path, tmp_path)

    assert splits.label_names == ("neg", "pos")
    assert splits.train["label"][:] == [1, 0, -100]


def test_scores_are_read_for_regression(tmp_path: Path):
    as_csv(tmp_path / "train.csv", [("a", "0.5"), ("b", ""), ("c", 3)], header=("text", "score"))
    as_csv(tmp_path / "dev.csv", [("a", "0.5")], header=("text", "score"))

    splits = load(tmp_path, tmp_path, type="regression")

    assert splits.train["label"][0] == 0.5
    assert splits.train["label"][1] != splits.train["label"][1]
    assert splits.train.features["label"] == Value("float32")
    assert splits.label_names == ()
    assert splits.metrics == ("pearson", "spearman")


def test_decimals_in_a_parquet_file_are_scores(tmp_path: Path):
    scores = pa.array([Decimal("1.50"), Decimal("2.25"), None], pa.decimal128(5, 2))
    for name in ("train", "dev"):
        table = pa.table({"text": ["a", "b", "c"], "label": scores})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    labels = load(tmp_path, tmp_path, type="regression").train["label"][:]

    assert labels[:2] == [1.5, 2.25]
    assert labels[2] != labels[2]


def test_real_files_are_read(shared_data: Path, tmp_path: Path):
    banking = load(shared_data / "banking77", tmp_path, label_column="category")
    clinc = load(shared_data / "clinc150" / "data_full.json", tmp_path)
    books = load(shared_data / "lm" / "standard-ebooks", tmp_path, type="causal_lm")

    assert len(banking.train) + len(banking.validation) == 10003
    assert banking.test is not None
    assert (len(banking.test), len(banking.label_names)) == (3080, 77)
    assert clinc.test is not None
    assert (len(clinc.train), len(clinc.validation), len(clinc.test)) == (15000, 3000, 4500)
    assert len(clinc.label_names) == 150
    assert 0.03 < len(books.validation) / len(books.train) < 0.08
