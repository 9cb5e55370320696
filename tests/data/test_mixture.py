"""Mixtures: exact shares of every source, chosen by config and seed alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import asked, chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_jsonl

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.chat.counts import ChatCounts
from megakd.data.encoding import Encoded, encode_splits, mixed, rows_of_sources
from megakd.data.splits import load_splits
from megakd.errors import DataError

TOKENIZER = chat_tokenizer("chatml", merges=False)
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


def encoded_of(folder: Path, *, seed: int = 0, **weights: float) -> Encoded:
    """The rows of an epoch."""
    given, cache = task(folder, **weights), folder / "cache"
    splits = load_splits(given, seed=seed, cache_dir=cache)
    encoded = encode_splits(splits, TOKENIZER, given, cache_dir=cache)
    return mixed(encoded, given.mixture or {}, seed=seed)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 10)), min_size=1, max_size=5))
def test_an_epoch_has_the_shares_of_the_weights_and_every_row(sources):
    sizes, weights = (np.array(column) for column in zip(*sources, strict=True))

    counts = rows_of_sources(sizes, weights)

    assert (counts >= sizes).all()
    assert (counts == sizes).any()
    exact = weights * (sizes / weights).max()
    assert (np.abs(counts - exact) <= 0.5 + 1e-6).all()


def test_rows_are_mixed_by_weight_as_they_are_encoded(tmp_path):
    """A document of a book is cut into several rows, and each counts."""
    encoded = encoded_of(tmp_path, chat=0.5, pairs=0.3, books=0.2)

    assert list(encoded.chat) == ["train/chat", "train/pairs", "train/books", "validation"]
    assert encoded.train.column_names == ["input_ids", "labels", "prompt_length"]
    tally = encoded.chat["train/books"]
    assert (tally.rows, encoded.chat["train/chat"].kept) == (12, 30)
    assert tally.kept > 4 * tally.rows
    total = tally.kept / 0.2  # the books have the most rows for their weight
    signs = {"chat": "Question", "pairs": " + 1 ="}
    texts = TOKENIZER.batch_decode(encoded.train["input_ids"][:])
    sources = Counter(next((n for n in signs if signs[n] in text), "books") for text in texts)
    expected = {"chat": round(0.5 * total), "pairs": round(0.3 * total), "books": tally.kept}
    assert sources == expected
    counts = Counter(map(tuple, encoded.train["input_ids"][:]))
    assert len(counts) >= 30 + 9 + 12
    lengths = [len(ids) for ids in encoded.train["input_ids"][:]]
    assert encoded.tokens_per_row == pytest.approx(sum(lengths) / len(lengths), rel=0.02)


def test_the_rows_of_an_epoch_depend_on_the_seed_and_the_weights_alone(tmp_path):
    weights = {"chat": 0.6, "pairs": 0.4}
    first, again, other = (encoded_of(tmp_path, seed=seed, **weights) for seed in (1, 1, 2))

    assert first.train["input_ids"][:] == again.train["input_ids"][:]
    assert first.train["input_ids"][:] != other.train["input_ids"][:]
    hashes = {s.content_hash for s in (first, again, other, encoded_of(tmp_path, chat=1, pairs=1))}
    assert len(hashes) == 3


def test_a_source_whose_rows_are_all_left_out_is_refused(tmp_path):
    given = task(tmp_path, chat=0.5, pairs=0.5)
    tally = {"train/chat": ChatCounts(rows=9, kept=9), "train/pairs": ChatCounts(rows=3)}
    encoded: Any = SimpleNamespace(chat=tally)

    with pytest.raises(DataError, match=r"task\.mixture\.pairs: no row is left .* 3 of its rows"):
        mixed(encoded, given.mixture or {}, seed=0)


def test_a_file_in_two_sources_is_refused(tmp_path):
    source = task(tmp_path, chat=0.5).mixture["chat"]
    twice = TaskConfig(type="causal_lm", mixture={"a": source, "b": source})

    with pytest.raises(DataError, match=r"task\.mixture\.b\.files.*task\.mixture\.a\.files"):
        load_splits(twice, seed=0, cache_dir=tmp_path / "cache")
