"""What every method is: options as a dataclass, and `run(config, lab)` in the same file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megakd.contract.plugins import wrong_options
from megakd.contract.terms import STRICT
from megakd.errors import suggestion


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MethodOptions:
    """Options of a method; a method derives its own dataclass from this one.

    needs_teacher: a run without a teacher is refused.
    cuts_student: the method cuts the student out of the teacher, so that no model is given.
    """

    needs_teacher: ClassVar[bool] = True
    cuts_student: ClassVar[bool] = False
    name: str

    @property
    def looks_into_teacher(self) -> bool:
        """Whether the method reads more of a teacher than its outputs, which a cache holds."""
        return False

    def problems(self, config: Any) -> Iterator[str]:
        """Yield what the method cannot work with in the whole `RunConfig`, a line per problem."""
        del config
        return iter(())


@dataclass(config=STRICT, frozen=True, kw_only=True)
class OneTeacherOptions(MethodOptions):
    """Options of a method that learns from one teacher, which the config may have several of.

    teacher: the name of one of several; null where there is only one.
    """

    teacher: str | None = None

    def problems(self, config: Any) -> Iterator[str]:
        """Yield that no teacher was chosen, or one that does not exist."""
        names = [spec.name for spec in config.teachers]
        if names and self.teacher is None:
            yield (
                f'teachers: method "{self.name}" learns from one of them; set method.teacher to '
                f"{' or '.join(names)}"
            )
        if self.teacher is not None and self.teacher not in config.teacher_specs:
            yield no_such_teacher(config, "method.teacher", self.teacher)


def no_such_teacher(config: Any, key: str, name: str) -> str:
    """Return the problem that a key names a teacher which the config does not have."""
    known = ", ".join(config.teacher_specs)
    return f'{key}: there is no teacher "{name}"{suggestion(name, config.teacher_specs)} ({known})'


def wrong_method(kind: Any) -> str | None:
    """Return why a class cannot be the options of a method; None if it can."""
    wrong = wrong_options(kind, MethodOptions, ())
    if wrong is None and not callable(getattr(sys.modules[kind.__module__], "run", None)):
        return f"{kind.__module__}, the file of {kind.__name__}, has no function run(config, lab)"
    return wrong
