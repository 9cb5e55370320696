"""Losses, metrics and methods of other packages, named as `module:name`.

The options of such a loss or method are a dataclass of the other package. The options are checked
like megakd's own: an unknown key is an error that names the nearest known key. docs/plugins.md has
an example of each kind.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic_core import CoreSchema, core_schema

from megakd.errors import ConfigError

OURS, THEIRS = "ours", "theirs"


def _load_plugin(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
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

    tag: the key whose value names the dataclass, `loss` or `name`.
    check: returns what is wrong with a dataclass, or None if the dataclass is valid.
    """

    tag: str
    check: Callable[[Any], str | None]

    def kind(self, name: str) -> type:
        """Return the dataclass that a name refers to; raise ConfigError if it is not valid."""
        kind = _load_plugin(name)
        wrong = self.check(kind)
        if wrong is not None:
            raise ConfigError(f'"{name}": {wrong}; docs/plugins.md shows an example')
        return kind

    def is_named_by(self, value: Any) -> bool:
        """Return whether a mapping or an options object belongs to another package."""
        name = value.get(self.tag) if isinstance(value, dict) else getattr(value, self.tag, None)
        return isinstance(name, str) and ":" in name

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
    if vars(kind).get("__pydantic_config__") != vars(base)["__pydantic_config__"]:
        return (
            f"{kind.__name__} lacks the decorator @dataclass(config=STRICT, frozen=True, "
            "kw_only=True) of pydantic.dataclasses"
        )
    missing = [name for name in methods if getattr(kind, name) is getattr(base, name)]
    return f"{kind.__name__} has no {missing[0]}()" if missing else None


def is_metric(name: str) -> bool:
    """Return whether a name refers to a metric of another package."""
    return ":" in name


def metric_of(name: str) -> Callable[[Any, Any], float]:
    """Return the function of a metric of another package; raise ConfigError if it is none."""
    metric = _load_plugin(name)
    if not (callable(metric) and isinstance(getattr(metric, "higher_is_better", None), bool)):
        raise ConfigError(
            f'"{name}" is not a function(outputs, labels) with an attribute higher_is_better, true '
            "or false; docs/plugins.md shows an example"
        )
    return cast("Callable[[Any, Any], float]", metric)
