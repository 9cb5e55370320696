"""Streams: the rows of the files or of the Hub, and the rows that are held out."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import asked
from datasets import IterableDataset
from tiny_runs import save_tokenizer, write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.chat.conversations import CONVERSATION, Conversation
from megakd.data.choosing import text_hash
from megakd.data.encoding import encode_splits
from megakd.data.files import local_rows
from megakd.data.rows import TextStream
from megakd.data.splits import Splits, load_splits
from megakd.data.streams import file_stream, sample_of, table_of
from megakd.data.tokenizers import from_folder, load_tokenizer
from megakd.errors import ConfigError, DataError

WORDS = "abcdefghij"


def texts(*words: str) -> list[dict[str, str]]:
    return [{"text": word} for word in words]


def task(**keys: Any) -> TaskConfig:
    return TaskConfig(type=keys.pop("type", "mlm"), streaming=True, **keys)


def load(given: TaskConfig, cache: Path) -> Splits:
    return load_splits(given, seed=1, cache_dir=cache)


def streamed(splits: Splits) -> list[str]:
    assert splits.stream is not None
    assert len(splits.train) == 0
    return [row["text"] for row in splits.stream.read()]


def test_validation_and_test_files_are_read_and_training_files_are_streamed(tmp_path):
    train = [str(write_jsonl(tmp_path / f"{n}.jsonl", texts(*WORDS[n::2]))) for n in range(2)]
    held = {
        f"{split}_files": str(write_jsonl(tmp_path / f"{split}.jsonl", texts(f"{split} text")))
        for split in ("validation", "test")
    }

    splits = load(task(train_files=tuple(train), **held), tmp_path / "cache")

    assert streamed(splits) == [*WORDS[0::2], *WORDS[1::2]]
    assert splits.validation["text"][:] == ["validation text"]
    assert splits.test is not None
    assert splits.test["text"][:] == ["test text"]
    assert splits.metrics == ("perplexity",)


def test_the_training_texts_are_not_copied_to_the_cache(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", texts("unmistakable") * 1000)
    held = write_jsonl(tmp_path / "held.jsonl", texts("held"))
    cache = tmp_path / "cache"
    tokenizer = from_folder(save_tokenizer(tmp_path / "t", ["held"], kind="wordpiece"), "mlm")
    given = task(train_files=str(train), validation_files=str(held))

    encoded = encode_splits(load(given, cache), tokenizer, given, cache_dir=cache)

    files = [path for path in cache.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000 < train.stat().st_size
    assert not any(b"unmistakable" in path.read_bytes() for path in files)
    assert len(encoded.train) == 0
    assert encoded.train.column_names == encoded.validation.column_names
    assert encoded.stream is not None
    assert encoded.tokens_per_row == 3  # of the validation rows


def test_a_folder_has_its_own_validation_files(tmp_path):
    write_jsonl(tmp_path / "d" / "train-00000-of-00002.jsonl", texts("a"))
    write_jsonl(tmp_path / "d" / "train-00001-of-00002.jsonl", texts("b"))
    write_jsonl(tmp_path / "d" / "validation.jsonl", texts("v"))

    splits = load(task(dataset=str(tmp_path / "d")), tmp_path / "cache")

    assert streamed(splits) == ["a", "b"]
    assert splits.validation["text"][:] == ["v"]


def test_without_validation_texts_the_first_texts_are_held_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts("a", " ", "b", "a", "c", "d"))

    splits = load(task(dataset=str(path), max_eval_examples=2), tmp_path / "cache")

    assert splits.validation["text"][:] == ["a", "b"]
    assert streamed(splits) == ["c", "d"]  # not the second "a" either


def test_without_validation_texts_and_without_a_number_the_run_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts("a", "b"))

    with pytest.raises(ConfigError, match=r"task.streaming: .*a.jsonl has no validation split, .*"):
        load(task(dataset=str(path)), tmp_path / "cache")
    with pytest.raises(DataError, match=r"task.max_eval_examples: 3 texts .*has 2 and no further"):
        load(task(dataset=str(path), max_eval_examples=3), tmp_path / "cache")


def test_the_content_hash_names_the_files_the_columns_and_the_held_out_texts(tmp_path):
    held = str(write_jsonl(tmp_path / "held.jsonl", [{"text": "v", "q": "w"}]))
    path = tmp_path / "a.jsonl"

    def content(rows: list[dict[str, str]], **keys: Any) -> str:
        write_jsonl(path, rows)
        return load(task(**keys), tmp_path / "cache").content_hash

    rows = [{"text": "a", "q": "b"}] * 3
    files = {"train_files": str(path), "validation_files": held}
    plain = content(rows, **files)
    assert plain == content(rows, **files)
    others = (
        content([*rows, {"text": "c", "q": "d"}], **files),
        content(rows, **files, text_columns=("q",)),
        content(rows, **files, max_eval_examples=1),
        content([*rows, {"text": "c", "q": "d"}], dataset=str(path), max_eval_examples=1),
    )
    assert len({plain, *others}) == 5


def test_a_tokenizer_is_not_trained_on_a_stream(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", texts("v"))
    given = task(train_files=str(held.with_name("held.jsonl")), max_eval_examples=1)
    write_jsonl(tmp_path / "held.jsonl", texts("v", "w"))
    splits = load(given, tmp_path / "cache")

    with pytest.raises(DataError, match=r"task.tokenizer: not set, .*task.streaming is true"):
        load_tokenizer(given, splits, model_folders=[], cache_dir=tmp_path / "cache")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in the place of a data set of the Hub."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def builder(name: str, configuration: str | None) -> Any:
        assert (name, configuration) == ("user/corpus", None)
        return original(str(folder), cache_dir=str(tmp_path / "datasets"))

    original = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return folder


def write_split(hub: Path, split: str, words: str) -> None:
    table = pa.table({"text": list(words), "url": [f"u{word}" for word in words]})
    pq.write_table(table, hub / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize(("count", "held"), [(None, "vw"), (1, "v")])
def test_a_data_set_of_the_hub_is_streamed_with_its_own_validation_split(
    hub, tmp_path, count, held
):
    write_split(hub, "train", WORDS)
    write_split(hub, "validation", "vw")

    given = task(dataset="user/corpus", max_eval_examples=count)
    splits = load(given, tmp_path / "cache")

    assert streamed(splits) == list(WORDS)
    assert splits.validation["text"][:] == list(held)
    assert splits.content_hash == load(given, tmp_path / "cache").content_hash


def test_a_data_set_of_the_hub_without_a_validation_split_gives_its_first_texts(hub, tmp_path):
    write_split(hub, "train", WORDS)

    splits = load(task(dataset="user/corpus", max_eval_examples=3), tmp_path / "cache")

    assert splits.validation["text"][:] == list(WORDS[:3])
    assert streamed(splits) == list(WORDS[3:])


def test_a_share_of_the_hub_resumes_where_it_was(hub, tmp_path):
    write_split(hub, "train", WORDS)
    splits = load(task(dataset="user/corpus", max_eval_examples=1), tmp_path / "cache")
    assert splits.stream is not None
    share = splits.stream.share(1, 2)
    rows = iter(share)
    first = [next(rows)["text"] for _ in range(2)]
    state = share.state_dict()
    rest = [row["text"] for row in rows]

    again = splits.stream.share(1, 2)
    again.load_state_dict(state)

    assert [row["text"] for row in again] == rest
    assert first + rest == list(WORDS[1::2])


def test_a_data_set_that_cannot_be_reached_is_named(monkeypatch, tmp_path):
    def refuse(*_: Any) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)

    with pytest.raises(DataError, match=r"the Hub cannot be reached .* user/corpus, .*no route"):
        load(task(dataset="user/corpus"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("columns", "bad"),
    [
        (None, ['{"other": "x"}', '{"text": null}', '{"text": 7}', "no JSON", "[1]"]),
        (("text", "answer"), ['{"text": "x"}', '{"text": "x", "answer": null}', "no JSON"]),
    ],
)
@pytest.mark.parametrize("held", ["held.jsonl", None])
def test_bad_documents_of_a_stream_are_named_or_left_out(tmp_path, caplog, held, columns, bad):
    good = [json.dumps({"text": word, "answer": word}) for word in "abcd"]
    train = tmp_path / "train.jsonl"
    write_jsonl(tmp_path / "held.jsonl", [{"text": "v", "answer": "v"}])
    given = task(
        train_files=str(train),
        validation_files=None if held is None else str(tmp_path / held),
        max_eval_examples=1,
        text_columns=columns,
    )
    for line in bad:
        train.write_text("\n".join([*good[:2], line, *good[2:]]), encoding="utf-8")
        with pytest.raises(DataError, match=r"train\.jsonl, line 3"):
            streamed(load(given, tmp_path / "cache"))

    train.write_text("\n".join([bad[-1], *good[:2], *bad, *good[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1"):
        load(given, tmp_path / "cache")
    caplog.clear()
    splits = load(replace(given, bad_rows="drop"), tmp_path / "cache")

    assert [text[0] for text in streamed(splits)] == [*"abcd"[held is None :]]
    for number in (1, *range(4, 4 + len(bad))):
        assert f"a row is left out (task.bad_rows: drop): {train}, line {number}" in caplog.text


def test_a_line_of_conversations_that_is_not_json_is_named_or_left_out(tmp_path):
    rows = [json.dumps({"messages": asked("Hi", answer)}) for answer in "abc"]
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("\n".join([rows[0], "no JSON", *rows[1:]]), encoding="utf-8")
    held.write_text(rows[0], encoding="utf-8")
    given = task(type="causal_lm", train_files=str(train), validation_files=str(held))

    with pytest.raises(DataError, match=r"train\.jsonl, line 2 is not JSON"):
        streamed(load(given, tmp_path / "cache"))
    assert len(streamed(load(replace(given, bad_rows="drop"), tmp_path / "cache"))) == 3


def test_a_bad_conversation_of_a_stream_is_named_or_left_out(tmp_path, caplog):
    good = [{"messages": asked("Hi", answer)} for answer in "ab"]
    bad = [good[0], {"messages": [{"role": "user", "content": "no answer"}]}, good[1]]
    held = str(write_jsonl(tmp_path / "held.jsonl", good))
    train = str(write_jsonl(tmp_path / "train.jsonl", bad))
    given = task(type="causal_lm", train_files=train, validation_files=held)

    with pytest.raises(DataError, match="line 2"):
        streamed(load(given, tmp_path / "cache"))

    left = streamed(load(replace(given, bad_rows="drop"), tmp_path / "cache"))
    assert len(left) == 2
    assert "a row is left out (task.bad_rows: drop): " in caplog.text


TEXTS = ["one, two", 'say "three"', "four", "  ", "five\nsix"]
KEY = "task.train_files"


def task_of(*paths: Path, **keys: Any) -> TaskConfig:
    return TaskConfig(type="mlm", train_files=tuple(map(str, paths)), **keys)


def stream(*paths: Path, **keys: Any) -> TextStream:
    return file_stream(paths, task_of(*paths, **keys), key=KEY)


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
    rows = local_rows(task_of(*paths, validation_files=str(held)), cache_dir=tmp_path / "cache")

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
