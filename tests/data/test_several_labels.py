"""Rows with any number of labels, and the answers of a teacher of one's own, as they are read."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from tiny_runs import config_tree, write_jsonl

from megakd.config.file import config_of
from megakd.data.labels import Classes, class_word
from megakd.data.python_rows import file_of_rows
from megakd.data.readers import files_table
from megakd.data.records import Record
from megakd.data.rows import is_labelled
from megakd.data.splits import Splits, load_splits, read_line, read_warnings
from megakd.errors import MegakdError

NAMES = ("anger", "joy", "love")
SETS: dict[str, list[str] | None] = {
    "a": ["joy"],
    "b": ["love", "anger"],
    "c": [],
    "d": None,
    "e": ["joy", "love", "joy"],
}
HOT = [[0, 1, 0], [1, 0, 1], [0, 0, 0], [-100] * 3, [0, 1, 1]]
LISTS = [{"text": text, "labels": labels} for text, labels in SETS.items()]
HELD = [{"text": "held", "labels": ["joy"]}]


def splits_of(folder: Path, train: Any, held: Any = HELD, **keys: Any) -> Splits:
    """The rows of two files, jsonl or, if they are texts, csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", held)):
        if isinstance(rows, str):
            (folder / f"{name}.csv").write_text(rows, encoding="utf-8")
        else:
            write_jsonl(folder / f"{name}.jsonl", rows)
    task = {"type": "classification", "dataset": str(folder), **keys}
    method = {"name": "single" if "soft_labels" in keys else "finetune"}
    config = config_of(config_tree(folder / "out", task, method=method))
    return load_splits(config.task, seed=0, cache_dir=folder / "cache")


def labels_of(splits: Splits) -> list[list[int]]:
    return np.asarray(splits.train["label"]).tolist()


def test_lists_of_words_become_a_number_for_every_class(tmp_path):
    splits = splits_of(tmp_path, LISTS)

    assert splits.multi_label
    assert (splits.label_names, labels_of(splits)) == (NAMES, HOT)
    assert is_labelled(splits.train).tolist() == [True, True, True, False, True]
    assert splits.metrics == ("f1_micro",)


def test_words_in_one_cell_are_joined_by_a_separator(tmp_path):
    cells = {"a": "joy", "b": '"love, anger"', "c": "", "d": "-100", "e": '"joy,love,"'}
    table = "text,label\n" + "".join(f"{text},{cell}\n" for text, cell in cells.items())

    splits = splits_of(tmp_path, table, "text,label\nheld,joy\n", label_separator=",")

    assert (splits.label_names, labels_of(splits)) == (NAMES, HOT)


def test_several_columns_are_a_label_each_in_their_order(tmp_path):
    rows = ["a,0,1,0", "b,1,0,1", "c,0,0,0", "d,,,", "e,false,1.0,TRUE"]
    head = "text,anger,joy,love\n"

    splits = splits_of(
        tmp_path, head + "\n".join(rows), f"{head}held,0,1,0\n", label_column=list(NAMES)
    )

    assert (splits.label_names, labels_of(splits)) == (NAMES, HOT)


def bits(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "labels": one} for n, one in enumerate(labels)]


