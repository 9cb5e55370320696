"""Rows of a notebook shrink a model, and teach a student, in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Value

import megakd
from megakd.data.in_memory import file_of_rows

SHORT = [
    *("train.max_steps=2", "train.num_train_epochs=null", "train.per_device_train_batch_size=4"),
    *("teacher.finetune.max_steps=2", "task.max_length=24", "eval.latency=false", "baselines=[]"),
]


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


ROWS = [{"text": "fine", "label": "good"}, {"text": None, "label": "bad"}]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        pd.DataFrame([{"text": "fine", "label": "good"}, {"text": float("nan"), "label": "bad"}]),
        Dataset.from_list(
            [{"text": "fine", "label": 1}, {"text": None, "label": 0}],
            features=Features(text=Value("string"), label=ClassLabel(names=["bad", "good"])),
        ),
    ],
    ids=["list", "data frame", "data set"],
)
def test_rows_are_a_file_that_is_named_by_its_content_and_written_once(tmp_path, rows):
    path = file_of_rows(rows, tmp_path)

    assert lines(path) == ROWS
    before = Path(path).stat().st_mtime_ns
    assert file_of_rows(rows, tmp_path) == path
    assert Path(path).stat().st_mtime_ns == before
    assert file_of_rows(ROWS[:1], tmp_path) != path
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no row"),
        (7, "is a int; give a path"),
        (["a text"], "row 1 is a str; a row is a mapping"),
        ([{"text": "a", "label": {1, 2}}], "row 1 holds a set"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, rows, message):
    with pytest.raises(megakd.MegakdError, match=message):
        file_of_rows(rows, tmp_path)

    assert [*tmp_path.glob("data-*")] == []


def test_two_sizes_or_none_are_refused_before_anything_is_written(tmp_path):
    for size in ({}, {"speedup": "2x", "parameters": "1M"}):
        with pytest.raises(megakd.MegakdError, match="the size of the student is one of"):
            megakd.shrink("model", data=ROWS, output_dir=tmp_path / "out", **size)

    assert not (tmp_path / "out").exists()
