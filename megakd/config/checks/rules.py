"""Rules of a config as data: when a setting is a problem, which key it is, and what to tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.contract.options import MethodOptions
from megakd.methods import methods_with

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Case(NamedTuple, Generic[T_co]):
    """A part of a config that rules are applied to: the part itself and its key.

    Paths with a leading dot, such as `.cache`, are settings of the part; others are of the config.
    """

    config: RunConfig
    key: str
    item: T_co

    @property
    def task(self) -> TaskConfig:
        return self.config.task

    @property
    def method(self) -> MethodOptions:
        return self.config.method

    def is_set(self, path: str) -> bool:
        """Return whether a setting exists and differs from its default."""
        node: Any = self.item if path.startswith(".") else self.config
        *sections, name = path.removeprefix(".").split(".")
        for section in sections:
            node = getattr(node, section)
        field = getattr(node, "__pydantic_fields__", {}).get(name)
        return field is not None and getattr(node, name) != field.get_default(
            call_default_factory=True
        )


class Rule(NamedTuple, Generic[T]):
    """The problem `where: text` of every case for which `when` holds.

    where: a path, see `Case`.
    text: a template with the fields `key`, `item`, `config`, `task`, `method`, `teachers` (their
        names), and `methods` (those that set a class variable).
    """

    when: Callable[[Case[T]], object]
    where: str
    text: str


def problems(rules: Iterable[Rule[T]], *cases: Case[T]) -> Iterator[str]:
    """Yield the problems of cases, one line per problem."""
    for case in cases:
        names = {"method": case.method.name, "teachers": " or ".join(case.config.teacher_specs)}
        values = {**case._asdict(), **names, "task": case.task, "methods": _MethodsWith()}
        for rule in rules:
            if rule.when(case):
                where = f"{case.key}{rule.where}" if rule.where[:1] in (".", "") else rule.where
                yield f"{where}: {rule.text.format(**values)}"


class _MethodsWith(dict[str, str]):
    """The names of the methods that set a class variable of `MethodOptions`, for a message."""

    def __missing__(self, flag: str) -> str:
        return " or ".join(methods_with(flag))


def given(keys: str, when: Callable[[Case[T]], object], text: str) -> tuple[Rule[T], ...]:
    """Return one rule for each of the paths in `keys`: the setting is refused when `when` holds."""

    def rule(key: str) -> Rule[T]:
        return Rule(lambda case: case.is_set(key) and when(case), key, text)

    return tuple(rule(key) for key in keys.split())


def only(keys: str, tasks: tuple[str, ...], why: str = "") -> tuple[Rule[Any], ...]:
    """Return rules that refuse settings in other tasks than `tasks`."""
    text = f"supported only for {' and '.join(tasks)}{why}, and task.type is {{task.type}}; remove"
    return given(keys, lambda case: case.task.type not in tasks, f"{text} the key")


def conflict(keys: str, other: str, why: str = "") -> tuple[Rule[Any], ...]:
    """Return rules that refuse settings together with the setting `other`."""
    name = f"{{key}}{other}" if other.startswith(".") else other
    text = f"cannot be combined with {name}{why}; remove one of the two"
    return given(keys, lambda case: case.is_set(other), text)
