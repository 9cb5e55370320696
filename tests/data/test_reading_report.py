"""What was read, and labels and rows that are silently something else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from datasets import Dataset

from megakd.data.reading_report import read_line, read_warnings
from megakd.data.splits import Splits


def splits(train: Mapping[str, str], held_out: Mapping[str, str] | None = None) -> Splits:
    """Rows of text -> class; an empty class is no label."""
    held_out = {"held": "play"} if held_out is None else held_out
    names = tuple(sorted({*train.values(), *held_out.values()} - {""}))

    def rows(of: Mapping[str, str]) -> Dataset:
        labels = [names.index(label) if label else -100 for label in of.values()]
        return Dataset.from_dict({"text": [*of], "label": labels})

    return Splits(rows(train), rows(held_out), None, names, ("accuracy",), "hash")


PLAIN = {f"{word} {n}": word for n in range(3) for word in ("play", "stop")}


def warnings_of(given: Splits, rows: int = 1) -> list[str]:
    return [*read_warnings(given, step_rows=rows)]


def test_the_line_has_rows_labels_classes_and_splits():
    line = read_line(splits({**PLAIN, "play 4": "play", "a": "", "b": ""}))

    assert line == "train 9 rows, 7 labelled, 2 classes of 3 to 4 rows; validation 1"


def test_rows_as_they_should_be_have_no_warning():
    assert warnings_of(splits(PLAIN), rows=6) == []


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


def test_a_class_with_a_comma_in_its_name_is_none_of_several():
    assert warnings_of(splits({**PLAIN, "x": "red, hot", "y": "red, hot"})) == []


def test_training_rows_that_are_held_out_too_are_counted():
    (message,) = warnings_of(splits(PLAIN, {"play 1": "play", "new": "stop"}))

    assert message.startswith("1 of the 2 held-out rows are training rows too")


def test_fewer_rows_than_a_step_are_told():
    (message,) = warnings_of(splits(PLAIN), rows=32)

    assert "the 6 training rows are fewer than the 32 of a step" in message
