"""Messages about what the schema of a run config refuses."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megakd.config.options import METHODS
from megakd.config.other_names import meant_value, missing, synonyms
from megakd.config.run import RunConfig
from megakd.config.terms import TERMS
from megakd.errors import ConfigError, suggestion
from megakd.plugins import WrongNameError

KeyPath = tuple[str | int, ...]

_NAMED = {"method": METHODS, "objective": TERMS}

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


def keys_at(path: KeyPath, tree: Any) -> list[str]:
    """Return the known keys of the mapping at `path` of a config; none if its keys are free."""
    names = [part for part in path if isinstance(part, str)]
    if named := _NAMED.get(".".join(names)):
        for part in path:
            tree = tree[part]
        with contextlib.suppress(ConfigError, WrongNameError):  # reported by the validation
            return [field.name for field in dataclasses.fields(named.kind(tree.get(named.key)))]
    pattern = re.compile("".join(rf"(?:\*|{re.escape(name)})\." for name in names) + r"([^.]+)")
    return [match[1] for key in _keys_of(RunConfig) if (match := pattern.fullmatch(key))]


def paths_ending_in(key: str) -> list[str]:
    """Return dotted paths of the settings named `key`, the shortest path first."""
    paths = [path for path in _keys_of(RunConfig) if path.rpartition(".")[2] == key]
    return sorted(paths, key=lambda path: path.count("."))


def _keys_of(annotation: Any, prefix: str = "") -> Iterator[str]:
    # The dotted keys of a section, also of a section in a union or a list; * is any name.
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        for name, hint in get_type_hints(annotation, include_extras=True).items():
            if get_origin(hint) is not ClassVar:
                yield f"{prefix}{name}"
                yield from _keys_of(hint, f"{prefix}{name}.")
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple):
        for part in get_args(annotation):
            yield from _keys_of(part, prefix)
    elif get_origin(annotation) is dict:
        yield from _keys_of(get_args(annotation)[1], f"{prefix}*.")


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text, such as `objective[0].temperature`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


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
        return f"{where} = {shown(value)}: {_unknown_key(path, tree)}"
    if kind == "value_error":
        error = detail.get("ctx", {})["error"]
        if isinstance(error, WrongNameError):
            where = dotted((*path, error.key))
            if meant := meant_value(error.key, value.get(error.key)):
                error = f"{error.problem}; {meant} known: {', '.join(error.known)}"
        return f"{where}: {error}"
    first, *others = [detail["msg"] for detail in details]
    text = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    hint = (meant_value("type", value) or missing(value)) if where == "task.type" else ""
    if isinstance(value, str) and not hint:
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
    if not others and (hint := missing(key)):
        return f"unknown key; {hint}"
    names = METHODS.names() if parent == ["method"] else ()
    if having := [name for name in names if key in METHODS.kind(name).__dataclass_fields__]:
        name = tree["method"]["name"]
        return f"an option of {', '.join(having)}, and not of method {name}; remove the key"
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
