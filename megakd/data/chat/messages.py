"""Messages of a conversation in one form, from the forms of OpenAI and of ShareGPT.

OpenAI: `role` and `content`, with `tool_calls` in assistant messages and the role `tool` for their
results; the content is a text or a list of text parts. ShareGPT: `from` and `value`. Other keys of
a message, such as `name` and `reasoning_content`, go to the chat template as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from megakd.errors import DataError

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


def is_message_list(value: object) -> bool:
    """Return whether a value is a list of messages, or JSON text with such a list."""
    listed = from_json(value)
    return isinstance(listed, list) and bool(listed) and all(map(_looks_like_message, listed))


def _looks_like_message(value: object) -> bool:
    keys = value.keys() if isinstance(value, Mapping) else ()
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


def without_nulls(value: Any) -> Any:
    """Return a JSON value without the nulls in its objects.

    Tables with typed columns give every object the keys of all objects, with null for a missing
    value.
    """
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_nulls(entry) for entry in value]
    return value


def _message(value: object, *, where: str) -> Message:
    if not _looks_like_message(value):
        raise DataError(
            f"{where} must be an object with role and content, or with from and value "
            f"(got {value!r:.80})"
        )
    message: Message = without_nulls(value)
    made = _from_openai(message, where) if "role" in message else _from_sharegpt(message, where)
    for key in ("role", "content"):
        if not isinstance(made[key], str):
            raise DataError(f"{where}: {key} is not text: {made[key]!r:.80}")
    try:
        json.dumps(made, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, TypeError) as error:
        raise DataError(f"{where}: the message cannot be written as UTF-8 JSON: {error}") from error
    return made


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
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str) or (
            isinstance(part, Mapping) and part.get("type") not in ("text", None)
        ):
            raise DataError(
                f"{where}: a part of the content is not text ({part!r:.80}); only text is supported"
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a tool call is not an object: {value!r:.80}")
    call = cast("Message", dict(value))
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call has no name of a function: {value!r:.80}")
    named = {**function, "arguments": function.get("arguments", {})}
    if function is call:
        return {"type": "function", "function": named}
    return {"type": "function", **call, "function": named}


def _from_sharegpt(message: Message, where: str) -> Message:
    sender, text = message["from"], message["value"]
    role = SHAREGPT_ROLES.get(sender)
    if role is None:
        raise DataError(f"{where}: from is {sender!r}; supported: {', '.join(SHAREGPT_ROLES)}")
    if sender != "function_call":
        return {"role": role, "content": text}
    calls = from_json(text)
    listed = cast("list[object]", calls) if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": [_tool_call(call, where) for call in listed]}