@pytest.mark.parametrize(
    "kind",
    [
        int,
        float,
        bool,
        str,
    ],
)
def test_lists_of_zeros_and_ones_say_which_labels_a_row_has(tmp_path, kind):
    rows = [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
    train = bits(*([kind(bit) for bit in row] for row in rows), None)

    splits = splits_of(tmp_path, train, train[1:2], labels=NAMES)

    assert (splits.label_names, labels_of(splits)) == (NAMES, [*rows, [-100] * 3])
    assert splits.validation["label"] == [[0, 1, 1]]


def test_zeros_and_ones_in_one_cell_are_lists_of_them(tmp_path):
    keys = {"labels": NAMES, "label_separator": ","}
    train = bits("1,0,0", "0, 1, 1", "", "[0, 0, 0]")

    splits = splits_of(tmp_path, train, bits("0,0,1"), **keys)

    assert labels_of(splits) == [[1, 0, 0], [0, 1, 1], [-100] * 3, [0, 0, 0]]
    assert splits.validation["label"] == [[0, 0, 1]]


def test_a_name_may_look_like_a_list_where_a_row_has_one_label(tmp_path):
    splits = splits_of(
        tmp_path, bits("[18, 25]", "[25, 40)", "('a')"), bits("[18, 25]"), multi_label=False
    )

    assert splits.label_names == ("('a')", "[18, 25]", "[25, 40)")


def test_lists_of_label_numbers_are_no_zeros_and_ones(tmp_path):
    numbers = [[0], [0, 1], [1, 0], []]

    splits = splits_of(tmp_path, bits(*numbers), bits([0, 1]))

    assert labels_of(splits) == [[1, 0], [1, 1], [1, 1], [0, 0]]
    assert splits.validation["label"] == [[1, 1]]


@pytest.mark.parametrize(
    ("cells", "keys"),
    [
        (["['joy']", "['love', 'anger']", "[]", "", '["joy", "love", "joy"]'], {}),
        (['["joy"]', "('love', 'anger')", "[]", "-100", "{'joy', 'love'}"], {}),
        (["[1]", "[2, 0]", "[]", "", "[1, 2]"], {"labels": NAMES}),
        (
            ["[False, True, False]", "[1, 0, 1]", "[0, 0, 0]", "", "[0.0, 1.0, 1.0]"],
            {"labels": NAMES},
        ),
        (["joy", "['love', 'anger']", "[]", "-100", "joy,love"], {"label_separator": ","}),
    ],
)
def test_lists_that_a_table_holds_as_texts_are_lists(tmp_path, cells, keys):
    splits = splits_of(tmp_path, bits(*cells), bits(cells[0]), **keys)

    assert (splits.label_names, labels_of(splits)) == (NAMES, HOT)


def test_brackets_alone_make_no_list(tmp_path):
    splits = splits_of(tmp_path, bits("[joy]", "(love)", "[18, 25)", "(25, 40]"), bits("[joy]"))

    assert not splits.multi_label
    assert splits.label_names == ("(25, 40]", "(love)", "[18, 25)", "[joy]")


def test_a_separator_that_no_cell_contains_is_told_with_the_one_that_many_contain(tmp_path, caplog):
    train = bits("joy,love", "joy,anger", "love")

    splits = splits_of(tmp_path, train, bits("love"), label_separator=";")

    line = "no cell contains ';' (task.label_separator), 2 contain ','"
    assert caplog.text.count(line) == 1
    assert not any(
        "set task.label_separator" in line for line in read_warnings(splits, step_rows=1)
    )


def test_a_bad_row_with_several_labels_is_left_out(tmp_path):
    splits = splits_of(
        tmp_path,
        [*LISTS, {"text": "odd", "labels": ["joy", "surprise"]}],
        labels=NAMES,
        bad_rows="drop",
    )

    assert labels_of(splits) == HOT


@pytest.mark.parametrize("key", ["validation", "evaluation_sets"])
@pytest.mark.parametrize(
    ("train", "held", "text"),
    [
        (bits("joy", "love"), bits(["joy"], ["love"]), None),
        (bits("joy", "love"), bits(["joy"], ["joy", "love"]), "line 2: label ['joy', 'love'] in"),
        (LISTS, bits([0, 1, 0]), "for each label"),
        (LISTS, bits("joy"), "line 1: label 'joy' in column 'labels' stands beside lists of labe"),
        (
            bits("joy", "love"),
            bits("joy", "fear"),
            "line 2: label 'fear' is not one of the 2 classes of the training rows (joy, love); "
            "correct it, or name all labels in task.labels",
        ),
    ],
)
def test_held_out_labels_of_another_form_are_read_or_refused(tmp_path, key, train, held, text):
    other = write_jsonl(tmp_path / "other.jsonl", held)
    keys = {"evaluation_sets": {"other": str(other)}} if key == "evaluation_sets" else {}

    def read() -> Splits:
        return splits_of(tmp_path, train, train[:1] if keys else held, **keys)

    if text is None:
        splits = read()
        rows = splits.evaluation_sets["other"] if keys else splits.validation
        assert rows["label"] == [0, 1]
    else:
        with pytest.raises(MegakdError, match=re.escape(text)):
            read()


def test_whole_decimals_are_classes(tmp_path):
    labels = [Decimal("0.00"), Decimal("1.00"), None]
    rows = Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": labels},
        features=Features({"text": Value("string"), "label": Value("decimal128(4, 2)")}),
    )
    for name in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    task = {"type": "classification", "dataset": str(tmp_path)}
    config = config_of(config_tree(tmp_path / "out", task))

    splits = load_splits(config.task, seed=0, cache_dir=tmp_path / "cache")

    assert (splits.label_names, splits.train["label"]) == (("0", "1"), [0, 1, -100])


@pytest.mark.parametrize("of", [float, lambda n: str(float(n)), str, Decimal])
def test_a_whole_number_of_any_type_is_a_class(of):
    assert (
        Classes(("0", "1"), numbered=True).number(
            class_word("rows", "label", Record("row 1", {"label": of(1)})) or ""
        )
        == 1
    )


