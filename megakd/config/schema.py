"""The keys of a config as its dataclasses state them: known keys, variants, options, defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megakd.config.run import RunConfig
from megakd.contract.terms import PLUGIN_TERM, PluginTerm
from megakd.errors import ConfigError
from megakd.methods import PLUGIN_METHOD

KeyPath = tuple[str | int, ...]


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, with `Annotated` and unions resolved."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [inner for part in get_args(annotation) for inner in members(part)]
    return [annotation]


def variants(annotation: Any, tag: str) -> dict[str, Any]:
    """Return the dataclasses of a tagged union by the value of `tag`, in the order of the union."""
    kinds = [kind for kind in members(annotation) if dataclasses.is_dataclass(kind)]
    tags = [(_hints(kind).get(tag), kind) for kind in kinds]
    return {get_args(hint)[0]: kind for hint, kind in tags if get_origin(hint) is Literal}


def annotation_at(path: KeyPath, tree: Any) -> Any:
    """Return the annotation of the value at `path`; None below a mapping with free keys."""
    return _walk(path, tree)[0]


def known_keys(path: KeyPath, tree: Any) -> list[str]:
    """Return the keys that the mapping at `path` may have; [] if all keys are allowed."""
    kind = _dataclass_of(*_walk(path, tree))
    return [] if kind is None else [field.name for field in dataclasses.fields(kind)]


def _walk(path: KeyPath, tree: Any) -> tuple[Any, Any]:
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
    return annotation, tree


def _dataclass_of(annotation: Any, value: Any) -> Any:
    kinds = [kind for kind in members(annotation) if dataclasses.is_dataclass(kind)]
    if len(kinds) < 2:
        return kinds[0] if kinds else None
    package = PLUGIN_TERM if PluginTerm in kinds else PLUGIN_METHOD
    name = value.get(package.tag) if isinstance(value, dict) else None
    if package.is_named_by(value):
        with contextlib.suppress(ConfigError):  # reported when the value is validated
            return package.kind(str(name))
    return variants(annotation, package.tag).get(str(name))


def paths_ending_in(key: str) -> list[str]:
    """Return dotted paths of the settings named `key`, the shortest path first."""
    paths = [path for path in _option_paths(RunConfig, "") if path.rpartition(".")[2] == key]
    return sorted(paths, key=lambda path: path.count("."))


def _option_paths(kind: Any, prefix: str) -> Iterator[str]:
    for name, annotation in _hints(kind).items():
        yield f"{prefix}{name}"
        inner = [part for part in members(annotation) if dataclasses.is_dataclass(part)]
        if len(inner) == 1:
            yield from _option_paths(inner[0], f"{prefix}{name}.")


def defaults(kind: type) -> dict[str, Any]:
    """Return options of a variant with defaults; `dataclasses.MISSING` if there is no default."""
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if get_origin(_hints(kind)[field.name]) is not Literal
        or field.default is not dataclasses.MISSING
    }


def dotted(path: Sequence[str | int]) -> str:
    """Return a path as text, such as `objective[0].temperature`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
