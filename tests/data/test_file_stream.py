"""Streams of local files: the same texts as the other readers, little read at the start."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset
from tiny_runs import write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.chat.rows import CONVERSATION, Conversation
from megakd.data.choosing import text_hash
from megakd.data.files import local_rows
from megakd.data.rows import TextStream
from megakd.data.streams import file_stream, sample_of, table_of
from megakd.errors import DataError

TEXTS = ["one, two", 'say "three"', "four", "  ", "five\nsix"]
KEY = "task.train_files"


def task(*paths: Path, **keys: Any) -> TaskConfig:
    return TaskConfig(type="mlm", train_files=tuple(map(str, paths)), **keys)


def stream(*paths: Path, **keys: Any) -> TextStream:
    return file_stream(paths, task(*paths, **keys), key=KEY)


def texts_of(streamed: TextStream) -> list[str]:
    return [row["text"] for row in streamed.read()]


def write(path: Path, texts: list[str]) -> Path:
    """The texts in the format that the ending names."""
    quoted = ['"{}"'.format(text.replace('"', '""')) for text in texts]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts, "number": range(len(texts))}), path)
    elif path.suffix == ".csv":
        path.write_text("\n".join(["text", *quoted]) + "\n", encoding="utf-8")
    elif path.suffix == ".tsv":
        path.write_text("\n".join(["text", *texts[:3]]) + "\n", encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(text * 900 for text in texts), encoding="utf-8")
    else:
        write_jsonl(path, ({"text": text} for text in texts))
    return path


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "csv", "tsv", "parquet", "txt"])
def test_a_stream_has_the_texts_of_the_files_as_without_streaming(tmp_path, ending):
    paths = [write(tmp_path / f"{n}.{ending}", TEXTS[n:]) for n in range(2)]
    held = write_jsonl(tmp_path / "held.jsonl", [{"text": "held"}])
    rows = local_rows(task(*paths, validation_files=str(held)), cache_dir=tmp_path / "cache")

    assert texts_of(stream(*paths)) == rows.splits["train"]["text"][:]
    assert texts_of(stream(*paths))  # a second time


def test_two_columns_make_one_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "why", "a": "so"}])

    assert texts_of(stream(path, text_columns=("q", "a"))) == ["why\nso"]


def test_only_the_beginning_of_a_jsonl_file_is_read_before_training(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nthis is no JSON\n', encoding="utf-8")
    made = stream(path)

    with pytest.raises(DataError, match=r"a.jsonl, line 2 is not JSON"):
        texts_of(made)


def test_columns_of_conversations_may_begin_with_any_row(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tools, options = [{"type": "function", "function": {"name": "add"}}], {"effort": "low"}
    rows = [{"messages": chat}] * 3 + [
        {"messages": chat, "tools": tools},
        {"chat_template_kwargs": options, "id": 7, "messages": chat},
    ]
    bare, rich = (
        write_jsonl(tmp_path / "0.jsonl", rows[:1]),
        write_jsonl(tmp_path / "1.jsonl", rows),
    )
    table = pa.table({"messages": [chat], "tools": [tools]})
    pq.write_table(table, tmp_path / "2.parquet")
    with (tmp_path / "3.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["tools", "messages"], [json.dumps(tools), json.dumps(chat)]])
    paths = (bare, rich, tmp_path / "2.parquet", tmp_path / "3.csv")
    given = TaskConfig(type="causal_lm", train_files=tuple(map(str, paths)))

    found = [
        Conversation.from_json(row[CONVERSATION])
        for row in file_stream(paths, given, key=KEY).read()
    ]

    plain = (None, {})
    expected = [*[plain] * 4, (tools, {}), (None, options), (tools, {}), (tools, {})]
    assert [(row.tools, row.options) for row in found] == expected


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (
            {"prompt": "a"},
            {"prompt": "b", "completion": "c"},
            "from prompt and completion, .* prompt;",
        ),
        ({"text": "a"}, {"text": "b", "messages": []}, "from messages, but .* from text; give"),
        ({"content": "a"}, {"content": "b", "text": "c"}, "from text, but .* from content; give"),
    ],
)
def test_rows_that_would_be_read_otherwise_are_refused_not_cut(tmp_path, first, later, message):
    one = write_jsonl(tmp_path / "a.jsonl", [first, first, later])
    other = write_jsonl(tmp_path / "b.jsonl", [later])
    pq.write_table(pa.Table.from_pylist([later]), tmp_path / "c.parquet")
    given = TaskConfig(type="causal_lm", train_files=str(one))

    with pytest.raises(DataError, match=f"a.jsonl, line 3 would be read {message}"):
        list(file_stream([one], given, key=KEY).read())
    for path in (other, tmp_path / "c.parquet"):
        with pytest.raises(DataError, match=f"{path.name} would be read {message}"):
            file_stream([one, path], given, key=KEY)


def test_a_file_without_the_column_is_named_before_training(tmp_path):
    paths = [
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]),
        write_jsonl(tmp_path / "b.jsonl", [{"body": "b"}]),
    ]

    with pytest.raises(DataError, match=r"b.jsonl: column 'text' does not exist; .* are body"):
        stream(*paths)


def test_files_without_rows_are_refused_only_if_all_are_empty(tmp_path):
    empty, full = (tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    empty.write_text("", encoding="utf-8")

    assert texts_of(stream(empty, full)) == ["b"]
    with pytest.raises(DataError, match=r"task.train_files: .*a.jsonl has no rows"):
        stream(empty)


def test_a_json_file_is_refused_because_it_is_read_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["a"]), encoding="utf-8")

    with pytest.raises(DataError, match=r"task.train_files: .*a.json is a json file, .* \.jsonl"):
        table_of(path, KEY)


def test_the_digest_reads_name_size_beginning_and_end(tmp_path):
    path = tmp_path / "a.txt"
    content = bytearray(b"x" * 300_000)

    def digest(name: str = "a.txt", at: int | None = None, extra: bytes = b"") -> str:
        changed = bytearray(content)
        if at is not None:
            changed[at] = ord("y")
        path.write_bytes(changed + extra)
        return sample_of(path.rename(tmp_path / name))

    plain = digest()
    assert plain == digest()
    assert plain == digest(at=150_000)  # the price of a digest that is cheap
    assert len({plain, digest(at=3), digest(at=299_990), digest(extra=b"x"), digest("b.txt")}) == 5


def test_texts_that_are_held_out_are_left_out_wherever_they_stand(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": text} for text in "abacad"))
    plain = stream(path)
    rest = dataclasses.replace(plain, held_out=frozenset([text_hash("a")]))

    assert texts_of(rest) == ["b", "c", "d"]
    assert [record.values["text"] for record in plain.first_rows(2).records()] == ["a", "b"]


def test_each_rank_reads_only_its_own_files_if_their_number_is_a_multiple(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}"}] * 3) for n in range(4)]
    shares = [{row["text"] for row in stream(*paths).share(rank, 2)} for rank in range(2)]

    assert shares == [{"0", "2"}, {"1", "3"}]


def test_a_cache_of_datasets_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", "datasets")

    monkeypatch.setattr(IterableDataset, "from_generator", refuse)

    with pytest.raises(DataError, match=r"`datasets` cannot be used: .*set HF_DATASETS_CACHE"):
        stream(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))