def test_a_label_without_a_row_is_told(tmp_path):
    splits = splits_of(tmp_path, bits(["joy", "love"], ["joy", "love"]), labels=NAMES)

    assert [line for line in read_warnings(splits, step_rows=1) if "no training row" in line] == [
        '1 classes have no training row: "anger" (0 rows); the model never learns them: check the '
        "names in task.labels, or add rows"
    ]


def test_named_labels_set_the_order(tmp_path):
    splits = splits_of(tmp_path, LISTS, labels=["love", "joy", "anger", "fear"])

    assert splits.label_names == ("love", "joy", "anger", "fear")
    assert labels_of(splits)[1] == [1, 0, 1, 0]


def test_lists_of_classes_keep_the_names_that_a_file_stores(tmp_path):
    kind = Features({"text": Value("string"), "labels": List(ClassLabel(names=["x", *NAMES]))})
    data = {"text": ["a", "b"], "labels": [[3, 1], []]}
    rows = Dataset.from_dict(data, features=kind)
    for name in ("train", "validation"):
        rows.to_parquet(tmp_path / f"{name}.parquet")
    task = {"type": "classification", "dataset": str(tmp_path)}
    config = config_of(config_tree(tmp_path / "out", task))

    splits = load_splits(config.task, seed=0, cache_dir=tmp_path / "cache")

    assert splits.label_names == ("x", *NAMES)
    assert labels_of(splits) == [[0, 1, 0, 1], [0] * 4]
    table = files_table([Path(file_of_rows(rows, tmp_path / "rows"))], "data")
    assert [
        record.values["labels"] for record in table.records() if isinstance(record, Record)
    ] == [["love", "anger"], []]
    assert table.class_names == {"labels": ("x", *NAMES)}


def test_rows_are_held_out_and_lose_labels_as_any_rows_do(tmp_path):
    rows = [{"text": f"text {n}", "labels": list(NAMES[: n % 4])} for n in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"type": "classification", "dataset": str(path), "labelled_examples": 50}
    config = config_of(config_tree(tmp_path / "out", task))

    splits = load_splits(config.task, seed=0, cache_dir=tmp_path / "cache")

    assert 2 <= len(splits.validation) <= 20
    assert is_labelled(splits.train).sum() == 50
    assert splits.multi_label


def test_the_line_has_the_labels_of_a_row(tmp_path):
    line = read_line(splits_of(tmp_path, LISTS))

    assert line == (
        "train 5 rows, 4 labelled, 3 classes of 1 to 2 rows, 1.25 labels a row; validation 1"
    )


SOFT = [{"text": "a", "label": "joy"}, {"text": "b", "label": "love"}]


@pytest.mark.parametrize(
    "values", [([0.25, 0.75], [0.995, 0.0]), ({"love": 0.75, "joy": 0.25}, "[0.995, 0]")]
)
def test_probabilities_are_read_by_place_or_by_name_and_sum_to_one(tmp_path, values):
    train = [{**row, "p": value} for row, value in zip(SOFT, values, strict=True)]

    splits = splits_of(tmp_path, train, SOFT, soft_labels="p")

    assert np.allclose(splits.train["soft_label"], [[0.25, 0.75], [1.0, 0.0]])
    assert splits.validation.column_names == ["text", "label"]


def test_probabilities_of_several_labels_need_no_sum(tmp_path):
    train = [{**row, "p": {"anger": 0.9, "joy": 0.8, "love": 0}} for row in LISTS]

    splits = splits_of(tmp_path, train, soft_labels="p")

    assert np.allclose(splits.train["soft_label"], [[0.9, 0.8, 0.0]] * 5)


def test_training_rows_with_soft_labels_need_no_column_of_labels(tmp_path):
    train = [{"text": row["text"], "p": [0.25, 0.75]} for row in SOFT]

    splits = splits_of(tmp_path, train, SOFT, soft_labels="p", labels=["joy", "love"])

    assert np.allclose(splits.train["soft_label"], [[0.25, 0.75]] * 2)
    assert not is_labelled(splits.train).any()
    assert splits.validation["label"] == [0, 1]
    for held, keys, text in (
        (SOFT, {}, "name the labels in task.labels"),
        (train, {"labels": ["joy", "love"]}, "column 'label' (task.label_column) does not exist"),
    ):
        with pytest.raises(MegakdError, match=re.escape(text)):
            splits_of(tmp_path / text[:4], train, held, soft_labels="p", **keys)


def soft(*values: Any, lists: bool = False) -> list[dict[str, Any]]:
    rows = LISTS if lists else SOFT
    return [{**row, "p": value} for row, value in zip(rows, values, strict=False)]


