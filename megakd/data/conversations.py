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
from itertools import chain
from typing import Any, NamedTuple, cast

from megakd.config.task import TaskConfig
from megakd.data.records import Record, Table, document_of, require, text_of
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

FINISH = "finish_reason"  # length: the last answer was cut off, and has no end to learn

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
    is_cut: whether the last answer was cut off, so that its end is not learned.
    """

    messages: list[Message] | None = None
    counted: list[int] = field(default_factory=list)
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    completion: str | None = None
    is_cut: bool = False

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

    def to_json(self, where: str) -> str:
        """Return the row as JSON; errors begin with its place."""
        try:
            text = json.dumps(vars(self), ensure_ascii=False)
            text.encode("utf-8")
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"{where}: cannot be written as UTF-8 JSON: {error}") from error
        return text

    @staticmethod
    def from_json(text: str) -> Conversation:
        return Conversation(**json.loads(text))


def _text_of_message(message: Message) -> str:
    parts = [message.get("reasoning_content", ""), message["content"]]
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(part for part in parts if isinstance(part, str) and part)


class ChatColumns(NamedTuple):
    """The columns that rows are read from; None or empty: not a column of the table.

    prompt, completion: the columns of a prompt and its answer, texts or lists of messages.
    text: the columns of a text, a pair or a document.
    addition: the column of a text that follows the prompt.
    as_messages: whether texts become messages.
    label: the column of the label, if the rows carry one.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: tuple[str, ...] = ()
    addition: str | None = None
    as_messages: bool = False
    label: str | None = None


def chat_columns(table: Table, task: TaskConfig) -> ChatColumns | None:
    """Return the columns of conversations; None for a table of documents.

    Columns that the task names decide. Otherwise messages come first, then a prompt with a
    completion, then a text, then a prompt alone.
    """
    has = set(table.columns).__contains__
    named = ChatColumns(task.messages_column, task.prompt_column, task.completion_column)
    if any(named):
        for key, column in zip(named._fields, named[:3], strict=False):
            require(table, f"task.{key}_column", *filter(None, [column]))
        if named.prompt and not named.completion and has(COMPLETION):
            named = named._replace(completion=COMPLETION)
        return named._replace(as_messages=task.as_messages)
    if messages := next(filter(has, MESSAGES_DEFAULTS), None):
        return ChatColumns(messages=messages)
    pairs = PAIRS if task.as_messages else PAIRS[:1]
    pair = next((pair for pair in pairs if all(map(has, pair))), None)
    if pair is not None:
        addition = INPUT if task.as_messages and pair[0] == "instruction" and has(INPUT) else None
        return ChatColumns(None, *pair, addition=addition, as_messages=task.as_messages)
    if task.as_messages:
        raise DataError(
            f"{table.name}: task.as_messages needs the columns "
            f"{', '.join(map(' and '.join, PAIRS))}, and the columns are "
            f"{', '.join(table.columns)}; set task.prompt_column and task.completion_column"
        )
    return ChatColumns(prompt=PROMPT) if has(PROMPT) and not any(map(has, TEXT_DEFAULTS)) else None


def conversation_of(name: str, columns: ChatColumns, record: Record) -> Conversation:
    """Return the conversation of a row."""
    if columns.text:
        return Conversation(completion=document_of(name, columns.text, record))
    where = f"{name}, {record.place}"
    named = [c for c in columns[:3] if c is not None]
    for column in named:
        if record.values.get(column) is None:
            raise DataError(f"{where}: column {column!r} is missing")
    contents = {column: from_json(record.values[column]) for column in named}
    lists = [
        c for c, v in contents.items() if isinstance(v, list) and v and all(map(_is_message, v))
    ]
    if not lists and columns.messages is None:
        prompt, *completion = (text_of(name, column, record) for column in named)
        if not columns.as_messages:
            answer = completion[0] if completion else None
            is_cut = record.values.get(FINISH) == "length"
            return Conversation(prompt=prompt, completion=answer, is_cut=is_cut)
        if columns.addition is not None and record.values.get(columns.addition):
            prompt += f"\n\n{text_of(name, columns.addition, record)}"
        roles = zip(("user", ASSISTANT), (prompt, *completion), strict=False)
        parts = [[{"role": role, "content": text}] for role, text in roles]
    elif len(lists) < len(named) and columns.messages is None:
        raise DataError(
            f"{where}: column {lists[0]!r} is a list of messages and the other of "
            f"{' and '.join(map(repr, named))} is not; write both as texts, or both as lists of "
            "messages"
        )
    else:
        parts = [messages_of(v, where=f"{where}: column {c!r}") for c, v in contents.items()]
    first = 0 if columns.messages is not None else len(parts[0])
    return _chat(where, record, [*chain(*parts)], first=first)


