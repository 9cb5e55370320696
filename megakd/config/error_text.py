"""Error messages for run configs: pydantic's, one line per problem, with keys of the YAML file."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megakd.config.names import REMOVED, synonyms
from megakd.config.schema import (
    KeyPath,
    annotation_at,
    dotted,
    known_keys,
    paths_ending_in,
    variants,
)
from megakd.errors import suggestion

_UNKNOWN_KEY = "unexpected_keyword_argument"
# What pydantic calls otherwise than YAML.
_WORDS = {
    "Input should": "must",
    "Tuple should": "must",
    " after validation": "",
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid boolean": "true or false",
}
_MOST_CHARACTERS = 60


def schema_problems(error: ValidationError, tree: Any) -> list[str]:
    """Return pydantic's errors, one line per problem, without union branches and internal names."""
    places = [(*_place(detail, tree), detail) for detail in error.errors(include_url=False)]
    fitting = [path for path, is_mismatch, _ in places if not is_mismatch]
    unknown = [path for path, _, detail in places if detail["type"] == _UNKNOWN_KEY]
    meant = [_unknown_key(str(path[-1]), path[:-1], tree) for path in unknown]
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for path, is_mismatch, detail in places:
        # Another branch of the union fits, but for a key in it.
        is_echo = is_mismatch and any(other[: len(path)] == path for other in fitting)
        is_echo |= detail["type"] == "missing" and any(f'"{path[-1]}"' in text for text in meant)
        # pydantic counts only valid items: a list with one invalid item may be long enough.
        least = detail.get("ctx", {}).get("min_length", 0)
        is_echo |= detail["type"] == "too_short" and len(detail["input"]) >= least
        if not is_echo:
            groups.setdefault(path, []).append(detail)
    return [_line(path, details, tree) for path, details in groups.items()]


def _place(detail: ErrorDetails, tree: Any) -> tuple[KeyPath, bool]:
    # The path of the key, and whether the error says only that a branch of a union does not fit.
    # pydantic's location also has the names of the branches.
    path: list[str | int] = []
    inside = True
    for part in detail["loc"]:
        is_item = isinstance(tree, list) and isinstance(part, int)
        inside = is_item or (isinstance(tree, dict) and part in tree)
        if inside:
            path.append(part)
            tree = tree[part]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    is_of_type = detail["type"].endswith("_type") or detail["type"] == "literal_error"
    return tuple(path), is_of_type and not inside


def _line(path: KeyPath, details: Sequence[ErrorDetails], tree: Any) -> str:
    detail, where = details[0], dotted(path)
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return f"{where}: missing, and it has no default"
    if kind == _UNKNOWN_KEY:
        reason = REMOVED.get(where) or _unknown_key(str(path[-1]), path[:-1], tree)
        return f"{where} = {shown(value)}: {reason}"
    if kind == "value_error":
        return f"{where}: {detail.get('ctx', {})['error']}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(path, detail, tree)
    first, *others = [detail["msg"] for detail in details]
    text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    hint = _hint(value, text, annotation_at(path, tree))
    hint = hint or (REMOVED.get(where, "") if kind.endswith("_type") else "")
    return f"{where or 'the config'}: {text} (got {shown(value)}){hint and f'; {hint}'}"


def _tag_line(path: KeyPath, detail: ErrorDetails, tree: Any) -> str:
    tag = str(detail.get("ctx", {})["discriminator"]).strip("'")
    known = variants(annotation_at(path, tree), tag)
    where, listed = dotted((*path, tag)), f"known: {', '.join(known)}"
    if detail["type"] == "union_tag_not_found":
        return f"{where}: missing; {listed}"
    value, noun = detail["input"][tag], path[-1] if tag == "name" else tag
    near = REMOVED.get(f"{where}: {value}") or suggestion(value, known) or ";"
    return f"{where}: unknown {noun} {shown(value)}{near} {listed}"


def _hint(value: Any, text: str, annotation: Any) -> str:
    for tag in ("name", "loss"):
        if value in [*variants(annotation, tag)]:
            return f"write {{{tag}: {value}}}"
    is_text = "a valid string" in text
    if is_text and isinstance(value, bool | int | float):
        return "put the value in quotes to make it text"
    if is_text and isinstance(value, list) and len(value) == 1:
        return f"write {value[0]} without brackets"
    if isinstance(value, str):
        near = suggestion(value, re.findall(r"'([^']*)'", text))
        return near.removeprefix("; ") or ("must be a list" in text) * f"write [{value}]"
    return ""


def _unknown_key(key: str, parent: KeyPath, tree: Any) -> str:
    known = known_keys(parent, tree)
    # The keys of a loss term are its own: other sections have keys of the same names.
    is_item = any(isinstance(part, int) for part in parent)
    others = () if is_item else synonyms(key, known) or paths_ending_in(key)[:1]
    meant = others or difflib.get_close_matches(key, known, n=1)
    if not meant:
        return f"unknown key; known: {', '.join(known)}"
    listed = " or ".join(f'"{path}"' for path in meant)
    return f"unknown key; did you mean {listed}?"


def shown(value: Any) -> str:
    """Return a value as written by a user, cut to one short line."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str) -> str:
    """Return the text, or the beginning of a text that is too long for a message."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
