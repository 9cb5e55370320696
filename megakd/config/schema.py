"""The keys of a config as its dataclasses state them, and pydantic's errors about them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megakd.config.names import REMOVED, synonyms
from megakd.config.run import RunConfig
from megakd.contract.options import METHODS, MethodOptions
from megakd.contract.plugins import WrongNameError
from megakd.contract.terms import TERMS, Term
from megakd.errors import ConfigError, suggestion

KeyPath = tuple[str | int, ...]
_NAMED = {MethodOptions: METHODS, Term: TERMS}
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


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, with `Annotated` and unions resolved."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in members(part)]
    return [annotation]


def keys_at(path: KeyPath, tree: Any) -> list[str]:
    """Return the known keys of the mapping at `path` of a config; none if its keys are free."""
    annotation: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            items = [kind for kind in members(annotation) if get_origin(kind) is tuple]
            annotation = get_args(items[0])[0] if items else None
            tree = tree[part] if isinstance(tree, list) else None
        else:
            kind = _dataclass_of(annotation, tree)
            annotation = None if kind is None else _hints(kind).get(part)
            tree = tree.get(part) if isinstance(tree, dict) else None
    kind = _dataclass_of(annotation, tree)
    return [] if kind is None else [field.name for field in dataclasses.fields(kind)]


def _dataclass_of(annotation: Any, value: Any) -> Any:
    for kind in members(annotation):
        if kind in _NAMED:
            named = _NAMED[kind]
            with contextlib.suppress(ConfigError, WrongNameError):  # reported by the validation
                return named.kind(value.get(named.key) if isinstance(value, dict) else None)
        elif dataclasses.is_dataclass(kind):
            return kind
    return None


def paths_ending_in(key: str) -> list[str]:
    """Return dotted paths of the settings named `key`, the shortest path first."""
    paths = [path for path in _option_paths(RunConfig, "") if path.rpartition(".")[2] == key]
    return sorted(paths, key=lambda path: path.count("."))


def _option_paths(kind: Any, prefix: str) -> Iterator[str]:
    for name, annotation in _hints(kind).items():
        yield f"{prefix}{name}"
        for part in members(annotation):
            if dataclasses.is_dataclass(part):
                yield from _option_paths(part, f"{prefix}{name}.")


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text, such as `objective[0].temperature`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def schema_problems(error: ValidationError, tree: Any) -> list[str]:
    """Return pydantic's errors, one line per problem, without union branches and internal names."""
    places = [(*_place(detail, tree), detail) for detail in error.errors(include_url=False)]
    fitting = [path for path, is_mismatch, _ in places if not is_mismatch]
    unknown = [path for path, _, detail in places if detail["type"] == _UNKNOWN_KEY]
    meant = " ".join(_unknown_key(path, tree) for path in unknown)
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for path, is_mismatch, detail in places:
        # Another branch of the union fits, but for a key in it.
        is_echo = is_mismatch and any(other[: len(path)] == path for other in fitting)
        is_echo |= detail["type"] == "missing" and f'"{path[-1]}"' in meant
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
        gone = REMOVED.get(re.sub(r"s?\[\d+\]", "", where))  # also of one of several teachers
        return f"{where} = {shown(value)}: {gone or _unknown_key(path, tree)}"
    if kind == "value_error":
        error = detail.get("ctx", {})["error"]
        if isinstance(error, WrongNameError):
            where = dotted((*path, error.key))
            gone = REMOVED.get(f"{where}: {value.get(error.key)}")
            error = f"{error.problem}{gone} known: {', '.join(error.known)}" if gone else error
        return f"{where}: {error}"
    first, *others = [detail["msg"] for detail in details]
    text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    hint = REMOVED.get(where, "") if kind.endswith("_type") else ""
    if isinstance(value, str):
        near = suggestion(value, re.findall(r"'([^']*)'", text)).removeprefix("; ")
        hint = near or ("must be a list" in text) * f"write [{value}]"
    return f"{where or 'the config'}: {text} (got {shown(value)}){hint and f'; {hint}'}"


def _unknown_key(path: KeyPath, tree: Any) -> str:
    *parent, key = path
    known = keys_at(tuple(parent), tree)
    # The keys of a loss term are its own: other sections have keys of the same names.
    is_item = any(isinstance(part, int) for part in parent)
    others = () if is_item else synonyms(str(key), known) or paths_ending_in(str(key))[:1]
    meant = others or difflib.get_close_matches(str(key), known, n=1)
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
