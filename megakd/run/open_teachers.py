"""Engines of teachers that stay open while consecutive stages ask the same teachers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from megakd.teachers.cached import CachedTeacher
from megakd.teachers.frozen import FrozenTeacher
from megakd.teachers.served import ServedTeacher
from megakd.training.engines import ReadyTeacher

Opened = FrozenTeacher | CachedTeacher | ServedTeacher


class _Entry(NamedTuple):
    ready: ReadyTeacher
    teacher: Opened


@dataclass(frozen=True)
class OpenTeachers:
    """The open teachers of the last stage, by name."""

    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Opened | None:
        """Return an open teacher; None if it is not open."""
        entry = self._entries.get(name)
        return entry and entry.teacher

    def add(self, name: str, ready: ReadyTeacher, teacher: Opened) -> None:
        """Keep an engine that was opened for a teacher."""
        self._entries[name] = _Entry(ready, teacher)

    def keep(self, wanted: Mapping[str, ReadyTeacher]) -> None:
        """Close all teachers except those of the next stage, if their models are the same.

        A teacher whose answers are cached or served is always closed; to open it costs nothing.
        """
        for name, (ready, teacher) in list(self._entries.items()):
            if not isinstance(teacher, FrozenTeacher) or wanted.get(name) is not ready:
                del self._entries[name]
                teacher.destroy()

    def close(self) -> None:
        """Close all teachers."""
        self.keep({})
