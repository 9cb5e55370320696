"""YAML 1.2: `1e-4` is a number, `on` and `7:1` are text, and keys are unique."""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from megakd.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
# The core schema of YAML 1.2.2, section 10.3.2; PyYAML itself supports only YAML 1.1.
_SCALARS = {
    "null": (r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
# PyYAML treats these characters like a newline, unless they are escaped.
_LINE_BREAKS_OF_1_1 = "\x85\u2028\u2029"
_YAML_1_1 = yaml.resolver.Resolver()


class _Loader(yaml.SafeLoader):
    """A loader of plain values; the rules are set below."""


class _Dumper(yaml.SafeDumper):
    """A dumper with the same rules as `_Loader`."""

    def ignore_aliases(self, data: object) -> bool:
        """Return True, so that a value that occurs twice is written twice."""
        del data
        return True


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    del loader
    text = node.value.lower()
    try:
        if node.tag == f"{_TAG}float":
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value[:40]!r} is not a number", node.start_mark
        ) from error


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """Return a mapping with keys as written, so that `1:` and `on:` are kept as text."""
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            problem = "a key must be text"
        elif key_node.value == "<<" and key_node.style is None:
            problem = "merge keys (<<) are not part of YAML 1.2; write the keys out"
        elif key_node.value in values:
            problem = f'the key "{key_node.value}" is given twice'
        else:
            values[key_node.value] = loader.construct_object(value_node, deep=True)
            continue
        raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
    return values


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quote text that a YAML 1.1 reader would read as another type, such as `on`."""
    is_plain = _YAML_1_1.resolve(yaml.ScalarNode, text, (True, False)) == f"{_TAG}str"
    style = None if is_plain else "'"
    if any(character in text for character in _LINE_BREAKS_OF_1_1):
        style = '"'
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Loader.yaml_constructors = {
    f"{_TAG}null": lambda loader, node: None,
    f"{_TAG}bool": lambda loader, node: node.value.lower() == "true",
    f"{_TAG}int": _number,
    f"{_TAG}float": _number,
    f"{_TAG}str": yaml.SafeLoader.construct_scalar,
    f"{_TAG}seq": functools.partial(yaml.SafeLoader.construct_sequence, deep=True),
    f"{_TAG}map": _mapping,
    None: yaml.SafeLoader.construct_undefined,
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(
            f"{_TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first)
        )
_Dumper.add_representer(str, _text)


def parse_yaml(text: str, *, source: str) -> Any:
    """Return the value of the single document in `text`.

    Args:
        text: YAML 1.2 with the core schema, without merge keys and application tags.
        source: name of the text in messages.

    Raises:
        ConfigError: the text is not YAML, or a key is given twice; the message names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # _Loader builds plain values only
    except RecursionError as error:
        raise ConfigError(f"{source}: lists or mappings are nested too deeply to read") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}: {line}{problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise ConfigError(
            f"{source}: line {line}: character #x{int(error.character):04x} is not allowed in YAML"
        ) from error


def dump_yaml(tree: Any) -> str:
    """Return YAML text of plain values that YAML 1.2 and 1.1 readers read alike."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
