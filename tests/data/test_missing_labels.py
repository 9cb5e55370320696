"""The line of a split that counts its rows without a label."""

from __future__ import annotations

import math

import pytest


@pytest.mark.parametrize(
    ("kind", "labels", "line", "level"),
    [
        ("csv", ["b", "nan", "a", "NaN"], "2 of 4 rows have no label (1 say 'nan', 1 sa", "W"),
        ("csv", ["1", "", "0", "-100"], "train.csv: 2 of 4 rows have no label", "INFO"),
        ("jsonl", ["a", None, "b", "a"], "train.jsonl: 1 of 4 rows have no label", "INFO"),
        ("jsonl", [0.5, math.nan, -100, 1], "train.jsonl: 1 of 4 rows have no label", "INFO"),
        (
            "csv",
            ["0.5", "NaN", "-100", ""],
            "2 of 4 rows have no label (1 say 'NaN', which",
            "WARN",
        ),
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


def test_every_split_and_evaluation_set_counts_its_rows_without_a_label(
    load, write_rows, tmp_path, caplog
):
    names = ("train", "validation", "test", "hard")
    for count, name in enumerate(names, start=1):
        rows = [("a", "yes"), ("b", "no"), *((f"{n}", "nan") for n in range(count))]
        write_rows(tmp_path / f"{name}.csv", rows)

    load(tmp_path, evaluation_sets={"hard": str(tmp_path / "hard.csv")})

    for count, name in enumerate(names, start=1):
        line = f"{name}.csv: {count} of {count + 2} rows have no label ({count} say 'nan'"
        assert caplog.text.count(line) == 1
