"""YAML of a run config: each key once, numbers as people write them."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from megakd.errors import ConfigError, one_line

_TAG = "tag:yaml.org,2002:"

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")

# `safe_load` reads YAML 1.1, in which `2e-5` is text, `on` is true, and the layer pair `7:1` 421.
_SCALARS = {
    "null": re.compile(r"(null|Null|NULL|~|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?[0-9]+\Z"),
    "float": _FLOAT,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {None: [(_TAG + k, v) for k, v in _SCALARS.items()]}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    # Keys stay as written: `1:` and `on:` are text.
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if (key := loader.construct_scalar(key_node)) in values:
            problem = f'the key "{key}" is given twice'
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_Loader.add_constructor(f"{_TAG}map", _mapping)
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(node.value))

# The emitter in C is a few times as fast, where PyYAML was built with it.
_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # a value that occurs twice is written twice


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML treats these characters like a newline, unless they are escaped.
    style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))  # quotes such texts


def parse_yaml(text: str, *, source: str) -> Any:
    """Return the value of the single document in `text`; raise ConfigError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # _Loader builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {line}{problem}") from error
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{source}: cannot be read: {one_line(error)}") from error


def dump_yaml(tree: Any) -> str:
    """Return YAML text of plain values that YAML 1.2 and 1.1 readers read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