def _chat(where: str, record: Record, messages: list[Message], *, first: int) -> Conversation:
    # Messages after the last answer are left out, because no token after them counts.
    options: dict[str, Any] = {
        "tools": _value(record, TOOLS, list, where),
        "options": _present_keys(_value(record, OPTIONS, dict, where) or {}),
    }
    if first == len(messages):
        return Conversation(messages=messages, **options)
    answers = [n for n in range(first, len(messages)) if messages[n]["role"] == ASSISTANT]
    # OpenAI's fine-tuning format marks answers that are not learned with weight 0.
    counted = [n for n in answers if messages[n].get("weight", 1) != 0]
    if counted:
        options["is_cut"] = record.values.get(FINISH) == "length" and counted[-1] == answers[-1]
        return Conversation(messages=messages[: counted[-1] + 1], counted=counted, **options)
    if answers:
        raise DataError(
            f"{where}: all {len(answers)} messages of role {ASSISTANT!r} have weight 0, so that "
            "nothing of the row is learned; remove the row, or give one of them weight 1"
        )
    roles = ", ".join(message["role"] for message in messages[first:])
    known = ", ".join(dict.fromkeys(SHAREGPT_ROLES.values()))
    raise DataError(
        f"{where}: no message of role {ASSISTANT!r} to learn from (roles: {roles}; known: "
        f"{known}); rename the roles, remove the row, or give rows without an answer in a column "
        f"{PROMPT!r} (task.prompt_column)"
    )


def _value(record: Record, column: str, kind: type, where: str) -> Any:
    value = record.values.get(column)
    if value is None or value in ("", []):
        return None
    parsed = from_json(value)
    if not isinstance(parsed, kind):
        shape = "an object" if kind is dict else "a list"
        raise DataError(f"{where}: column {column!r} is not {shape}: {value!r:.80}")
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
        _message(message, f"{where}, message {number}")
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


def _is_message(value: object) -> bool:
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


def _message(value: object, where: str) -> Message:
    if not _is_message(value):
        raise DataError(
            f"{where} must be an object with role and content, or with from and value "
            f"(got {value!r:.80})"
        )
    message = _present_keys(value)
    if "role" not in message:
        message = _from_sharegpt(message, where)
    calls = message.pop("tool_calls", None)
    if calls is None and "content" not in message:
        raise DataError(
            f"{where}: the message of role {message['role']!r} has no content "
            f"(its keys are {', '.join(map(repr, message))})"
        )
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is not a list: {calls!r:.80}")
    content = message.get("content", "")
    if isinstance(content, list):
        content = "\n".join(_text_of_part(part, where) for part in cast("list[Any]", content))
    message["content"] = content
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in cast("list[Any]", calls)]
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise DataError(f"{where}: {key} is not text: {message[key]!r:.80}")
    return message


def _text_of_part(part: Any, where: str) -> str:
    typed: Mapping[str, Any] = part if isinstance(part, Mapping) else {"text": part}
    text = typed.get("text")
    if not isinstance(text, str) or typed.get("type") not in ("text", None):
        raise DataError(
            f"{where}: a part of the content is not text ({part!r:.80}); only text is supported"
        )
    return text


def _tool_call(value: Any, where: str) -> Message:
    call = _present_keys(value) if isinstance(value, Mapping) else {}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call has no name of a function: {value!r:.80}")
    named = {"arguments": {}} | _present_keys(function)
    more = {} if function is call else call
    return {"type": "function", **more, "function": named}


def _from_sharegpt(message: Message, where: str) -> Message:
    sender, text = message["from"], message["value"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise DataError(f"{where}: from is {sender!r}; supported: {', '.join(SHAREGPT_ROLES)}")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    if sender != "function_call":
        return {**weight, "role": role, "content": text}
    parsed = from_json(text)
    calls = cast("list[object]", parsed) if isinstance(parsed, list) else [parsed]
    return {**weight, "role": role, "content": "", "tool_calls": calls}
