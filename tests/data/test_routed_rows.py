"""Rows that name their teachers, from files to micro-batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import unpack
from tiny_runs import SENTENCES, save_tokenizer, write_jsonl
from transformers import AutoTokenizer

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.batch import ROUTE, teacher_number
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.splits import Splits, load_splits
from megakd.data.token_tables import PackedRow
from megakd.errors import DataError
from megakd.teachers.rollouts import Prompts

NAMES = ("math", "code")
MATH, CODE = map(teacher_number, NAMES)


def texts() -> list[dict[str, Any]]:
    words = [f"{SENTENCES[n % 4]} {n} " * (1 + n % 3) for n in range(30)]
    return [
        {"text": text, "expert": NAMES[n % 3 == 0], "label": n % 2} for n, text in enumerate(words)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [row["text"] for row in texts()]
    return AutoTokenizer.from_pretrained(save_tokenizer(folder, words, kind="wordpiece"))


def splits_of(folder: Path, rows: list[dict[str, Any]] | None = None, **keys: Any) -> Splits:
    data = write_jsonl(folder / "train.jsonl", texts() if rows is None else rows)
    held = write_jsonl(folder / "held.jsonl", [{"text": "the cat", "label": 0}])
    files = {"train_files": str(data), "validation_files": str(held), "teacher_column": "expert"}
    return load_splits(TaskConfig(**{**files, **keys}), seed=0, cache_dir=folder / "cache")


def encoded(folder: Path, tokenizer: Any, rows: Any = None, **keys: Any) -> Encoded:
    splits = splits_of(folder, rows, **keys)
    task = TaskConfig(**{"dataset": "none", "max_length": 16, **keys})
    return encode_splits(splits, tokenizer, task, cache_dir=folder / "cache")


def test_only_training_rows_have_teachers(tmp_path):
    splits = splits_of(tmp_path, type="classification", max_length=16)

    assert Counter(splits.train[ROUTE]) == {"math": 20, "code": 10}
    assert ROUTE not in splits.validation.column_names
    assert splits.train[0]["place"] == "train.jsonl, line 1"
    cut = splits_of(tmp_path, type="causal_lm", validation_files=None)
    assert set(cut.validation.column_names) == {"text"}
    assert ROUTE in cut.train.column_names


def test_a_name_of_a_teacher_that_no_file_can_hold_is_a_bad_row(tmp_path):
    rows = [*texts(), {"text": "the dog", "label": 1, "expert": "\ud800"}]
    with pytest.raises(DataError, match=r"line 31: column 'expert' is not UTF-8"):
        splits_of(tmp_path, rows, type="mlm")

    assert len(splits_of(tmp_path, rows, type="mlm", bad_rows="drop").train) == 30


@pytest.mark.parametrize("task", ["causal_lm", "mlm"])
def test_every_packed_row_and_every_window_has_texts_of_one_teacher(tmp_path, tokenizer, task):
    train = encoded(tmp_path, tokenizer, type=task).train
    assert {*train[ROUTE]} == {MATH, CODE}

    for number, name in ((MATH, "math"), (CODE, "code")):
        rows = [row for row in train if row[ROUTE] == number]
        if task == "causal_lm":
            columns = ([np.array(row[key]) for key in PackedRow._fields] for row in rows)
            parts = unpack(PackedRow(*values) for values in columns)
        else:
            parts = (row["input_ids"] for row in rows)
        actual = " ".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in parts)
        assert actual.split() == [
            word for row in texts() if row["expert"] == name for word in row["text"].lower().split()
        ]


def test_another_teacher_of_a_row_is_another_data_set(tmp_path, tokenizer):
    rows = texts()
    changed = [*rows[:-1], {**rows[-1], "expert": "code"}]

    one, other = (
        encoded(tmp_path / name, tokenizer, of_name, type="classification").train
        for name, of_name in {"a": rows, "b": changed}.items()
    )

    files = [part.cache_files[0]["filename"] for part in (one, other)]
    assert len({Path(file).parent.name for file in files}) == 2
    assert one["label"] == other["label"]
    assert one[ROUTE][:-1] == other[ROUTE][:-1]


def test_a_prompt_keeps_its_teacher(tmp_path, tokenizer):
    rows = [{"prompt": "say", "completion": " it", "expert": NAMES[n % 2]} for n in range(4)]
    held = str(write_jsonl(tmp_path / "more.jsonl", rows[:2]))
    encoding = encoded(tmp_path, tokenizer, rows, type="causal_lm", validation_files=held)

    prompts = Prompts(encoding.train, prompt_tokens=None, most=64)

    assert prompts.routes.tolist() == [MATH, CODE, MATH, CODE]
    assert Prompts(encoding.validation, prompt_tokens=None, most=64).routes is None


def test_a_column_that_one_source_lacks_is_named(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    parts = {
        name: MixtureSource(files=str(write_jsonl(tmp_path / f"{name}.jsonl", [one])), weight=1.0)
        for name, one in {"named": row | {"expert": "math"}, "bare": row}.items()
    }
    task = TaskConfig(type="causal_lm", mixture=parts, teacher_column="expert")

    with pytest.raises(DataError, match=r"bare\.jsonl: column 'expert' \(task\.teacher_column\)"):
        load_splits(task, seed=0, cache_dir=tmp_path / "cache")
