"""The base of every method: options as a dataclass, with `run(config, lab)` in the same file."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from megakd.config.task import STUDENT
from megakd.config.terms import STRICT
from megakd.errors import suggestion
from megakd.plugins import Named, wrong_options


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MethodOptions:
    """Base class of a method's options.

    needs_teacher: whether a run without a teacher is refused.
    cuts_student: whether the method cuts the student out of the teacher, so that the config gives
        no student model.
    learns_from_rollouts: whether the student can train on texts that it generates.
    learns_adapters: whether the student can train low-rank adapters of its weights: no stage cuts
        the student, and no loss compares its weights.
    reads_soft_labels: whether a column of the training rows can be the teacher.
    routes_rows: whether every training row names the teacher that it learns from.
    """

    needs_teacher: ClassVar[bool] = True
    cuts_student: ClassVar[bool] = False
    learns_from_rollouts: ClassVar[bool] = False
    learns_adapters: ClassVar[bool] = False
    reads_soft_labels: ClassVar[bool] = False
    routes_rows: ClassVar[bool] = False
    name: str

    @property
    def looks_into_teacher(self) -> bool:
        """True if the method needs more than a teacher's outputs; a cache holds only outputs."""
        return False

    @property
    def own_vocabulary(self) -> int | None:
        """Pieces of a vocabulary that is trained for the student alone; None: all share one."""
        return None

    def student_tokenizer(self, splits: Any, teacher: Any, *, cache_dir: Path) -> Any:
        """Return the tokenizer of the student alone; called if `own_vocabulary` is set.

        `splits`: the texts of the run; `teacher`: the tokenizer of the teachers.
        """
        del splits, teacher, cache_dir

    def rows(self, config: Any, splits: Any, pair: Any, *, cache_dir: Path) -> Any:
        """Return rows that a stage reads beside the encoded rows, or None.

        `pair`: the tokenizers of student and teachers (`data.tokenizers.VocabularyPair`).
        """
        del config, splits, pair, cache_dir

    def mixed(self, stage: Any) -> Mapping[str, float]:
        """Return the models of a stage that have a tokenizer other than the student's, by role.

        The value is the probability of each word to be cut with the student's vocabulary. Above 0,
        the model, which learns, gets a second table of embeddings and a second output layer, for
        the student's pieces.
        """
        del stage
        return {}

    def batches(self, parts: Any) -> Any:
        """Return the batches of a stage with these `StageParts`; None: those of its encoded rows.

        A collective; see `training.assembly`.
        """
        del parts

    def problems(self, config: Any) -> Iterator[str]:
        """Yield a line for every setting of the `RunConfig` that the method cannot work with."""
        del config
        return iter(())

    def unused(self, names: Collection[str], why: str) -> Iterator[str]:
        """Yield a line for every option that differs from its default and has no effect.

        The clause `why` states the reason, such as `method.distribution uniform ranks no teacher`.
        """
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name in names and value != option.default:
                default = "null" if option.default is None else option.default
                yield (
                    f"method.{option.name}: {value} has no effect (default {default}), because "
                    f"{why}; remove the key"
                )


@dataclass(config=STRICT, frozen=True, kw_only=True)
class OneTeacherOptions(MethodOptions):
    """Options of a method that learns from one teacher; the config may have several teachers.

    teacher: name of the teacher to learn from; null if the config has only one teacher.
    """

    teacher: str | None = None

    def problems(self, config: Any) -> Iterator[str]:
        names = [spec.name for spec in config.teachers]
        if names and self.teacher is None:
            yield (
                f'teachers: method "{self.name}" uses one of the teachers; set method.teacher to '
                f"{' or '.join(names)}"
            )
        if self.teacher is not None and self.teacher not in config.teacher_specs:
            yield no_such_teacher(config, "method.teacher", self.teacher)
        rollout = config.rollout
        if rollout is None or rollout.server is not None:
            return
        if self.teacher is not None and rollout.by not in (STUDENT, self.teacher):
            yield (
                f"rollout.by: {rollout.by} is not loaded, because method.teacher is "
                f"{self.teacher}; set rollout.by to student or {self.teacher}"
            )


def no_such_teacher(config: Any, key: str, name: str) -> str:
    """Return the error message for a key that names a teacher which the config does not have."""
    known = ", ".join(config.teacher_specs)
    return (
        f'{key}: there is no teacher "{name}"{suggestion(name, config.teacher_specs)} (known: '
        f"{known})"
    )


ROOM = "megakd.methods"
"""The package with a file or folder for every method; a file is imported when it is named."""


def _wrong_method(kind: Any) -> str | None:
    wrong = wrong_options(kind, MethodOptions, ())
    if wrong is None and not callable(getattr(file_of(kind), "run", None)):
        return f"{kind.__module__}, the file of {kind.__name__}, has no function run(config, lab)"
    return wrong


def _method(name: str) -> type[MethodOptions] | None:
    module = f"{ROOM}.{name}"
    if not name.isidentifier() or find_spec(module) is None:
        return None
    kinds = vars(importlib.import_module(module)).values()
    here = (kind for kind in kinds if getattr(kind, "__module__", None) == module)
    return next((kind for kind in here if _wrong_method(kind) is None), None)


def _methods() -> list[str]:
    files = pkgutil.iter_modules(importlib.import_module(ROOM).__path__)
    return [file.name for file in files if _method(file.name) is not None]


METHODS = Named("name", "method", _method, _methods, _wrong_method)


def methods_with(flag: str) -> list[str]:
    """Return the names of the methods whose options set a class variable of `MethodOptions`."""
    return [name for name in _methods() if getattr(METHODS.kind(name), flag)]


def file_of(options: MethodOptions | type[MethodOptions]) -> Any:
    """Return the module with a method's options, `run` and, if it has baselines, `BASELINES`."""
    return sys.modules[options.__module__]
