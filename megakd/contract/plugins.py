"""Losses, metrics and methods of other packages, found by entry point or as `module:name`.

The options of such a loss or method are a dataclass of the other package. The options are checked
like megakd's own: an unknown key is an error that names the nearest known key. docs/plugins.md has
an example of each kind.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from pydantic import TypeAdapter
from pydantic_core import CoreSchema, core_schema

from megakd.errors import ConfigError

LOSSES = "megakd.losses"
METHODS = "megakd.methods"
METRICS = "megakd.metrics"
OURS, THEIRS = "ours", "theirs"


@functools.cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points that installed packages offer in a group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def _load_plugin(group: str, name: str) -> Any:
    # The object of `module:name`, or of an entry point's name.
    point = installed(group).get(name)
    module_name, _, attribute = (point.value if point else name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f'"{name}": module {module_name} cannot be imported ({error}); install its package, or '
            "put the folder that holds it on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise ConfigError(f'"{name}": module {module_name} has no {attribute or "name"}{hint}')
    return getattr(module, attribute)


@dataclass(frozen=True)
class FromPackage:
    """Marker for a value of the run config that is an options dataclass of another package.

    group: group of the entry points.
    tag: the key whose value names the dataclass, `loss` or `name`.
    built_in: the union of megakd's own dataclasses; other packages cannot use their names.
    check: returns what is wrong with a dataclass, or None if the dataclass is valid.
    """

    group: str
    tag: str
    built_in: Any
    check: Callable[[Any], str | None]

    def kind(self, name: str) -> type:
        """Return the dataclass that a name refers to; raise ConfigError if it is not valid."""
        kind = _load_plugin(self.group, name)
        wrong = self.check(kind)
        if wrong is not None:
            raise ConfigError(f'"{name}": {wrong}; docs/plugins.md shows an example')
        return kind

    def is_named_by(self, value: Any) -> bool:
        """Return whether a mapping or an options object belongs to another package."""
        name = value.get(self.tag) if isinstance(value, dict) else getattr(value, self.tag, None)
        if not isinstance(name, str) or name in self.built_in_names:
            return False
        return ":" in name or name in installed(self.group)

    @functools.cached_property
    def built_in_names(self) -> frozenset[str]:
        return frozenset(map(self.name_of, get_args(get_args(self.built_in)[0])))

    def name_of(self, kind: type) -> str:
        """Return the name of one of megakd's own dataclasses."""
        return get_args(get_type_hints(kind)[self.tag])[0]

    def branch(self, value: Any) -> str:
        return THEIRS if self.is_named_by(value) else OURS

    def validated(self, value: Any) -> Any:
        """Return the options object for a mapping; return an options object unchanged."""
        name = value[self.tag] if isinstance(value, dict) else getattr(value, self.tag)
        try:
            kind = self.kind(name)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if isinstance(value, kind):
            return value
        return TypeAdapter(kind).validate_json(json.dumps(value))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        del source, handler
        as_json = core_schema.plain_serializer_function_ser_schema(
            lambda options: TypeAdapter(type(options)).dump_python(options, mode="json")
        )
        return core_schema.no_info_plain_validator_function(self.validated, serialization=as_json)


def wrong_options(kind: Any, base: type, methods: tuple[str, ...]) -> str | None:
    """Return why a class cannot be the options of a plug-in; None if the class is valid."""
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
        return f"{getattr(kind, '__name__', kind)} is not a dataclass derived from {base.__name__}"
    members = vars(kind)
    if not (
        members.get("__is_pydantic_dataclass__")
        and members["__pydantic_config__"] == vars(base)["__pydantic_config__"]
    ):
        return (
            f"{kind.__name__} lacks the decorator @dataclass(config=STRICT, frozen=True, "
            "kw_only=True) of pydantic.dataclasses"
        )
    missing = [name for name in methods if getattr(kind, name) is getattr(base, name)]
    return f"{kind.__name__} has no {missing[0]}()" if missing else None


def is_metric(name: str) -> bool:
    """Return whether a name refers to a metric of another package."""
    return ":" in name or name in installed(METRICS)


def metric_of(name: str) -> Callable[[Any, Any], float]:
    """Return the function of a metric of another package; raise ConfigError if it is none."""
    metric = _load_plugin(METRICS, name)
    if not (callable(metric) and isinstance(getattr(metric, "higher_is_better", None), bool)):
        raise ConfigError(
            f'"{name}" is not a function(outputs, labels) with an attribute higher_is_better, true '
            "or false; docs/plugins.md shows an example"
        )
    return cast("Callable[[Any, Any], float]", metric)


def code_of(value: Any) -> str | None:
    """Return a hash of the file of an object of another package; None for megakd's own objects."""
    module = sys.modules.get(value.__module__)
    if module is None or module.__name__.partition(".")[0] == "megakd":
        return None
    file = inspect.getsourcefile(module)
    return _hash_of(file) if file else None


@functools.cache
def _hash_of(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
