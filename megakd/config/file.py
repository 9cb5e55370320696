"""A config as a file: YAML with dotted overrides, its keys, and the paths that it names."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megakd.config.checks import config_problems
from megakd.config.messages import cut, schema_problems, shown
from megakd.config.other_names import missing
from megakd.config.paths import expand_path, looks_like_path
from megakd.config.run import RunConfig
from megakd.config.task import STUDENT
from megakd.errors import ConfigError, one_line


def places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Yield the keys of a run's folders, models and data, with what they name."""
    task = config.task
    named: dict[str, object] = {"output_dir": config.output_dir}
    named |= {
        f"task.{key}": getattr(task, key) for key in ("dataset", "tokenizer", "chat_template")
    }
    for name, spec in {**config.teacher_specs, STUDENT: config.student}.items():
        named[f"{config.key_of(name)}.model"] = spec.model
        named[f"{config.key_of(name)}.cache"] = getattr(spec, "cache", None)
    yield from ((key, value) for key, value in named.items() if isinstance(value, str | Path))
    yield from task.files()


def check_paths(config: RunConfig) -> None:
    """Check, before torch is loaded, that the models and files of a run are on this machine.

    Names that may be the Hub's, and patterns of files, are checked where they are read.
    """
    specs = {f"{config.key_of(name)}.model": spec for name, spec in config.teacher_specs.items()}
    unread = {"output_dir", "task.chat_template"}
    unread |= {key for key, spec in specs.items() if not spec.reads_model}
    missing = [
        f"{key}: {path} does not exist"
        for key, value in places(config)
        if key not in unread and not key.endswith(".cache") and not glob.has_magic(str(value))
        if "files" in key or "evaluation_sets" in key or looks_like_path(str(value))
        if not (path := expand_path(value)).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))


_RUN_CONFIG = TypeAdapter(RunConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load and check the run config of a YAML file.

    Args:
        path: a YAML 1.2 file in UTF-8, or the folder of a run, which stands for its config.yaml
            with this folder as `output_dir`. Other relative paths are kept as written.
        overrides: `a.b=value` or `a.0.b=value` with a YAML value; later overrides win.

    Raises:
        ConfigError: one line per problem, each with the file or the override that causes it.
    """
    of_run = path / "config.yaml"
    path = of_run if of_run.is_file() else path
    tree = parse_yaml(_read(path), source=str(path))
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"holds {shown(tree)}"
        raise ConfigError(f"{path}: {what}; a run config is a mapping with the key output_dir, …")
    is_run = path == of_run and (of_run.parent / "metrics.jsonl").is_file()
    if is_run:  # it may have been moved or copied
        tree["output_dir"] = str(of_run.parent)
    return config_of(tree, overrides, source=str(path))


def config_of(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config"
) -> RunConfig:
    """Return the checked run config of plain values, such as parsed YAML or JSON."""
    given: dict[str, Any] = _plain(tree, source)
    config, problems = _checked(with_overrides(given, overrides, source=source))
    if config is None or problems:
        raise _error(problems, given, overrides, source)
    return config


def with_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], *, source: str = "config"
) -> dict[str, Any]:
    """Return plain values with overrides applied, not yet checked."""
    changed: dict[str, Any] = _plain(tree, source)
    for override in overrides:
        _apply(override, changed)
    return changed


def config_tree(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, with the defaults of all keys."""
    return _RUN_CONFIG.dump_python(config, mode="json")


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML text, from which `load_config` reads an equal config."""
    return dump_yaml(config_tree(config))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path} cannot be read ({getattr(error, 'strerror', error)}); give a YAML "
            "file in UTF-8, or the folder of a run"
        ) from error


def _checked(tree: dict[str, Any]) -> tuple[RunConfig | None, list[str]]:
    try:
        config = _RUN_CONFIG.validate_json(json.dumps(tree))
    except ValidationError as error:
        return None, schema_problems(error, tree)
    unknown = re.compile(r'(deepspeed: unknown key "(.*?)")(.*)')
    return config, [
        unknown.sub(lambda m: f"{m[1]}; {missing(m[2])}" if missing(m[2]) else m[0], problem)
        for problem in config_problems(config)
    ]


def _error(
    problems: Sequence[str], tree: dict[str, Any], overrides: Sequence[str], source: str
) -> ConfigError:
    # The problems that the tree has without the overrides are those of its source.
    without = set(_checked(tree)[1] if overrides else problems)
    lines = [f"{source if p in without else _culprit(p, overrides)}: {p}" for p in problems]
    counted = [f"{len(lines)} problems"] if len(lines) > 1 else []
    return ConfigError("\n  ".join([*counted, *lines]))


def _culprit(problem: str, overrides: Sequence[str]) -> str:
    # A problem begins with its key, whose indices an override writes as keys: objective.0.weight.
    where = re.sub(r"\[(\d+)\]", r".\1", re.split(r": | = ", problem, maxsplit=1)[0])
    within: list[str] = []
    for override in reversed(overrides):
        name = ".".join(_keys(override))
        if f"{where}.".startswith(f"{name}."):
            within = [override]
            break
        if name.startswith(f"{where}."):
            within.insert(0, override)
    return f'override "{cut(" ".join(within or overrides))}"'


def _plain(tree: Any, source: str) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, Path):
            return str(value)
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}")

    try:
        return json.loads(json.dumps(tree, default=plain, allow_nan=False))
    except ValueError as error:
        what = "text, finite numbers, true and false, null, lists and mappings"
        raise ConfigError(f"{source}: {error}; a config holds {what}") from error


def _apply(override: str, tree: dict[str, Any]) -> None:
    # Sections that are missing or null are created.
    keys, (_, equals, text) = _keys(override), override.partition("=")
    if not equals or not all(keys):
        raise ConfigError(
            f'override "{override}" is not of the form key=value, such as train.learning_rate=3e-4'
        )
    value = parse_yaml(text, source=f'override "{override}"')
    node: Any = tree
    for depth, key in enumerate(keys):
        where = f'override "{override}": {".".join(keys[:depth])}'
        is_last = depth == len(keys) - 1
        slot: Any = key
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise ConfigError(
                    f"{where} is a list of {len(node)} items, numbered from 0, without an item "
                    f'"{key}"'
                )
            slot = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"{where} is {shown(node)} and has no keys")
        elif not is_last and node.get(key) is None:
            node[key] = {}
        if is_last:
            node[slot] = value
        else:
            node = node[slot]


def _keys(override: str) -> list[str]:
    # The form `objective[0].weight` is also accepted.
    return re.sub(r"\[(\d+)\]", r".\1", override.partition("=")[0].strip()).split(".")


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
