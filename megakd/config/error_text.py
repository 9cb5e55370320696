"""Error messages for run configs, one line per problem, with the keys of the YAML file."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megakd.config.removed import REMOVED
from megakd.config.schema import (
    KeyPath,
    annotation_at,
    dotted,
    known_keys,
    names,
    paths_ending_in,
    synonyms,
    value_at,
)
from megakd.errors import suggestion

_EXPECTED = {
    "string_type": "text",
    "path_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "tuple_type": "a list",
}
_LIMITS = {
    "greater_than": ("gt", "must be above {:g}"),
    "greater_than_equal": ("ge", "must be at least {:g}"),
    "less_than": ("lt", "must be below {:g}"),
    "less_than_equal": ("le", "must be at most {:g}"),
    "too_short": ("min_length", "needs at least {:g} item(s)"),
    "too_long": ("max_length", "takes at most {:g} item(s)"),
}
_MOST_CHARACTERS = 60


class _Finding(NamedTuple):
    path: KeyPath
    of_branch: bool  # the error means only that this branch of a union does not fit
    detail: ErrorDetails


def schema_problems(error: ValidationError, tree: Any) -> list[str]:
    """Return pydantic's errors, one line per problem, without union branches and internal names."""
    findings = [_finding(detail, tree) for detail in error.errors()]
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for finding in findings:
        if not _is_echo(finding, findings, tree):
            groups.setdefault(finding.path, []).append(finding.detail)
    problems: list[str] = []
    for path, details in groups.items():
        mismatches = [detail for detail in details if _is_mismatch(detail)]
        if mismatches:
            value, annotation = mismatches[0]["input"], annotation_at(path, tree)
            tags = [tag for tag in ("name", "loss") if value in names(annotation, tag)]
            hint = f"; write {{{tags[0]}: {value}}}" if tags else ""
            where = dotted(path)
            hint = hint or (f"; {REMOVED[where]}" if where in REMOVED else "")
            problems.append(f"{where}: {_mismatch(mismatches)}{hint}")
        problems += [_line(path, detail, tree) for detail in details if not _is_mismatch(detail)]
    return problems


def shown(value: Any) -> str:
    """Return a value as written by a user, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    return cut(text)


def cut(text: str) -> str:
    """Return the text, or the beginning of a text that is too long for a message."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _unknown_key(key: str, parent: KeyPath, tree: Any) -> str:
    known = known_keys(parent, tree)
    # The keys of a loss term are its own: other sections have keys of the same names.
    is_item = any(isinstance(part, int) for part in parent)
    others = [] if is_item else paths_ending_in(key)[:1]
    meant = synonyms(key, known) or others or difflib.get_close_matches(key, known, n=1)
    if not meant:
        return f"unknown key; known: {', '.join(known)}"
    listed = " or ".join(f'"{path}"' for path in meant)
    return f"unknown key; did you mean {listed}?"


def _finding(detail: ErrorDetails, tree: Any) -> _Finding:
    # Other parts of a location name a branch of a union.
    path: list[str | int] = []
    node, of_branch = tree, False
    for part in detail["loc"]:
        is_item = isinstance(node, list) and isinstance(part, int)
        of_branch = not (is_item or (isinstance(node, dict) and part in node))
        if not of_branch:
            path.append(part)
            node = value_at((part,), node)
    if of_branch and detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return _Finding(tuple(path), of_branch and _is_mismatch(detail), detail)


def _is_mismatch(detail: ErrorDetails) -> bool:
    return detail["type"] in _EXPECTED or detail["type"] == "literal_error"


def _is_echo(finding: _Finding, findings: Sequence[_Finding], tree: Any) -> bool:
    path, detail = finding.path, finding.detail
    if detail["type"] == "too_short":
        # pydantic counts only valid items: a list with one invalid item may be long enough.
        return len(detail["input"]) >= detail.get("ctx", {})["min_length"]
    if finding.of_branch:
        others = [other for other in findings if not other.of_branch]
        return any(other.path[: len(path)] == path for other in others)
    if detail["type"] == "missing":
        wrong = "unexpected_keyword_argument"
        unknown = [other.path for other in findings if other.detail["type"] == wrong]
        same = [key for *parent, key in unknown if tuple(parent) == path[:-1]]
        return any(f'"{path[-1]}"' in _unknown_key(str(key), path[:-1], tree) for key in same)
    return False


def _line(path: KeyPath, detail: ErrorDetails, tree: Any) -> str:
    kind, value = detail["type"], shown(detail["input"])
    where, context = dotted(path), detail.get("ctx", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(path, detail, tree)
    if kind == "unexpected_keyword_argument":
        reason = REMOVED.get(where) or _unknown_key(str(path[-1]), path[:-1], tree)
        return f"{where} = {value}: {reason}"
    if kind == "missing":
        return f"{where}: missing, and it has no default"
    if kind == "finite_number":
        return f"{where}: must be a finite number (got {value})"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    limit = _LIMITS.get(kind)
    text = limit[1].format(context[limit[0]]) if limit else detail["msg"]
    return f"{where or 'the config'}: {text} (got {value})"


def _tag_line(path: KeyPath, detail: ErrorDetails, tree: Any) -> str:
    tag = detail.get("ctx", {})["discriminator"].strip("'")
    known = names(annotation_at(path, tree), tag)
    listed = f"known: {', '.join(known)}"
    where = dotted((*path, tag))
    if detail["type"] == "union_tag_not_found":
        return f"{where}: missing; {listed}"
    value = detail["input"][tag]
    noun = path[-1] if tag == "name" else tag
    if not isinstance(value, str):
        return f"{where}: must be text (got {shown(value)}); {listed}"
    near = REMOVED.get(f"{where}: {value}") or suggestion(value, known)
    return f"{where}: unknown {noun} {shown(value)}{near or ';'} {listed}"


def _mismatch(details: Sequence[ErrorDetails]) -> str:
    value = details[0]["input"]
    # pydantic lists the values of a literal as `'a', 'b' or 'c'`, and numbers as `1 or 2`.
    literals = [d.get("ctx", {})["expected"] for d in details if d["type"] == "literal_error"]
    words = [word for text in literals for word in re.findall(r"'[^']*'|\d+", str(text))]
    choices = [word.strip("'") for word in words]
    expected = [word.replace("'", '"') for word in words]
    expected += dict.fromkeys(_EXPECTED[d["type"]] for d in details if d["type"] in _EXPECTED)
    near = suggestion(value, choices) if isinstance(value, str) else ""
    hint = _form_hint(value, expected)
    listed = ", ".join(expected[:-1]) + " or " * (len(expected) > 1) + expected[-1]
    return f"must be {listed} (got {shown(value)}){near}{hint}"


def _form_hint(value: Any, expected: Sequence[str]) -> str:
    if isinstance(value, bool | int | float) and "text" in expected:
        return "; put the value in quotes to make it text"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return f"; write {value[0]} without brackets" if "text" in expected else ""
    if isinstance(value, str) and list(expected) == ["a list"]:
        return f"; write [{value}]"
    return ""
