"""Rows of conversations: which columns of a table hold them, and one form for all shapes.

Shapes: `messages` (or `conversations`), `prompt` and `completion`, `prompt` alone, and text; with
`task.as_messages` also a question and its answer, or an instruction, its input and its output. The
rows of a data set with conversations have the columns `text` (the contents of all messages, for
hashes and for the training of tokenizers), `conversation` (JSON of a `Conversation`) and `place`
(the place of the row in messages).

Messages have OpenAI's form: `role` and `content`, with `tool_calls` in assistant messages and the
role `tool` for their results; the content is a text or a list of text parts. ShareGPT's form is
`from` and `value`. Other keys of a message, such as `name` and `reasoning_content`, go to the chat
template as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from datasets import Dataset

from megakd.config.task import TaskConfig
from megakd.data.arrow import Record, Table, document_of, require, text_of
from megakd.errors import DataError

CONVERSATION = "conversation"
SOURCE = "source"
MESSAGES_DEFAULTS = ("messages", "conversations")
PROMPT, COMPLETION = "prompt", "completion"
PAIRS = ((PROMPT, COMPLETION), ("question", "answer"), ("instruction", "output"))
"""Columns of texts that `task.as_messages` makes messages of."""
INPUT = "input"
"""Column with what an instruction is about; it may be empty."""
TOOLS, OPTIONS = "tools", "chat_template_kwargs"
TEXT_DEFAULTS = ("text", "sentence", "content", "document")
Message = dict[str, Any]
ASSISTANT = "assistant"
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "function_call": ASSISTANT,
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row: either messages, which the chat template renders, or plain text.

    messages: the messages; None for plain text.
    counted: the numbers of the messages whose tokens can count; none in a row that is a prompt.
    options: further arguments of the chat template, in place of `task.chat_template_kwargs`.
    prompt, completion: the plain text; without a completion the row is a prompt, and with an empty
        prompt the row is a document.
    """

    messages: list[Message] | None = None
    counted: list[int] = field(default_factory=list)
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    completion: str | None = None

    @property
    def is_prompt(self) -> bool:
        """True if the row has no answer, so that none of its tokens can count."""
        return self.completion is None if self.messages is None else not self.counted

    @property
    def text(self) -> str:
        """The text of the row, without the marks of a chat template."""
        if self.messages is None:
            return self.prompt + (self.completion or "")
        return "\n".join(map(_text_of_message, self.messages))

    @property
    def asked(self) -> str:
        """The text before the first answer that counts, or the whole text if that is empty."""
        if self.messages is None:
            return self.prompt or self.text
        first = self.counted[0] if self.counted else None
        return "\n".join(map(_text_of_message, self.messages[:first])) or self.text

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Conversation:
        return Conversation(**json.loads(text))


def _text_of_message(message: Message) -> str:
    parts = [message.get("reasoning_content", ""), message["content"]]
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if isinstance(part, str) and part)


def is_chat(rows: Dataset) -> bool:
    """Return whether the rows of a split are conversations."""
    return CONVERSATION in rows.column_names


