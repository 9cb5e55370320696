"""Files named one by one: splits, lists, patterns, evaluation sets; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tiny_runs import write_jsonl, write_text

from megakd.data.splits import Splits
from megakd.errors import DataError


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


def test_text_files_of_a_language_model_are_named_too(load, folder):
    write_text(folder / "a.txt", documents=4)
    write_text(folder / "b.txt", documents=4)

    keys = {"train_files": "a.txt", "validation_files": "b.txt"}
    splits = load(type="causal_lm", **keys, evaluation_sets={"books": ("a.txt", "b.txt")})

    assert len(splits.evaluation_sets["books"]) == len(splits.train) + len(splits.validation)


def test_evaluation_sets_are_whole_and_have_the_training_rows_classes(load, folder):
    write_jsonl(folder / "b.jsonl", [{"text": "x", "label": "b"}])

    sets = {"hard": "hard.jsonl", "only-b": "b.jsonl", "both": ("dev.jsonl", "b.jsonl")}
    splits = load(train_files="one.jsonl", validation_files="dev.jsonl", evaluation_sets=sets)

    assert [len(splits.evaluation_sets[name]) for name in sets] == [1, 1, 4]
    assert splits.evaluation_sets["only-b"]["label"][:] == [1]


def test_every_file_counts_in_the_hash_and_the_sets_apart_from_what_is_trained_on(load, folder):
    files = {"train": "one.jsonl", "validation": "dev.jsonl", "test": "two.jsonl"}
    keys = {f"{split}_files": name for split, name in files.items()}

    def hashes():
        splits = load(**keys, evaluation_sets={"hard": "hard.jsonl"})
        return splits.content_hash, splits.whole_hash

    result = [hashes()]
    for name in ("one", "dev", "two", "hard"):
        with (folder / f"{name}.jsonl").open("a") as file:
            file.write('{"text": "more", "label": "a"}\n')
        result.append(hashes())

    content, whole = ([pair[n] for pair in result] for n in (0, 1))
    assert len(set(whole)) == 5
    assert content[3] == content[4]  # a result does not depend on a set that is only scored
    assert len(set(content)) == 4


def write_classes(path: Path, names: Sequence[str] | None, labels: dict[str, int]) -> None:
    """Write texts and class numbers, with the names of the classes in the schema if given."""
    kind = Value("int64") if names is None else ClassLabel(names=list(names))
    columns = {"text": list(labels), "label": list(labels.values())}
    features = Features({"text": Value("string"), "label": kind})
    Dataset.from_dict(columns, features=features).to_parquet(path)


# The keys of the task, and the message.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_files": "gone.jsonl"}, r"task\.train_files: .*gone\.jsonl does not exist"),
    ({"test_files": "gone*.jsonl"}, r"task\.test_files: no file matches .*gone\*\.jsonl"),
    ({"train_files": "."}, r"task\.train_files: .* is a folder; name its files"),
    ({"train_files": "x.xml"}, r"task\.train_files: .*x\.xml has an unsupported ending"),
    # Files that occur twice
    ({"train_files": ("one.jsonl", "o*.jsonl")}, r"task\.train_files: .*one\.jsonl is listed more"),
    ({"train_files": ("../here/one.jsonl", "one.jsonl")}, r"more than once \(also as .*\.\./"),
    *(
        (
            {"train_files": ("one.jsonl", "two.jsonl"), f"{split}_files": "link.jsonl"},
            rf"task\.{split}_files: .*link\.jsonl is also a file of task\.train_files",
        )
        for split in ("validation", "test")
    ),
    # Columns
    ({"train_files": ("one.jsonl", "body.jsonl")}, r"body\.jsonl has the columns body, label, but"),
    ({"test_files": "body.jsonl"}, r"body\.jsonl: column 'text' .* does not exist"),
    (  # a word True of a csv file and a true of a jsonl file would be two classes
        {"train_files": ("one.jsonl", "numbers.csv")},
        r"task\.train_files: .*numbers\.csv and .*one\.jsonl have diff",
    ),
    # Evaluation sets
    (  # before the training rows are read
        {"train_files": "x.txt", "evaluation_sets": {"hard": ("hard.jsonl", "gone.jsonl")}},
        r"task\.evaluation_sets\.hard: .*gone\.jsonl does not exist",
    ),
    ({"evaluation_sets": {"p": "pairs.jsonl"}}, r"task\.evaluation_sets\.p: .* holds pairs of tex"),
    (
        {"evaluation_sets": {"c": ("hard.jsonl", "c.jsonl")}},
        r"evaluation_sets\.c, c\.jsonl line 1: label 'c' is not one of the 2 classes",
    ),
    ({"evaluation_sets": {"n": "none.jsonl"}}, r"none\.jsonl has no labelled rows to score"),
    # Classes
    *(
        (
            {"train_files": ("classes.parquet", f"{name}.parquet")},
            rf"{name}\.parquet: column 'label' has {names}, but in .*s\.parquet it has .* neg, pos",
        )
        for name, names in (
            ("other", "the class names neg, other"),
            ("more", "the class names neg, pos, other"),
            ("nameless", "no class names"),
        )
    ),
    (
        {"train_files": "digits.parquet", "validation_files": "numbers.csv"},
        r"numbers\.csv, line 2: label 0 is not one of the 3 classes .* \(1, 2, 3\)",
    ),
    ({"validation_files": "seven.parquet"}, r"seven\.parquet, row 2: label 7 is outside 0\.\.1, t"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=[case[1][:40] for case in REFUSED])
def test_files_that_cannot_be_used_are_refused_with_their_key(load, folder, keys, message):
    write_jsonl(folder / "body.jsonl", [{"body": "x", "label": "a"}])
    write_jsonl(folder / "pairs.jsonl", [{"text1": "x", "text2": "y", "label": "a"}])
    write_jsonl(folder / "c.jsonl", [{"text": "x", "label": "c"}])
    write_jsonl(folder / "none.jsonl", [{"text": "x", "label": None}])
    (folder / "x.xml").touch()
    (folder / "link.jsonl").symlink_to(folder / "two.jsonl")
    write_classes(folder / "classes.parquet", ["neg", "pos"], {"a": 0, "b": 1})
    write_classes(folder / "other.parquet", ["neg", "other"], {"c": 0, "d": 1})
    write_classes(folder / "more.parquet", ["neg", "pos", "other"], {"c": 0, "d": 1})
    write_classes(folder / "nameless.parquet", None, {"c": 0, "d": 1})
    write_classes(folder / "digits.parquet", ["1", "2", "3"], {"one": 0, "two": 1, "three": 2})
    (folder / "numbers.csv").write_text("text,label\none,0\ntwo,1\n")
    write_classes(folder / "seven.parquet", ["a", "b"], {"x": 0, "y": 1})
    table = pq.read_table(folder / "seven.parquet")
    wrong = pa.table({"text": ["x", "y"], "label": [0, 7]}, schema=table.schema)
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
