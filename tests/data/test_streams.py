"""Streams: the rows of the files or of the Hub, and the rows that are held out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import asked
from datasets.distributed import split_dataset_by_node
from tiny_runs import save_tokenizer, write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.conversations import CONVERSATION, Conversation
from megakd.data.encoding import encode_splits
from megakd.data.files import local_tables
from megakd.data.readers import sample_of
from megakd.data.rows import rows_of_tables
from megakd.data.tokenizers import from_folder, load_tokenizer
from megakd.errors import ConfigError, DataError

WORDS = "abcdefghij"


@pytest.fixture
def jsonl(tmp_path):
    """Write texts, or rows, into a file of the test, and return its path as a config has it."""

    def write(name, rows):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
        return str(write_jsonl(tmp_path / f"{name}.jsonl", rows))

    return write


@pytest.fixture
def load(load):
    """Load the splits of a task that streams."""
    return partial(load, type="mlm", streaming=True)


def streamed(splits):
    assert len(splits.train) == 0
    return [row["text"] for row in splits.stream.read()]


@pytest.fixture
def stream(load, jsonl):
    """The stream of some files, beside a held-out text."""

    def of_files(*paths, **keys):
        held = {"validation_files": jsonl("held", ["held"])}
        return load(train_files=tuple(map(str, paths)), **held, **keys).stream

    return of_files


def texts_of(stream):
    return [row["text"] for row in stream.read()]


def test_validation_and_test_files_are_read_and_training_files_are_streamed(load, jsonl):
    held = {f"{split}_files": jsonl(split, [f"{split} text"]) for split in ("validation", "test")}

    splits = load(train_files=tuple(jsonl(f"{n}", WORDS[n::2]) for n in range(2)), **held)

    assert streamed(splits) == [*WORDS[0::2], *WORDS[1::2]]
    assert splits.validation["text"][:] == ["validation text"]
    assert splits.test["text"][:] == ["test text"]
    assert splits.metrics == ("perplexity",)


def test_the_training_texts_are_not_copied_to_the_cache(tmp_path, load, jsonl):
    cache, train = tmp_path / "cache", jsonl("train", ["unmistakable"] * 1000)
    files = {"train_files": train, "validation_files": jsonl("held", ["held"])}
    tokenizer = from_folder(save_tokenizer(tmp_path / "t", ["held"], kind="wordpiece"))
    task = TaskConfig(type="mlm", streaming=True, **files)

    encoded = encode_splits(load(**files), tokenizer, task, cache_dir=cache)

    contents = [path.read_bytes() for path in cache.rglob("*") if path.is_file()]
    assert sum(map(len, contents)) < 10_000
    assert not any(b"unmistakable" in content for content in contents)
    assert len(encoded.train) == 0
    assert encoded.train.column_names == encoded.validation.column_names
    assert encoded.stream is not None
    assert encoded.tokens_per_row == 3  # of the validation rows


def test_without_validation_texts_the_first_texts_are_held_out(load, jsonl):
    path, two = jsonl("a", ["a", " ", "b", "a", "c", "d"]), jsonl("two", ["a", "b"])

    splits = load(dataset=path, max_eval_examples=2)

    assert splits.validation["text"][:] == ["a", "b"]
    assert streamed(splits) == ["c", "d"]  # not the second "a" either
    with pytest.raises(ConfigError, match=r"task.streaming: .*a.jsonl has no validation split, .*"):
        load(dataset=path)
    with pytest.raises(DataError, match=r"two.jsonl has no text to train on, beside 2 held-out te"):
        load(dataset=two, max_eval_examples=3)


def test_held_out_texts_of_a_large_file_that_were_edited_are_read_anew(load, jsonl):
    """The digest of the file is of its size, its beginning and its end."""
    texts = [f"{n:05} {'x' * 500}" for n in range(600)]
    before = load(dataset=jsonl("a", texts), max_eval_examples=200)

    texts[150] = texts[150].replace("x", "y")
    after = load(dataset=jsonl("a", texts), max_eval_examples=200)

    assert after.validation["text"][150] == texts[150]
    assert texts[150] not in streamed(after)
    assert after.content_hash != before.content_hash


def test_the_content_hash_names_the_files_the_columns_and_the_held_out_texts(load, jsonl):
    rows = [{"text": "a", "q": "b"}] * 3
    more = [*rows, {"text": "c", "q": "d"}]
    files = {"validation_files": jsonl("held", [{"text": "v", "q": "w"}])}

    def content(rows, files=files, **keys):
        return load(train_files=jsonl("a", rows), **files, **keys).content_hash

    plain = content(rows)
    assert plain == content(rows)
    others = (
        content(more),
        content(rows, text_columns=("q",)),
        content(rows, max_eval_examples=1),
        content(more, {}, max_eval_examples=1),
    )
    assert len({plain, *others}) == 5


def test_a_tokenizer_is_not_trained_on_a_stream(load, jsonl, tmp_path):
    keys = {"train_files": jsonl("a", ["v", "w"]), "max_eval_examples": 1}
    task = TaskConfig(type="mlm", streaming=True, **keys)

    with pytest.raises(DataError, match=r"task.tokenizer: not set, .*task.streaming is true"):
        load_tokenizer(task, load(**keys), model_folders=[], cache_dir=tmp_path / "cache")


@pytest.fixture
def hub(hub_folder):
    """Write a split of the only data set of the Hub."""

    def write(split, words):
        table = pa.table({"text": list(words), "url": [f"u{word}" for word in words]})
        pq.write_table(table, hub_folder / f"{split}-00000-of-00001.parquet")

    return write


@pytest.mark.parametrize(
    ("validation", "count", "held", "rest"),
    [("vw", None, "vw", WORDS), ("vw", 1, "v", WORDS), (None, 3, WORDS[:3], WORDS[3:])],
)
def test_a_data_set_of_the_hub_is_streamed(load, hub, validation, count, held, rest):
    hub("train", WORDS)
    if validation:
        hub("validation", validation)

    splits, again = (load(dataset="user/corpus", max_eval_examples=count) for _ in range(2))

    assert streamed(splits) == [*rest]
    assert splits.validation["text"][:] == [*held]
    assert splits.content_hash == again.content_hash


def test_a_share_of_the_hub_resumes_where_it_was(load, hub):
    hub("train", WORDS)
    splits = load(dataset="user/corpus", max_eval_examples=1)
    share = split_dataset_by_node(splits.stream.rows, 1, 2)
    rows = iter(share)
    first = [next(rows)["text"] for _ in range(2)]
    state = share.state_dict()
    rest = [row["text"] for row in rows]

    again = split_dataset_by_node(splits.stream.rows, 1, 2)
    again.load_state_dict(state)

    assert [row["text"] for row in again] == rest
    assert first + rest == list(WORDS[1::2])


TWO = ("text", "answer")
CHAT = {"type": "causal_lm"}


@pytest.mark.parametrize(
    ("keys", "bad", "is_cut"),
    [
        ({}, [{"other": "x"}, {"text": None}, [1]], False),
        ({"text_columns": TWO}, [{"text": "x"}, {"text": "x", "answer": None}], True),
        (CHAT, [{"messages": asked("no answer")}], False),
    ],
    ids=["texts", "two columns", "conversations"],
)
def test_bad_rows_of_a_stream_are_named_or_dropped(
    load, jsonl, tmp_path, caplog, keys, bad, is_cut
):
    rows = [{"text": word, "answer": word} for word in "abcd"]
    rows = [{"messages": asked(word, word)} for word in "abcd"] if keys is CHAT else rows
    good, bad = [*map(json.dumps, rows)], [*map(json.dumps, bad), "no JSON"]
    train, held = tmp_path / "train.jsonl", jsonl("held", rows[:1])
    files = {"train_files": str(train), "validation_files": None if is_cut else held}
    load = partial(load, **{"max_eval_examples": 1, **files, **keys})
    for line in bad:
        train.write_text("\n".join([*good[:2], line, *good[2:]]), encoding="utf-8")
        with pytest.raises(DataError, match=r"train\.jsonl, line 3"):
            streamed(load())

    train.write_text("\n".join([bad[-1], *good[:2], *bad, *good[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1"):
        streamed(load())
    caplog.clear()
    texts = streamed(load(bad_rows="drop"))

    assert texts == [f"{word}\n{word}" if keys else word for word in "abcd"[is_cut:]]
    for number in (1, *range(4, 4 + len(bad))):
        assert f"a row is left out (task.bad_rows: drop): {train}, line {number}" in caplog.text


TEXTS = ["one, two", 'say "three"', "four", "  ", "five\nsix"]


@pytest.mark.parametrize("ending", ["ndjson", "csv", "tsv", "parquet", "txt"])
def test_a_stream_has_the_texts_of_its_files(tmp_path, write_rows, jsonl, stream, ending):
    paths = [tmp_path / f"{n}.{ending}" for n in range(2)]
    for number, path in enumerate(paths):
        texts = TEXTS[number:3] if ending == "tsv" else TEXTS[number:]
        if ending == "txt":
            path.write_text("\n\n".join(text * 900 for text in texts), encoding="utf-8")
        else:
            write_rows(path, [(text, 7) for text in texts], header=("text", "number"))
    files = {"train_files": tuple(map(str, paths)), "validation_files": jsonl("held", ["held"])}
    task = TaskConfig(type="mlm", **files)
    rows = rows_of_tables(local_tables(task), task, cache_dir=tmp_path / "cache")

    assert texts_of(stream(*paths)) == rows.splits["train"]["text"][:]
    assert texts_of(stream(*paths))  # a second time


def test_columns_of_conversations_may_begin_with_any_row(tmp_path, write_rows, jsonl, stream):
    chat = asked("Hi", "Hello", system="Be kind")
    tools, options = [{"type": "function", "function": {"name": "add"}}], {"effort": "low"}
    rows = [{"messages": chat}] * 3 + [
        {"messages": chat, "tools": tools},
        {"chat_template_kwargs": options, "id": 7, "messages": chat},
    ]
    columns = ("tools", "messages", "chat_template_kwargs")
    typed = [(tools, chat, options), (None, chat, None)]
    texts = [(json.dumps(tools), json.dumps(chat), json.dumps(options)), ("", json.dumps(chat), "")]
    paths = (
        jsonl("0", rows[:1]),
        jsonl("1", rows),
        write_rows(tmp_path / "2.parquet", typed, header=columns),
        write_rows(tmp_path / "3.csv", texts, header=columns),
    )

    read = stream(*paths, type="causal_lm").read()

    plain = Conversation(messages=chat, counted=[2])
    both = replace(plain, tools=tools, options=options)
    expected = [*[plain] * 4, replace(plain, tools=tools), replace(plain, options=options)]
    expected += [both, plain] * 2
    assert [Conversation.from_json(row[CONVERSATION]) for row in read] == expected


@pytest.mark.parametrize(
    ("first", "column", "value"),
    [({"prompt": "a"}, "completion", "c"), ({"text": "a"}, "messages", asked("Hi", "Hello"))],
)
def test_rows_of_another_kind_are_refused_not_cut(tmp_path, jsonl, stream, first, column, value):
    later = first | {column: value}
    one, other = jsonl("a", [first, first, later]), jsonl("b", [later])
    pq.write_table(pa.Table.from_pylist([later]), tmp_path / "c.parquet")

    for paths in ((one,), (other, tmp_path / "c.parquet", one)):
        with pytest.raises(DataError, match=rf"a\.jsonl, line 1: column '{column}' is missing"):
            list(stream(*paths, type="causal_lm").read())


def test_files_without_rows_are_refused_only_if_all_are_empty(jsonl, stream):
    empty = jsonl("a", [])

    assert texts_of(stream(empty, jsonl("b", ["b"]))) == ["b"]
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        stream(empty)


def test_the_digest_reads_name_size_beginning_and_end(tmp_path):
    def digest(name="a.txt", at=None, size=300_000):
        content = bytearray(b"x" * size)
        if at is not None:
            content[at] = ord("y")
        (tmp_path / name).write_bytes(content)
        return sample_of(tmp_path / name)

    plain = digest()
    assert plain == digest()
    assert plain == digest(at=150_000)  # the price of a digest that is cheap
    assert len({plain, digest(at=3), digest(at=299_990), digest(size=300_001), digest("b")}) == 5


def test_each_rank_reads_only_its_own_files_if_their_number_is_a_multiple(jsonl, stream):
    paths = [jsonl(f"{n}", [f"{n}"] * 3) for n in range(4)]

    rows = stream(*paths).rows
    shares = [{row["text"] for row in split_dataset_by_node(rows, n, 2)} for n in range(2)]

    assert shares == [{"0", "2"}, {"1", "3"}]
