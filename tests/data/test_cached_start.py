"""A second start: what has not changed is not read again, and no key depends on the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import asked, chat_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from tiny_runs import SENTENCES, write_jsonl
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data import arrow as cache
from megakd.data import readers
from megakd.data.arrow import remembered_of, rows_key
from megakd.data.encoding import encode_splits, tokenizer_content
from megakd.data.loader import RowOrder, StepShape
from megakd.data.splits import load_splits
from megakd.data.tokenizers import train_tokenizer
from megakd.process import seals

TEXTS = [{"text": f"text {n:03}", "label": "ab"[n % 2]} for n in range(60)]
CHATS = [{"messages": asked(f"Question {n // 2}", f"Answer {n}")} for n in range(60)]


@pytest.fixture
def counts(tmp_path, monkeypatch) -> dict[str, int]:
    """Count the calls of each function that reads rows; files count as settled at once."""
    monkeypatch.setenv("MEGAKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(seals, "_SETTLED_NS", 0)
    calls: dict[str, int] = {}

    def count(name: str, original: Any, *args: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return original(*args)

    reading = ((readers, "parse_json"), (readers, "sha256_of"), (cache, "_rows_key"))
    for module, name in reading:
        monkeypatch.setattr(module, name, partial(count, name, getattr(module, name)))
    return calls


def start(folder: Path, **keys: Any) -> tuple[list[str], str]:
    """The training texts and the key of the encoded rows."""
    task = TaskConfig(max_length=32, **keys)
    splits = load_splits(task, seed=1, cache_dir=folder / "cache")
    encoded = encode_splits(splits, chat_tokenizer("chatml"), task, cache_dir=folder / "cache")
    return splits.train["text"][:], encoded.train.cache_files[0]["filename"]


@pytest.mark.parametrize(("kind", "rows"), [("classification", TEXTS), ("causal_lm", CHATS)])
def test_a_second_start_reads_no_row_unless_its_memory_is_damaged(tmp_path, counts, kind, rows):
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    first = start(tmp_path, type=kind, dataset=path)
    assert counts["parse_json"] >= 2 * len(rows)
    counts.clear()

    assert start(tmp_path, type=kind, dataset=path) == first
    assert not counts
    for value in (tmp_path / "cache" / "values").iterdir():
        value.write_text(value.read_text(encoding="utf-8").replace("a", "b"), encoding="utf-8")
    assert start(tmp_path, type=kind, dataset=path) == first
    assert counts


def test_a_second_start_on_a_data_set_of_the_hub_reads_no_row(tmp_path, counts, monkeypatch):
    Dataset.from_list(TEXTS).save_to_disk(tmp_path / "hub")

    def load(*_: Any, **__: Any) -> DatasetDict:
        return DatasetDict(train=Dataset.load_from_disk(tmp_path / "hub"))

    monkeypatch.setattr("datasets.load_dataset", load)
    keys = {"type": "classification", "dataset": "user/texts"}
    first = start(tmp_path, **keys)
    assert counts == {"_rows_key": 3}
    counts.clear()

    assert start(tmp_path, **keys) == first
    assert not counts


def test_a_data_set_with_other_class_names_is_read_with_its_own(tmp_path, counts, monkeypatch):
    def classes(names: str, *, many: bool) -> list[object]:
        one = ClassLabel(names=[*names])
        kind = Features(text=Value("string"), label=List(one) if many else one)
        labels = [[n % 2] if many else n % 2 for n in range(20)]
        rows = {"text": [f"text {n}" for n in range(20)], "label": labels}
        loaded = DatasetDict()
        loaded["train"] = loaded["validation"] = Dataset.from_dict(rows, features=kind)
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: loaded)
        task = TaskConfig(type="classification", dataset="user/texts")
        return [*load_splits(task, seed=1, cache_dir=tmp_path / "cache").label_names]

    for many in (False, True):
        assert classes("ab", many=many) == ["a", "b"]
        assert classes("ba", many=many) == ["b", "a"]
        assert classes("xy", many=many) == ["x", "y"]


@pytest.mark.parametrize("way", ["written over", "linked elsewhere"])
def test_a_changed_file_of_equal_size_and_time_is_read_again(tmp_path, counts, way):
    path = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    keys = {"type": "mlm", "dataset": str(path)}
    texts, key = start(tmp_path, **keys)
    before = path.stat()

    changed = [{**row, "text": row["text"].replace("text", "word")} for row in TEXTS]
    if way == "written over":
        write_jsonl(path, changed)
    else:
        other = write_jsonl(tmp_path / "other.jsonl", changed)
        path.unlink()
        path.symlink_to(other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    result = start(tmp_path, **keys)
    assert "word 001" in {*result[0]}
    assert not {*result[0]} & {*texts}
    assert result[1] != key


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGAKD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_text("a", encoding="utf-8")
    read: list[str] = []

    def reads() -> int:
        remembered_of(path, lambda: read.append(path.read_text(encoding="utf-8")) or "read")
        return len(read)

    assert [reads(), reads()] == [1, 2]
    monkeypatch.setattr(seals, "_SETTLED_NS", 0)
    assert [reads(), reads()] == [3, 3]


def facts_of(folder: Path) -> str:
    """Keys of encoded rows, the order of a loader, the hash of a corpus and trained tokenizers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    corpus = TaskConfig(type="causal_lm", dataset=str(folder / "texts"))
    splits = load_splits(corpus, seed=0, cache_dir=folder / "cache")
    trained = [
        train_tokenizer(lambda: SENTENCES * 5, kind=kind, vocab_size=400, for_encoder=True)
        for kind in ("wordpiece", "bpe")
    ]
    facts = [tokenizer_content(tokenizer), rows_key(rows), splits.content_hash]
    facts.append(str(RowOrder(np.arange(50), StepShape(5, 1), seed=3)(13).tolist()))
    return json.dumps([*facts, *(made.backend_tokenizer.to_str() for made in trained)])


def write(folder: Path, names: tuple[str, ...]) -> Path:
    (folder / "texts").mkdir(parents=True)
    for name in names:
        (folder / "texts" / f"{name}.txt").write_text(f"Of {name}: {SENTENCES[0]}")
    chat_tokenizer("chatml").save_pretrained(folder / "tokenizer")
    return folder


def test_keys_order_corpus_and_trained_tokenizers_do_not_depend_on_the_process(tmp_path):
    here = write(tmp_path / "here", ("other", "sympy", "torch"))
    moved = write(tmp_path / "moved" / "there", ("torch", "sympy", "other"))
    code = f"import test_cached_start as t; print(t.facts_of(t.Path({str(moved)!r})))"
    path = ":".join([str(Path(__file__).parent), *sys.path])
    variables = {"PYTHONHASHSEED": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    command = [sys.executable, "-c", code]
    elsewhere = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)

    assert elsewhere.stdout.strip() == facts_of(here)
