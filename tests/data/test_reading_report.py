"""What was read, rows without a label, and labels and rows that are silently something else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from datasets import Dataset

from megakd.data.conversations import ChatColumns
from megakd.data.rows import RowKind
from megakd.data.splits import Splits, read_line, read_warnings

KIND = RowKind("classification", ChatColumns(text=("text",), label="label"))


def splits(train: Mapping[str, str], held_out: Mapping[str, str] | None = None) -> Splits:
    """Rows of text -> class; an empty class is no label."""
    held_out = {"held": "play"} if held_out is None else held_out
    names = tuple(sorted({*train.values(), *held_out.values()} - {""}))

    def rows(of: Mapping[str, str]) -> Dataset:
        labels = [names.index(label) if label else -100 for label in of.values()]
        return Dataset.from_dict({"text": [*of], "label": labels})

    return Splits(rows(train), rows(held_out), None, names, ("accuracy",), "hash", KIND)


PLAIN = {f"{word} {n}": word for n in range(3) for word in ("play", "stop")}


def warnings_of(given: Splits, rows: int = 1) -> list[str]:
    return [*read_warnings(given, step_rows=rows)]


def test_the_line_has_rows_labels_classes_and_splits():
    line = read_line(splits({**PLAIN, "play 4": "play", "a": "", "b": ""}))

    assert line == "train 9 rows, 7 labelled, 2 classes of 3 to 4 rows; validation 1"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"x": "play,stop", "y": "play,stop"}, 'several others in one cell: "play,stop" (2 rows)'),
        ({"x": "PLAY", "y": "PLAY"}, 'the classes "PLAY" (2 rows), "play" (3 rows) differ only in'),
        ({"x": "N/A", "y": "N/A"}, 'the class "N/A" (2 rows): if it stands for no label, empty'),
        ({"x": "rare"}, '1 classes have one training row: "rare" (1 rows)'),
    ],
    ids=["joined", "case", "no label", "one row"],
)
def test_a_label_that_is_silently_something_else_is_told_with_its_rows(more, text):
    (message,) = warnings_of(splits({**PLAIN, **more}))

    assert text in message


@pytest.mark.parametrize("more", [{}, {"x": "red, hot", "y": "red, hot"}])
def test_rows_as_they_should_be_have_no_warning(more):
    assert warnings_of(splits({**PLAIN, **more}), rows=6) == []


@pytest.mark.parametrize(
    ("held_out", "rows", "text"),
    [
        ({"play 1": "play", "new": "stop"}, 6, "1 of the 2 held-out rows are training rows too"),
        (None, 32, "the 6 training rows are fewer than the 32 of a step"),
    ],
)
def test_held_out_rows_of_training_and_fewer_rows_than_a_step_are_told(held_out, rows, text):
    (message,) = warnings_of(splits(PLAIN, held_out), rows=rows)

    assert text in message


@pytest.mark.parametrize(
    ("kind", "labels", "line", "level"),
    [
        ("csv", ["b", "nan", "a", "NaN"], "2 of 4 rows have no label (1 say 'nan', 1 sa", "W"),
        ("csv", ["1", "", "0", "-100"], "train.csv: 2 of 4 rows have no label", "INFO"),
        ("jsonl", ["a", None, "b", "a"], "train.jsonl: 1 of 4 rows have no label", "INFO"),
        ("jsonl", [0.5, math.nan, -100, 1], "train.jsonl: 1 of 4 rows have no label", "INFO"),
        ("csv", ["0.5", "NaN", "-100", ""], "2 of 4 rows have no label (1 say 'NaN', wh", "WARN"),
        ("csv", ["NA", "null", "None", "b"], None, ""),
    ],
)
def test_rows_without_a_label_are_counted_in_one_line(
    load, write_rows, tmp_path, caplog, kind, labels, line, level
):
    """Also where the rows were written by an earlier run."""
    write_rows(tmp_path / f"train.{kind}", list(zip("abcd", labels, strict=True)))
    write_rows(tmp_path / "dev.csv", [("a", labels[0])])
    task = {"type": "regression"} if labels[0] in (0.5, "0.5") else {}

    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            load(tmp_path, **task)

        counted = [record for record in caplog.records if "no label" in record.getMessage()]
        assert len(counted) == (line is not None)
        for record in counted:
            assert line in record.getMessage()
            assert record.levelname.startswith(level)


def test_every_split_and_set_counts_its_rows_without_a_label(load, write_rows, tmp_path, caplog):
    names = ("train", "validation", "test", "hard")
    for count, name in enumerate(names, start=1):
        write_rows(tmp_path / f"{name}.csv", [("a", "yes"), ("b", "no"), *[("c", "nan")] * count])

    load(tmp_path, evaluation_sets={"hard": str(tmp_path / "hard.csv")})

    for count, name in enumerate(names, start=1):
        line = f"{name}.csv: {count} of {count + 2} rows have no label ({count} say 'nan'"
        assert caplog.text.count(line) == 1
