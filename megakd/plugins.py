"""Losses and methods by name, and losses, methods and metrics of other packages, `module:name`.

The options of a loss or method are a dataclass, which is looked up when the loss or method is
named. docs/plugins.md has an example of each kind of another package.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic_core import CoreSchema, core_schema

from megakd.errors import ConfigError, suggestion


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


class WrongNameError(ValueError):
    """megakd has no dataclass of the name in a mapping of the run config.

    problem: what is wrong; key: the key that holds the name; known: megakd's own names.
    """

    def __init__(self, problem: str, key: str, known: Sequence[str], *, near: Any = "") -> None:
        near = suggestion(near, known) or ";"
        super().__init__(f"{problem}{near} known: {', '.join(known)}")
        self.problem, self.key, self.known = problem, key, known


@dataclass(frozen=True)
class Named:
    """Marker of a value of the run config whose options dataclass is named by a key of the value.

    key: the key, `loss` or `name`.
    noun: what is named, for messages.
    find: returns megakd's own dataclass of a name, or None.
    names: returns the names of megakd's own dataclasses.
    check: returns what is wrong with a dataclass of another package, or None.
    """

    key: str
    noun: str
    find: Callable[[str], type | None]
    names: Callable[[], Sequence[str]]
    check: Callable[[Any], str | None]

    def kind(self, name: Any) -> type:
        """Return the dataclass of a name; raise ConfigError for a wrong one of another package.

        Raises:
            WrongNameError: megakd has no loss or method of this name.
        """
        if isinstance(name, str) and ":" in name:
            kind = _load_plugin(name)
            if (wrong := self.check(kind)) is not None:
                raise ConfigError(f'"{name}": {wrong}; docs/plugins.md shows an example')
            return kind
        if isinstance(name, str) and (kind := self.find(name)) is not None:
            return kind
        text = json.dumps(name, ensure_ascii=False)
        raise WrongNameError(f"unknown {self.noun} {text:.60}", self.key, self.names(), near=name)

    def validated(self, value: Any) -> Any:
        """Return the options object for a mapping; return an options object unchanged."""
        if dataclasses.is_dataclass(value):
            return value
        if not isinstance(value, dict):
            is_name = isinstance(value, str) and self.find(value) is not None
            hint = f"; write {{{self.key}: {value}}}" if is_name else ""
            text = f"must be a mapping (got {json.dumps(value):.60}){hint}"
            raise ValueError(text)  # noqa: TRY004 - the error that pydantic adds the key to
        if self.key not in value:
            raise WrongNameError("missing", self.key, self.names())
        try:
            kind = self.kind(value[self.key])
        except ConfigError as error:
            raise ValueError(str(error)) from error
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