@pytest.mark.parametrize(
    ("train", "keys", "text"),
    [
        (
            [*LISTS, {"text": "f", "labels": "joy"}],
            {},
            "'joy' in column 'labels' stands beside lists of labels",
        ),
        (
            [*SOFT, {"text": "f", "label": ["joy", "love"]}],
            {},
            "line 3: label ['joy', 'love'] in column 'label' is not a class; a class is a whole",
        ),
        (
            bits([1, 0, 0], [0, 1, 1]),
            {},
            "3 zeros and ones, one for each label; name these 3 labels in task.labels, in the",
        ),
        (bits([1, 0, 0, 0], [0, 1, 1, 0]), {"labels": NAMES}, "of the lists (it names 3)"),
        (bits("[1, 0, 0]", "[0, 1, 1]"), {}, "of the lists (it is not set)"),
        (
            bits([1, 0, 0], [0, 1, 1], [1, 0, 2]),
            {"labels": NAMES},
            "line 3: label 'love' of the list [1, 0, 2] must be 0 or 1 (got 2); a row whose",
        ),
        (
            bits([1, 0, 0], [0, 1, 1], [1, 0]),
            {"labels": NAMES},
            "line 3: label [1, 0] in column 'labels' is not a list of 3 zeros and ones",
        ),
        (bits("['joy' 'love']"), {}, 'looks like a list, but is neither JSON nor Python; write ["'),
        (
            bits("[0 1]", "[1 0]"),
            {},
            "line 1: label '[0 1]' in column 'labels' looks like a list, but",
        ),
        (bits("[ True False]"), {}, "line 1: label '[ True False]' in column 'labels' looks like"),
        (bits("[joy, love]"), {}, "line 1: label '[joy, love]' in column 'labels' looks like a l"),
        (bits("joy", "['joy', 'love']"), {}, "line 2: label \"['joy', 'love']\" is a list beside"),
        (bits(["joy", None], ["love"]), {}, "the list ['joy', None] in column 'labels' has an em"),
        (
            bits([0, -1], [1, 0, 2]),
            {"labels": NAMES},
            "line 1: label -1 in a list means no label; remove it",
        ),
        (bits({"joy": 1}, "joy"), {}, "line 1: label {'joy': 1} in column 'labels' is not a class"),
        ([*LISTS, {"text": "f", "labels": [""]}], {}, "has an empty label; remove it"),
        (
            bits("a,b", 3),
            {"label_separator": ","},
            "label 3 in column 'labels' stands beside texts",
        ),
        (LISTS, {"labels": ["joy", "love"]}, "'anger' is not one of the 2 classes of this data"),
        (LISTS, {"label_column": ["labels", "text"]}, "column 'labels' (task.label_column) must"),
        (LISTS, {"label_column": ["labels", "x"]}, "column 'x' (task.label_column) does not exist"),
        (LISTS, {"multi_label": False}, "(where a row has several, every row has a list)"),
        (
            LISTS,
            {"label_separator": "/", "labels": ["joy/love", "anger"]},
            "task.label_separator: '/' is part of the label 'joy/love' in task.labels; use another",
        ),
        (LISTS, {"soft_labels": "q"}, "column 'q' (task.soft_labels) does not exist"),
        (soft([0.5, 0.4], [1, 0]), {}, "line 1: soft labels (task.soft_labels) sum to 0.9, and"),
        (soft([1, 0], [0.2, 0.3, 0.5]), {}, "line 2: soft labels (task.soft_labels) are 3 numbers"),
        (soft([1, 0], None), {}, "line 2: column 'p' (task.soft_labels) is empty, and every"),
        (soft([1, 0], [1.5, -0.5]), {}, "'joy' has 1.5, which is no probability from 0 to 1; appl"),
        (soft({"joy": 1}, [1, 0]), {}, "line 1: soft labels (task.soft_labels): 'love' has None"),
        (
            soft({"joy": 1, "fun": 0}, [1, 0]),
            {},
            "(task.soft_labels) name 'fun', which is not one of the 2 labels (joy, love)",
        ),
        (
            soft([0, 2.0, 0], [0, 1, 1], lists=True),
            {},
            "'joy' has 2.0, which is no probability from 0 to 1",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_labels_that_cannot_be_meant_are_told_with_their_row(tmp_path, train, keys, text):
    of_soft = {"soft_labels": "p"} if "p" in train[0] else {}
    with pytest.raises(MegakdError) as error:
        splits_of(tmp_path, train, SOFT if "label" in train[0] else HELD, **of_soft, **keys)

    assert text in str(error.value)
    assert "\n" not in str(error.value).replace("\n  ", "")