class ChatColumns(NamedTuple):
    """The columns of a table of conversations; None or empty: not a column of the table.

    prompt, completion: the columns of a prompt and its answer, texts or lists of messages.
    addition: the column of a text that follows the prompt.
    as_messages: whether texts become messages.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: tuple[str, ...] = ()
    addition: str | None = None
    as_messages: bool = False


def chat_columns(table: Table, task: TaskConfig) -> ChatColumns | None:
    """Return the columns of conversations; None for a table of documents.

    Columns that the task names decide. Otherwise messages come first, then a prompt with a
    completion, then a text, then a prompt alone.
    """
    if task.type != "causal_lm" or task.text_columns is not None:
        return None
    named = ChatColumns(task.messages_column, task.prompt_column, task.completion_column)
    if any(named):
        _require_named(table, named)
        is_pair = named.prompt and not named.completion and COMPLETION in table.columns
        named = named._replace(completion=COMPLETION) if is_pair else named
        return named._replace(as_messages=task.as_messages)
    for column in MESSAGES_DEFAULTS:
        if column in table.columns:
            return ChatColumns(messages=column)
    if task.as_messages:
        return _of_texts(table)
    if PROMPT in table.columns and COMPLETION in table.columns:
        return ChatColumns(prompt=PROMPT, completion=COMPLETION)
    has_text = any(column in table.columns for column in TEXT_DEFAULTS)
    return None if has_text or PROMPT not in table.columns else ChatColumns(prompt=PROMPT)


def _of_texts(table: Table) -> ChatColumns:
    for prompt, completion in PAIRS:
        if prompt in table.columns and completion in table.columns:
            has_input = prompt == "instruction" and INPUT in table.columns
            addition = INPUT if has_input else None
            return ChatColumns(
                prompt=prompt, completion=completion, addition=addition, as_messages=True
            )
    pairs = ", ".join(" and ".join(pair) for pair in PAIRS)
    raise DataError(
        f"{table.name}: task.as_messages needs the columns {pairs}, and the columns are "
        f"{', '.join(table.columns)}; set task.prompt_column and task.completion_column"
    )


def _require_named(table: Table, named: ChatColumns) -> None:
    for kind, column in zip(named._fields, named[:3], strict=False):
        if column is not None:
            require(table, column, f"task.{kind}_column")


def conversation_of(name: str, columns: ChatColumns, record: Record) -> Conversation:
    """Return the conversation of a row."""
    if columns.text:
        return Conversation(completion=document_of(name, columns.text, record))
    if columns.messages is None:
        return _of_prompt(name, columns, record)
    where = f"{name}, {record.place}: column {columns.messages!r}"
    messages = messages_of(_present(record, columns.messages, where), where=where)
    return _chat(name, record, messages, first=0)


def _of_prompt(name: str, columns: ChatColumns, record: Record) -> Conversation:
    prompt, completion = cast("str", columns.prompt), columns.completion
    where = f"{name}, {record.place}: column"
    shown = {
        c: _present(record, c, f"{where} {c!r}") for c in (prompt, completion) if c is not None
    }
    lists = [column for column, value in shown.items() if _is_message_list(value)]
    if not lists:
        texts = [text_of(name, column, record) for column in shown]
        if columns.as_messages:
            if columns.addition is not None and record.values.get(columns.addition):
                texts[0] += f"\n\n{text_of(name, columns.addition, record)}"
            roles = zip(("user", ASSISTANT), texts, strict=False)
            turns = [{"role": role, "content": text} for role, text in roles]
            return _chat(name, record, turns, first=1)
        return Conversation(prompt=texts[0], completion=None if completion is None else texts[1])
    if len(lists) < len(shown):
        raise DataError(
            f"{where} {lists[0]!r} is a list of messages and the other of {prompt!r} and "
            f"{completion!r} is not; write both as texts, or both as lists of messages"
        )
    asked, *answers = (messages_of(v, where=f"{where} {c!r}") for c, v in shown.items())
    if not answers:
        return _chat(name, record, asked, first=len(asked))
    return _chat(name, record, asked + answers[0], first=len(asked))


def _chat(name: str, record: Record, messages: list[Message], *, first: int) -> Conversation:
    # Messages after the last answer are left out, because no token after them counts.
    where = f"{name}, {record.place}"
    options = {
        "tools": _value(record, TOOLS, list, where),
        "options": _present_keys(_value(record, OPTIONS, dict, where) or {}),
    }
    if first == len(messages):
        return Conversation(messages=messages, **options)
    answers = [n for n in range(first, len(messages)) if messages[n]["role"] == ASSISTANT]
    # OpenAI's fine-tuning format marks answers that are not learned with weight 0.
    counted = [n for n in answers if messages[n].get("weight", 1) != 0]
    if answers and not counted:
        raise DataError(
            f"{where}: all {len(answers)} messages of role {ASSISTANT!r} have weight 0, so that "
            "nothing of the row is learned; remove the row, or give one of them weight 1"
        )
    if not counted:
        roles = ", ".join(message["role"] for message in messages[first:])
        raise DataError(
            f"{where}: no message of role {ASSISTANT!r} to learn from (roles: {roles}); remove the "
            f"row, or give rows without an answer in a column {PROMPT!r} (task.prompt_column)"
        )
    return Conversation(messages=messages[: counted[-1] + 1], counted=counted, **options)


def _present(record: Record, column: str, where: str) -> object:
    value = record.values.get(column)
    if value is None:
        raise DataError(f"{where} is missing")
    return value


def _value(record: Record, column: str, kind: type, where: str) -> Any:
    value = record.values.get(column)
    if value is None or value in ("", []):
        return None
    parsed = from_json(value)
    if not isinstance(parsed, kind):
        wanted = {list: "a list", dict: "an object"}[kind]
        raise DataError(f"{where}: column {column!r} is not {wanted}: {value!r:.80}")
    _require_json(parsed, f"{where}: column {column!r}")
    return parsed


def messages_of(value: object, *, where: str) -> list[Message]:
    """Return the messages of a column: a list of messages, or such a list as JSON text."""
    listed = from_json(value)
    if not isinstance(listed, list) or not listed:
        raise DataError(
            f"{where} must be a list of messages with role and content, or with from and value "
            f"(got {value!r:.80})"
        )
    return [
        _message(message, where=f"{where}, message {number}")
        for number, message in enumerate(cast("list[object]", listed), start=1)
    ]


def from_json(value: object) -> object:
    """Return the content of a JSON list or object in a text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _is_message_list(value: object) -> bool:
    listed = from_json(value)
    return isinstance(listed, list) and bool(listed) and all(map(_looks_like_message, listed))


