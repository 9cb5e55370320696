"""The splits of a run with `task.streaming`: what is streamed, held out and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import asked
from tiny_runs import save_tokenizer, write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.encoding import encode_splits
from megakd.data.splits import Splits, load_splits
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
