"""Reading of report.json, with a check of its structure."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    Any,
    NotRequired,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from megakd.config.messages import shown
from megakd.contract.results import Report
from megakd.errors import CheckpointError
from megakd.reports.table import LATER_KEYS

_LARGEST = 1e300
"""Integers of JSON are unbounded; a larger one is no number that can be drawn."""
_NEVER_NULL = frozenset(
    {"seconds", "alternative_seconds", "sparsity", "weight", "precision", "recall", "f1"}
)
"""Numbers that are always finite; the others are null if they were NaN."""
_FORMS: Mapping[Any, tuple[type, str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    Sequence: (list, "a list"),
    Mapping: (dict, "a mapping"),
}


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        CheckpointError: the file does not exist, or is not a report of megakd.
    """
    again = f"remove {path} and start the command of the run again, which reuses finished stages"
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: megakd writes the file when the run is complete; start the "
            "command of the run again to continue the run"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); {again}") from error
    present = set(cast("dict[str, Any]", content)) if isinstance(content, dict) else set[str]()
    missing = sorted(Report.__required_keys__ - LATER_KEYS.keys() - present)
    if missing:
        raise CheckpointError(
            f"{path} is not a report of megakd: {', '.join(missing)} missing; {again}"
        )
    problem = next(iter(_problems(content, Report)), None)
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}; {again}")
    return cast("Report", content)


def _problems(value: Any, kind: Any, where: str = "", *, may_be_null: bool = True) -> Iterable[str]:
    if get_origin(kind) in (Union, types.UnionType):
        inner = get_args(kind)[0]
        return () if value is None else _problems(value, inner, where, may_be_null=may_be_null)
    if kind in (int, float):
        is_fine = _is_number(value, may_be_null=may_be_null and kind is float)
        return () if is_fine else [f"{where} is {shown(value)}, and must be a finite number"]
    if is_typeddict(kind):
        return _problems_of_keys(value, kind, where)
    return _problems_of_items(value, kind, where, may_be_null=may_be_null)


def _problems_of_items(value: Any, kind: Any, where: str, *, may_be_null: bool) -> Iterator[str]:
    form, name = _FORMS.get(get_origin(kind) or kind, (object, ""))
    if not isinstance(value, form):
        yield f"{where} is {shown(value)}, and must be {name}"
        return
    items: Iterable[tuple[str, Any]] = ()
    if form is dict:
        items = ((f"{where}.{key}", item) for key, item in value.items())
    elif form is list:
        items = ((f"{where}[{number}]", item) for number, item in enumerate(value))
    for inner, item in items:
        yield from _problems(item, get_args(kind)[-1], inner, may_be_null=may_be_null)


def _problems_of_keys(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Yield the problems of a mapping with fixed keys; the report itself may lack later keys."""
    if not isinstance(value, dict):
        yield f"{where} is {shown(value)}, and must be a mapping"
        return
    content = cast("dict[str, Any]", value)
    for key, hint in get_type_hints(kind, include_extras=True).items():
        is_optional = get_origin(hint) is NotRequired
        wanted = get_args(hint)[0] if is_optional else hint
        path = f"{where}.{key}".removeprefix(".")
        if key in content:
            is_nullable = key not in _NEVER_NULL
            yield from _problems(content[key], wanted, path, may_be_null=is_nullable)
        elif not is_optional and path not in LATER_KEYS:
            yield f"{path} is missing"


def _is_number(value: object, *, may_be_null: bool) -> bool:
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return value is None and may_be_null
    # A metric that is not finite is left out of tables and charts.
    return abs(value) <= _LARGEST or (may_be_null and isinstance(value, float))
