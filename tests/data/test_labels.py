from __future__ import annotations

import csv
import json
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from megakd.config.task import TaskConfig
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


def as_jsonl(path: Path, rows: list[tuple]) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


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


@pytest.mark.parametrize("wrong", ["good", "inf", "1,5", "1_000", "1e39", "-1e300"])
def test_a_score_that_is_no_number_is_refused_with_its_row(wrong: str, tmp_path: Path):
    path = as_csv(tmp_path / "x.csv", [("a", "0.5"), ("b", wrong)])

    with pytest.raises(DataError, match=rf"x\.csv, line 3: '{wrong}' .* is not a finite number"):
        load(path, tmp_path, type="regression")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((0, 1, 99), r"x\.csv, line 4: label 99 is outside 0\.\.2"),
        ((1, 2, 3), r"x\.csv, line 4: label 3 is outside 0\.\.2"),
        ((0, -1, 1), r"x\.csv, line 3: label -1 is outside 0\.\.2"),
        ((0, "cat", 1), r"the labels mix numbers and words: '0' \(line 2\) and 'cat' \(line 3\)"),
        ((1, 1, 1), r"all labels in column 'label' are '1'; classification needs at least 2"),
        (("", "", ""), r"column 'label' has no label in any row"),
    ],
    ids=["gap", "from one", "negative", "mixed", "one class", "none"],
)
def test_labels_that_are_no_classes_are_refused(labels: tuple, message: str, tmp_path: Path):
    path = as_csv(tmp_path / "x.csv", [(f"text {n}", label) for n, label in enumerate(labels)])

    with pytest.raises(DataError, match=message):
        load(path, tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([1], r"line 2: label \[1\] in column 'label' is not a class"),
        (0.5, r"line 2: label 0\.5 .* is not a class; .* task\.type: regression"),
    ],
    ids=["list", "fraction"],
)
def test_a_label_of_a_wrong_type_is_refused(label: object, message: str, tmp_path: Path):
    path = as_jsonl(tmp_path / "x.jsonl", [("a", 0), ("b", label)])

    with pytest.raises(DataError, match=message):
        load(path, tmp_path)


def test_a_label_beyond_the_classes_of_training_is_refused(tmp_path: Path):
    as_csv(tmp_path / "train.csv", ROWS)
    as_csv(tmp_path / "dev.csv", [("a", 0), ("b", 7)])

    with pytest.raises(DataError, match=r"dev\.csv, line 3: label 7 is outside 0\.\.1"):
        load(tmp_path, tmp_path)


def test_an_unknown_class_name_is_refused_with_the_nearest(tmp_path: Path):
    as_csv(tmp_path / "train.csv", [("a", "negative"), ("b", "positive")])
    as_csv(tmp_path / "dev.csv", [("a", "postive")])

    message = r"dev\.csv, line 2: label 'postive' is not one of the 2 .* did you mean 'positive'\?"
    with pytest.raises(DataError, match=message):
        load(tmp_path, tmp_path)


def test_decimals_in_a_parquet_file_are_scores(tmp_path: Path):
    scores = pa.array([Decimal("1.50"), Decimal("2.25"), None], pa.decimal128(5, 2))
    for name in ("train", "dev"):
        table = pa.table({"text": ["a", "b", "c"], "label": scores})
        pq.write_table(table, tmp_path / f"{name}.parquet")

    labels = load(tmp_path, tmp_path, type="regression").train["label"][:]

    assert labels[:2] == [1.5, 2.25]
    assert labels[2] != labels[2]
