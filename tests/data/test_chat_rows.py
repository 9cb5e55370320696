"""Rows of conversations: every shape in one form, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import asked
from datasets import Dataset, Json, List
from tiny_runs import write_jsonl

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data.conversations import CONVERSATION, Conversation
from megakd.data.readers import files_table
from megakd.data.rows import RowKind, is_blank, text_hash
from megakd.errors import DataError

HELLO = asked("Hi", "Hello")


@pytest.fixture
def load(load, tmp_path):
    """Load the splits of rows."""

    def of_rows(rows=(), **keys):
        files = {"train_files": str(write_jsonl(tmp_path / "rows.jsonl", rows))} if rows else {}
        return load(type="causal_lm", **files, **keys)

    return of_rows


def read(path: Path, **keys: Any) -> list[Conversation]:
    """The rows of a file."""
    table = files_table([path], "task.train_files")
    task = TaskConfig(type="causal_lm", train_files=str(path), **keys)
    kind = RowKind.from_task(task, table, as_chat=True)
    rows = [kind.row(table.name, record) for record in table.records()]
    return [Conversation.from_json(str(row[CONVERSATION])) for row in rows if not is_blank(row)]


def first_of(folder: Path, row: dict[str, Any], **keys: Any) -> Conversation:
    return read(write_jsonl(folder / "rows.jsonl", [row]), **keys)[0]


SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"messages": HELLO}, {}),
        ({"messages": json.dumps(HELLO)}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"chat": SHAREGPT}, {"messages_column": "chat"}),
        ({"prompt": HELLO[:1], "completion": HELLO[1:]}, {}),
        ({"prompt": json.dumps(HELLO[:1]), "completion": HELLO[1:]}, {}),
        ({"q": HELLO[:1], "a": HELLO[1:]}, {"prompt_column": "q", "completion_column": "a"}),
        ({"messages": [*HELLO, *asked("and a question at the end")]}, {}),
        ({"messages": [{**HELLO[0], "content": [{"type": "text", "text": "Hi"}]}, HELLO[1]]}, {}),
        ({"messages": [{**m, "name": None, "tool_calls": None} for m in HELLO]}, {}),
        ({"messages": HELLO, "text": "Hi Hello", "prompt": "Hi"}, {}),
    ],
)
def test_all_shapes_of_a_conversation_give_the_same_row(tmp_path, row, keys):
    result = first_of(tmp_path, row, **keys)

    assert result == Conversation(messages=HELLO, counted=[1])
    assert result.text == "Hi\nHello"


ASKED, TURNS = {"prompt_column": "question"}, asked("Hi", "Hello", "Bye")
SUM = {"question": "2 + 2 =", "answer": " [4]"}


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"prompt": TURNS}, {}, {"messages": TURNS}),
        (SUM, ASKED | {"completion_column": "answer"}, {"prompt": "2 + 2 =", "completion": " [4]"}),
        (SUM, ASKED, {"prompt": "2 + 2 ="}),
        ({"question": "Hi", "completion": "A"}, ASKED, {"prompt": "Hi", "completion": "A"}),
    ],
)
def test_a_prompt_has_no_answer_to_learn_and_plain_text_stays_text(tmp_path, row, keys, expected):
    assert first_of(tmp_path, row, **keys) == Conversation(**expected)


def test_a_table_with_text_and_a_prompt_is_read_as_text(load):
    assert not load([{"text": f"a {n}", "prompt": "b"} for n in range(9)]).kind.is_chat


@pytest.mark.parametrize("arguments", [{"a": 2, "b": 2}, '{"a": 2, "b": 2}'])
def test_tool_calls_keep_their_arguments_as_they_are(tmp_path, arguments):
    function = {"name": "add", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    openai = [*asked("2 + 2?"), {"role": "assistant", "tool_calls": [call]}]
    calling = {"from": "function_call", "value": json.dumps(function)}
    sharegpt = [{"from": "human", "value": "2 + 2?"}, calling]

    for rows in (openai, sharegpt):
        _, answer = first_of(tmp_path, {"messages": rows}).messages
        assert answer["tool_calls"][0]["function"] == function
        assert answer["content"] == ""


def calling_rows(**more: Any) -> list[dict[str, Any]]:
    """Rows with null as a value, and uneven keys in messages, tools and options."""
    rows = []
    for n in range(9):
        key = f"key{n % 2}"
        called = {"name": "f", "arguments": {"until": None, key: n}}
        calls = [{"type": "function", "function": called, "id": None}]
        answer = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
        tool = {"name": "f", "parameters": {key: {"type": "integer", key: n}}, **more}
        row = {"messages": [*asked(f"Question {n}"), answer], "chat_template_kwargs": {key: n}}
        rows.append(row | {"tools": [{"type": "function", "function": tool}]})
    return rows


@pytest.mark.parametrize("kind", ["objects", "texts", "json columns"])
def test_null_is_a_value_in_arguments_and_tools(tmp_path, kind):
    given, path = calling_rows(default=None), tmp_path / "rows.jsonl"
    if kind == "json columns":
        path = tmp_path / "rows.parquet"
        Dataset.from_list(given, on_mixed_types="use_json").to_parquet(path)
    else:
        write = json.dumps if kind == "texts" else lambda value: value
        write_jsonl(path, [{name: write(v) for name, v in row.items()} for row in given])

    for n, row in enumerate(read(path)):
        assert row.messages
        assert row.messages[1].keys() == {"role", "content", "tool_calls"}
        [call] = row.messages[1]["tool_calls"]
        assert call.keys() == {"type", "function"}
        assert call["function"]["arguments"] == {"until": None, f"key{n % 2}": n}
        assert row.options == given[n]["chat_template_kwargs"]
        if kind != "json columns":  # the type of these tools has no key without a null
            assert row.tools == given[n]["tools"]


@pytest.fixture
def all_rows(load, hub_folder):
    """The conversations of a file, of the only data set of the Hub, or of a stream of one."""

    def read(source: str, table: pa.Table) -> list[str]:
        parquet = hub_folder / "train-00000-of-00001.parquet"
        pq.write_table(table, parquet)
        is_stream = source.endswith("stream")
        keys = {"dataset": "user/chats"} if "hub" in source else {"train_files": str(parquet)}
        splits = load(**keys, **({"streaming": True, "max_eval_examples": 1} if is_stream else {}))
        streamed = [row[CONVERSATION] for row in splits.stream.read()] if is_stream else []
        return [*splits.train[CONVERSATION], *splits.validation[CONVERSATION], *streamed]

    return read


@pytest.mark.parametrize("source", ["file", "hub", "hub stream"])
def test_keys_that_a_typed_column_adds_are_left_out(all_rows, source):
    messages = [asked(f"Question {n}", "Hello") for n in range(3)]
    for n, conversation in enumerate(messages):
        conversation[1]["tool_calls"] = [{"name": "f", "arguments": {f"key{n}": n}}]

    rows = map(Conversation.from_json, all_rows(source, pa.table({"messages": messages})))

    calls = [row.messages[1]["tool_calls"][0] for row in rows]
    arguments = sorted(str(call["function"]["arguments"]) for call in calls)
    assert arguments == [f"{{'key{n}': {n}}}" for n in range(3)]


@pytest.mark.parametrize("source", ["file stream", "hub"])
def test_json_columns_of_datasets_give_the_rows_of_jsonl(all_rows, tmp_path, source):
    columns = Dataset.from_list(calling_rows(), on_mixed_types="use_json")
    assert columns.features["messages"] == List(Json())
    columns.to_parquet(tmp_path / "columns.parquet")

    actual = all_rows(source, pq.read_table(tmp_path / "columns.parquet"))

    expected = read(write_jsonl(tmp_path / "rows.jsonl", calling_rows()))
    assert sorted(actual) == sorted(row.to_json("row") for row in expected)


def test_an_answer_with_weight_0_does_not_count(tmp_path):
    messages = asked("Hi", "Hello", "Bye", "See you")
    messages[1]["weight"] = 0

    assert first_of(tmp_path, {"messages": messages}).counted == [3]
    shared = [{**one, "weight": weight} for weight in (0, 1) for one in SHAREGPT]
    assert first_of(tmp_path, {"messages": shared}).counted == [3]


AS_MESSAGES = {"as_messages": True}
# The row, words of the message, and keys of the task.
REFUSED: list[tuple[Any, ...]] = [
    ({"messages": asked("Hi")}, ("line 1", "'assistant'", "roles: user", "task.prompt_column")),
    (
        {"messages": [*asked("Hi"), {"role": "assistant", "content": "Hello", "weight": 0}]},
        ("line 1", "all 1 messages of role 'assistant' have weight 0"),
    ),
    ({"messages": "Hi"}, ("line 1", "'messages'", "list of messages")),
    ({"messages": [{"role": "bot", "content": "Hi"}]}, ("roles: bot; known: system, user, assis",)),
    ({"messages": [{"role": "user", "value": "Hi"}]}, ("no content (its keys are 'role', 'val",)),
    ({"messages": [{"role": "user"}]}, ("message 1", "'user'", "no content")),
    ({"messages": [{"text": "Hi"}]}, ("message 1", "role and content")),
    ({"messages": [{"role": None, "content": "Hi"}]}, ("message 1", "from and value")),
    ({"messages": [{"from": "human", "value": None}]}, ("message 1", "from and value")),
    ({"messages": [{"from": "moderator", "value": "Hi"}]}, ("'moderator'", "human")),
    ({"messages": [{"from": ["gpt"], "value": "Hi"}]}, ("['gpt']", "human")),
    ({"messages": HELLO, "tools": [{"name": "\ud800"}]}, ("line 1", "UTF-8 JSON")),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ("image_url", "text")),
    ({"messages": HELLO, "tools": "add"}, ("'tools'", "not a list")),
    ({"prompt": HELLO[:1], "completion": "Hello"}, ("'prompt'", "'completion'", "both")),
    ({"prompt": 3, "completion": "Hello"}, ("'prompt'", "not text")),
    ({"prompt": "Hi", "completion": None}, ("'completion'", "missing")),
    ({"messages": HELLO}, ("task.messages_column", "'chat'"), {"messages_column": "chat"}),
    ({"instruction": "Hi", "output": "Hello"}, ("set task.text_columns",)),
    ({"text": "a"}, ("as_messages needs the columns prompt and completion, que",), AS_MESSAGES),
]


@pytest.mark.parametrize(("row", "words", "keys"), [(*case, {})[:3] for case in REFUSED])
def test_a_row_that_is_no_conversation_is_refused_with_its_place(tmp_path, row, words, keys):
    with pytest.raises(DataError) as caught:
        first_of(tmp_path, row, **keys)

    assert all(word in str(caught.value) for word in words), caught.value


def prompts_of(conversations: Iterable[str]) -> Counter[str]:
    rows = map(Conversation.from_json, conversations)
    return Counter(row.messages[0]["content"] if row.messages else row.prompt for row in rows)


ANSWERED = {
    "messages": lambda q, a: {"messages": asked(q, a, "And then?", f"{a} again")},
    "texts": lambda q, a: {"prompt": q, "completion": a},
    "prompts alone": lambda q, _: {"prompt": asked(q)},
    "mixture": lambda q, a: {"prompt": asked(q), "completion": asked("", a)[1:]},
}


@pytest.mark.parametrize("shape", ANSWERED)
def test_all_answers_to_a_prompt_stay_in_one_split(load, tmp_path, shape):
    rows = [ANSWERED[shape](f"Question {n % 110}", f"Answer {n}") for n in range(220)]
    mixed = str(write_jsonl(tmp_path / "mixed.jsonl", rows))
    mixture = {"all": MixtureSource(files=mixed, weight=1)}

    splits = load(mixture=mixture) if shape == "mixture" else load(rows)

    train, held = (prompts_of(part["conversation"]) for part in splits[:2])
    assert not train.keys() & held.keys()
    assert set(train.values()) | set(held.values()) == {2}
    assert 1 <= len(held) <= 15


def test_a_stream_leaves_out_all_answers_to_a_held_out_prompt(load):
    rows = [{"messages": asked(f"Question {n % 9}", f"Answer {n}")} for n in range(36)]

    splits = load(rows, streaming=True, max_eval_examples=2)

    assert prompts_of(splits.validation["conversation"]).keys() == {"Question 0", "Question 1"}
    streamed = prompts_of(row[CONVERSATION] for row in splits.stream.read())
    assert streamed == {f"Question {n}": 4 for n in range(2, 9)}


def test_prompts_with_one_answer_are_held_out_by_their_whole_text(load):
    rows = [{"messages": asked(f"Question {n}", "Yes")} for n in range(200)]
    expected = {f"Question {n}\nYes" for n in range(200)}
    expected = {text for text in expected if text_hash(text) < 0.05 * 2**64}

    splits = load(rows)

    assert {*splits.validation["text"]} == expected


NAMED = {"prompt_column": "ask", "completion_column": "say"}


@pytest.mark.parametrize(
    ("row", "keys", "turns"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, {}, ("Hi", "Hello")),
        ({"question": "Why?", "answer": "So"}, {}, ("Why?", "So")),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, {}, ("Add\n\n1, 2", "3")),
        ({"instruction": "Greet", "input": "", "output": "Hi"}, {}, ("Greet", "Hi")),
        ({"instruction": "Greet", "output": "Hi"}, {}, ("Greet", "Hi")),
        ({"ask": "Hi", "say": "Hello", "text": "not this"}, NAMED, ("Hi", "Hello")),
    ],
)
def test_texts_become_messages_where_the_task_asks_for_it(tmp_path, row, keys, turns):
    assert first_of(tmp_path, row, as_messages=True, **keys).messages == asked(*turns)