def _looks_like_message(value: object) -> bool:
    keys = _present_keys(value) if isinstance(value, Mapping) else ()
    return "role" in keys or ("from" in keys and "value" in keys)


def with_arguments(message: Message, *, as_text: bool) -> Message:
    """Return a message with the arguments of its calls as objects, or in OpenAI's form.

    In OpenAI's form, which DeepSeek's templates read, arguments are JSON text, and a message with
    calls alone has no content.
    """
    if "tool_calls" not in message:
        return message
    calls: list[Message] = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        if as_text and not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False)
        given = given if as_text else from_json(given)
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    nothing = None if as_text else ""
    return {**message, "tool_calls": calls, "content": message["content"] or nothing}


def _present_keys(value: object) -> dict[str, Any]:
    # A key of a message or a call may be null instead of missing. In arguments and tools, null is a
    # value.
    return {k: v for k, v in cast("Mapping[str, Any]", value).items() if v is not None}


def _message(value: object, *, where: str) -> Message:
    if not _looks_like_message(value):
        raise DataError(
            f"{where} must be an object with role and content, or with from and value "
            f"(got {value!r:.80})"
        )
    message: Message = _present_keys(value)
    made = _from_openai(message, where) if "role" in message else _from_sharegpt(message, where)
    for key in ("role", "content"):
        if not isinstance(made[key], str):
            raise DataError(f"{where}: {key} is not text: {made[key]!r:.80}")
    _require_json(made, f"{where}: the message")
    return made


def _require_json(value: object, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, TypeError) as error:
        raise DataError(f"{what} cannot be written as UTF-8 JSON: {error}") from error


def _from_openai(message: Message, where: str) -> Message:
    made: Message = {**message, "content": _content(message.get("content", ""), where)}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise DataError(f"{where}: tool_calls is not a list: {calls!r:.80}")
        made["tool_calls"] = [_tool_call(call, where) for call in cast("list[object]", calls)]
        if not made["tool_calls"]:
            del made["tool_calls"]
    elif "content" not in message:
        raise DataError(f"{where}: the message of role {message['role']!r} has no content")
    return made


def _content(value: object, where: str) -> object:
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in cast("list[Any]", value):
        is_typed = isinstance(part, Mapping)
        kind, text = (part.get("type"), part.get("text")) if is_typed else (None, part)
        if not isinstance(text, str) or kind not in ("text", None):
            raise DataError(
                f"{where}: a part of the content is not text ({part!r:.80}); only text is supported"
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a tool call is not an object: {value!r:.80}")
    call: Message = _present_keys(value)
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call has no name of a function: {value!r:.80}")
    present = _present_keys(function)
    named = {**present, "arguments": present.get("arguments", {})}
    if function is call:
        return {"type": "function", "function": named}
    return {"type": "function", **call, "function": named}


def _from_sharegpt(message: Message, where: str) -> Message:
    sender, text = message["from"], message["value"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(f"{where}: from is {sender!r}; supported: {', '.join(SHAREGPT_ROLES)}")
    made: Message = {"weight": message["weight"]} if "weight" in message else {}
    if sender != "function_call":
        return {**made, "role": role, "content": text}
    calls = from_json(text)
    listed = cast("list[object]", calls) if isinstance(calls, list) else [calls]
    made |= {"role": role, "content": ""}
    return {**made, "tool_calls": [_tool_call(call, where) for call in listed]}
