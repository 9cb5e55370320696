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
from megakd.contract.batch import ROUTE, teacher_number
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.splits import Splits, load_splits
from megakd.data.token_tables import PackedRow
from megakd.errors import DataError
from megakd.rollouts.prompts import Prompts

NAMES = ("math", "code")
MATH, CODE = map(teacher_number, NAMES)


def texts(count: int = 30) -> list[dict[str, Any]]:
    return [
        {
            "text": f"{SENTENCES[n % 4]} {n} " * (1 + n % 3),
            "expert": NAMES[n % 3 == 0],
            "label": n % 2,
        }
        for n in range(count)
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


def encoded(folder: Path, tokenizer: Any, rows: list[dict[str, Any]] | None = None, **keys: Any):
    splits = splits_of(folder, rows, **keys)
    task = TaskConfig(**{"dataset": "none", "max_length": 16, **keys})
    made: Encoded = encode_splits(splits, tokenizer, task, cache_dir=folder / "cache")
    return made, task


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


def test_every_packed_row_has_the_documents_of_one_teacher(tmp_path, tokenizer):
    made, _ = encoded(tmp_path, tokenizer, type="causal_lm")

    for number, name in ((MATH, "math"), (CODE, "code")):
        routed = [row for row in made.train if row[ROUTE] == number]
        parts = [PackedRow(*(np.array(row[key]) for key in PackedRow._fields)) for row in routed]
        result = [tokenizer.decode(ids, skip_special_tokens=True) for ids in unpack(parts)]
        plain = [tokenizer(row["text"])["input_ids"] for row in texts() if row["expert"] == name]
        assert result == [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]
    assert {row[ROUTE] for row in made.train} == {MATH, CODE}


def test_windows_of_a_text_have_the_teacher_of_the_text(tmp_path, tokenizer):
    made, _ = encoded(tmp_path, tokenizer, type="mlm")
    assert len(made.train) > len(texts())

    for number, name in ((MATH, "math"), (CODE, "code")):
        windows = [row["input_ids"] for row in made.train if row[ROUTE] == number]
        plain = [tokenizer(row["text"])["input_ids"] for row in texts() if row["expert"] == name]
        assert sum(len(ids) - 2 for ids in windows) == sum(len(ids) - 2 for ids in plain)


def test_another_teacher_of_a_row_is_another_data_set(tmp_path, tokenizer):
    rows = texts()
    changed = [*rows[:-1], {**rows[-1], "expert": "code"}]

    made = [
        encoded(tmp_path / name, tokenizer, given, type="classification")[0]
        for name, given in {"a": rows, "b": changed}.items()
    ]

    files = [part.train.cache_files[0]["filename"] for part in made]
    assert len({Path(file).parent.name for file in files}) == 2
    assert made[0].train["label"] == made[1].train["label"]
    assert made[0].train[ROUTE][:-1] == made[1].train[ROUTE][:-1]


def encoded_pairs(folder: Path, tokenizer: Any, count: int) -> tuple[Encoded, TaskConfig]:
    """Prompts and answers of both teachers by turns."""
    rows = [
        {"prompt": f"say {n}", "completion": f" {SENTENCES[n % 4]}", "expert": NAMES[n % 2]}
        for n in range(count)
    ]
    held = str(write_jsonl(folder / "more.jsonl", rows[:2]))
    return encoded(folder, tokenizer, rows, type="causal_lm", validation_files=held)


def test_a_prompt_keeps_its_teacher(tmp_path, tokenizer):
    made, _ = encoded_pairs(tmp_path, tokenizer, 4)

    prompts = Prompts(made.train, prompt_tokens=None, most=64)

    assert prompts.routes.tolist() == [MATH, CODE, MATH, CODE]
    assert Prompts(made.validation, prompt_tokens=None, most=64).routes is None


def test_a_column_that_one_source_lacks_is_named(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    parts = {
        name: MixtureSource(files=str(write_jsonl(tmp_path / f"{name}.jsonl", [given])), weight=1.0)
        for name, given in {"named": row | {"expert": "math"}, "bare": row}.items()
    }
    task = TaskConfig(type="causal_lm", mixture=parts, teacher_column="expert")

    with pytest.raises(DataError, match=r"bare\.jsonl: column 'expert' \(task\.teacher_column\)"):
        load_splits(task, seed=0, cache_dir=tmp_path / "cache")
