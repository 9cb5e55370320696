"""Conversations as encoded rows, and rows put together from parts of text."""

from __future__ import annotations

from typing import Any

from megakd.config.task import TaskConfig
from megakd.data.chat_tokens import ChatEncoder, ChatRow
from megakd.data.conversations import Conversation, messages_of

IGNORE = -100
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


def task(**keys: Any) -> TaskConfig:
    return TaskConfig(**{"type": "causal_lm", "dataset": "none", "max_length": 4096, **keys})


def chat(messages: list[dict[str, Any]], **keys: Any) -> Conversation:
    """A conversation in which all answers count."""
    made = messages_of(messages, where="row 1")
    counted = [n for n, message in enumerate(made) if message["role"] == "assistant"]
    return Conversation(**{"messages": made, "counted": counted, **keys})


def encoded(tokenizer: Any, conversation: Conversation, **keys: Any) -> ChatRow:
    """The only row of a conversation."""
    [row] = rows_of(tokenizer, conversation, **keys)
    return row


def rows_of(tokenizer: Any, conversation: Conversation, **keys: Any) -> list[ChatRow]:
    [(rows, _)] = ChatEncoder(tokenizer, task(**keys))([conversation], ["row 1"])
    return rows


def reference(tokenizer: Any, *parts: tuple[str, bool]) -> tuple[list[int], list[int]]:
    """Tokens and labels of parts of text that are encoded one by one."""
    ids: list[int] = []
    counts: list[bool] = []
    for text, does_count in parts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        counts += [does_count] * len(tokens)
    after = zip(ids[1:], counts[1:], strict=True)
    return ids, [*(token if does else IGNORE for token, does in after), IGNORE]


def assert_row(row: ChatRow, tokenizer: Any, *parts: tuple[str, bool]) -> None:
    """Compare a row with parts of text and whether their tokens count."""
    ids, labels = reference(tokenizer, *parts)
    assert row.input_ids.tolist() == ids
    assert row.labels.tolist() == labels
    last = [text for text, _ in parts[:-2]] if not parts[-1][1] else [t for t, _ in parts[:-1]]
    assert row.prompt_length == len(reference(tokenizer, *((text, False) for text in last))[0])
