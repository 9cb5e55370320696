"""The run config as a YAML file with dotted overrides: read strictly, written back in full."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megakd.config import RunConfig
from megakd.config_checks import config_problems
from megakd.config_messages import schema_problems, shown
from megakd.config_schema import KeyPath, dotted
from megakd.errors import ConfigError
from megakd.yaml12 import dump_yaml, parse_yaml

_RUN_CONFIG = TypeAdapter(RunConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked run config of a YAML file.

    Args:
        path: a YAML 1.2 file in UTF-8. Relative paths in it stay as written.
        overrides: `a.b=value` or `a.0.b=value`, the value being YAML; later ones win.

    Raises:
        ConfigError: the file cannot be read or the config cannot work; one line per problem.
    """
    tree = parse_yaml(_read(path), source=str(path))
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {shown(tree)}"
        raise ConfigError(f"{path}: {found}; a run config is a mapping with the key output_dir, …")
    for override in overrides:
        _apply(override, tree)
    return _checked(tree, source=str(path))


def config_tree(config: RunConfig) -> dict[str, Any]:
    """The config as plain JSON values, every key resolved."""
    return _RUN_CONFIG.dump_python(config, mode="json")


def dump_config(config: RunConfig) -> str:
    """The config as YAML text; `load_config` of it gives an equal config."""
    return dump_yaml(config_tree(config))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"config file {path} is not UTF-8 text: line {line} has the byte "
            f"0x{error.object[error.start]:02x}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error


def _checked(tree: dict[str, Any], *, source: str) -> RunConfig:
    problems = [
        f"{dotted(path)}: must be a finite number (got {value})"
        for path, value in _scalars(tree, ())
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if problems:
        raise _error(source, problems)
    try:
        config = _RUN_CONFIG.validate_json(json.dumps(tree))
    except ValidationError as error:
        raise _error(source, schema_problems(error, tree)) from error
    problems = config_problems(config)
    if problems:
        raise _error(source, problems)
    return config


def _error(source: str, problems: Sequence[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"{source}: {problems[0]}")
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{source}: {len(problems)} problems{lines}")


def _scalars(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _scalars(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _scalars(value, (*path, index))
    else:
        yield path, node


def _apply(override: str, tree: dict[str, Any]) -> None:
    """Sets one `a.b=value` in the tree; sections that are missing or null come into being."""
    name, equals, text = override.partition("=")
    # Messages write list items as `objective[0].weight`, so that form is taken too.
    keys = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f'override "{override}" is not of the form key=value, such as train.learning_rate=3e-4'
        )
    value = parse_yaml(text, source=f'override "{override}"')
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        slot = _slot(node, keys[: depth + 1], override)
        if isinstance(node, dict) and node.get(key) is None:
            node[key] = {}
        node = node[slot]
    node[_slot(node, keys, override)] = value


def _slot(node: Any, keys: Sequence[str], override: str) -> str | int:
    """The last of `keys` as an index into `node`, which the others lead to."""
    *parents, key = keys
    where = ".".join(parents)
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise ConfigError(f'override "{override}": {where} is {shown(node)} and has no keys')
    if not key.isdecimal() or int(key) >= len(node):
        raise ConfigError(
            f'override "{override}": {where} is a list of {len(node)}, numbered from 0; '
            f'it has no item "{key}"'
        )
    return int(key)
