"""Mixtures: exact shares of every source, chosen by config and seed alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import asked, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_jsonl

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.encoding import encode_splits
from megakd.data.mixture import rows_of_sources
from megakd.data.splits import Splits, load_splits
from megakd.errors import DataError

ROWS = {
    "chat": [{"messages": asked(f"Question {n}", "Answer")} for n in range(30)],
    "pairs": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)],
    "books": [{"text": f"a long text with the number {n}. " * 5} for n in range(12)],
}


def task(folder: Path, **weights: float) -> TaskConfig:
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", ROWS[name])) for name in weights}
    parts = {n: MixtureSource(files=files[n], weight=weight) for n, weight in weights.items()}
    held = str(write_jsonl(folder / "held.jsonl", [{"messages": asked("Hi", "Hello")}]))
    return TaskConfig(type="causal_lm", mixture=parts, validation_files=held, max_length=32)


def splits_of(folder: Path, *, seed: int = 0, **weights: float) -> Splits:
    return load_splits(task(folder, **weights), seed=seed, cache_dir=folder / "cache")


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10)), min_size=1, max_size=5))
def test_an_epoch_has_the_shares_of_the_weights_and_every_row(sources):
    sizes, weights = (np.array(column) for column in zip(*sources, strict=True))

    counts = rows_of_sources(sizes, weights)

    assert (counts >= sizes).all()
    assert (counts == sizes).any()
    exact = weights * (sizes / weights).max()
    assert (np.abs(counts - exact) <= 0.5 + 1e-6).all()


def test_sources_of_all_shapes_are_mixed_by_weight(tmp_path):
    splits = splits_of(tmp_path, chat=0.5, pairs=0.3, books=0.2)

    result = Counter(splits.train["source"])
    assert result == {"chat": 30, "pairs": 18, "books": 12}
    pairs = Counter(
        t for t, s in zip(splits.train["text"], splits.train["source"], strict=True) if s == "pairs"
    )
    assert set(pairs.values()) == {2}


def test_the_rows_of_an_epoch_depend_on_the_seed_and_the_weights_alone(tmp_path):
    weights = {"chat": 0.6, "pairs": 0.4}
    first, again, other = (splits_of(tmp_path, seed=seed, **weights) for seed in (1, 1, 2))

    assert first.train["text"][:] == again.train["text"][:]
    assert first.train["text"][:] != other.train["text"][:]
    hashes = {s.content_hash for s in (first, again, other, splits_of(tmp_path, chat=1, pairs=1))}
    assert len(hashes) == 3


def test_the_table_has_a_line_for_every_source(tmp_path):
    splits, tokenizer = (
        splits_of(tmp_path, chat=0.5, books=0.5),
        chat_tokenizer("chatml", merges=False),
    )
    mixed = task(tmp_path, chat=0.5, books=0.5)

    encoded = encode_splits(splits, tokenizer, mixed, cache_dir=tmp_path / "cache")

    assert list(encoded.chat) == ["train/chat", "train/books", "validation"]
    assert encoded.chat["train/books"].kept > encoded.chat["train/books"].rows == 30
    assert encoded.train.column_names == ["input_ids", "labels", "prompt_length"]


def test_a_file_in_two_sources_is_refused(tmp_path):
    given = task(tmp_path, chat=0.5, pairs=0.5)
    assert given.mixture
    twice: dict[str, Any] = {"a": given.mixture["chat"], "b": given.mixture["chat"]}

    with pytest.raises(DataError, match=r"task\.mixture\.b\.files.*task\.mixture\.a\.files"):
        load_splits(
            TaskConfig(type="causal_lm", mixture=twice), seed=0, cache_dir=tmp_path / "cache"
        )
