"""What the report says of teachers: each is measured once, where it is loaded anyway.

The first stage that loads a teacher measures it before the student is built, when nothing else
takes memory. A teacher that no stage loads, such as one whose answers are cached, is loaded for
the report. The result is kept on disk, so that a run that goes on does not measure it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from megakd.contract.results import ModelReport
from megakd.engine.activity import doing
from megakd.engine.collectives import on_main
from megakd.models.counting import named_shapes, parameter_counts
from megakd.models.source import ReadyTeacher
from megakd.process.phases import phase
from megakd.reports.samples import held_out_prompts
from megakd.scoring.evaluation import numbers
from megakd.servers.teachers import ServedTeacher
from megakd.storage import atomic
from megakd.storage.fingerprint import Fingerprint, as_read_back, flatten
from megakd.teachers.cached import CachedTeacher
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.evaluation_sets import set_metrics

if TYPE_CHECKING:
    from megakd.reports.samples import Prompts
    from megakd.training.engines import Assembly, ReadyTeacher


class Measured(NamedTuple):
    """What the report says of a model.

    report: size, and metrics on the held-out rows.
    sets: metrics on the named evaluation sets.
    answers: answers to the prompts; None without prompts, or with another tokenizer.
    """

    report: ModelReport
    sets: Mapping[str, Mapping[str, float]]
    answers: list[str] | None


@dataclass(frozen=True)
class TeacherScores:
    """The measurements of a run's teachers, in `checkpoints/<teacher>-scores.json`."""

    assembly: Assembly
    _found: dict[str, Measured] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> Prompts | None:
        """The prompts of the report; None if the task has no prompts."""
        prepared, config = self.assembly.prepared, self.assembly.config
        rows, device = prepared.encoded.held_out, self.assembly.ranks.device
        return held_out_prompts(rows, prepared.tokenizer, config.task, device)

    def known(self, name: str, ready: ReadyTeacher) -> Measured | None:
        """Return the measurement of a teacher; None if it has not been measured; a collective."""
        if name not in self._found:
            there = on_main(lambda: _read(self._path(name), self._facts(name, ready)))
            if there is not None:
                self._found[name] = there
        return self._found.get(name)

    def measured(self, name: str, ready: ReadyTeacher, model: FrozenTeacher) -> Measured:
        """Return the measurement of a loaded teacher, which is measured once; a collective."""
        known = self.known(name, ready)
        if known is not None:
            return known
        with phase("scoring"), doing(f"scoring {name}"):
            measured = self._found[name] = self._measure(name, model)
        on_main(lambda: self._write(name, ready, measured))
        return measured

    def _write(self, name: str, ready: ReadyTeacher, measured: Measured) -> None:
        record = {"facts": self._facts(name, ready), **measured._asdict()}
        atomic.write_json(self._path(name), record)

    def _measure(self, name: str, model: FrozenTeacher) -> Measured:
        own, shared = self.assembly.of(name), self.assembly.prepared
        prompts = self.prompts if shared.tokenizer_of(name) is shared.tokenizer else None
        answers = None if prompts is None else prompts.answers(model)
        return Measured(model_report(own, model), set_metrics(own, model), answers)

    def _path(self, name: str) -> Path:
        return self.assembly.config.output_dir / "checkpoints" / f"{name}-scores.json"

    def _facts(self, name: str, ready: ReadyTeacher) -> Fingerprint:
        own = self.assembly.of(name)
        rows = {"rows": own.prepared.splits.whole_hash}
        return flatten({**own.conditions, **rows, "teacher": own.frozen_facts(ready)})


def model_report(own: Assembly, model: FrozenTeacher) -> ModelReport:
    """Return size and metrics of a loaded model on the held-out rows; a collective.

    Args:
        own: the assembly with the tokenizer of the model.
        model: the model.
    """
    scored = own.scorer().scored(model.predict, own.prepared.encoded.held_out)
    counts = parameter_counts(named_shapes(model.model))
    report: ModelReport = {
        "parameters": counts.parameters,
        "encoder_parameters": counts.encoder_parameters,
        "metrics": scored.metrics,
    }
    if scored.by_class:
        report["per_class"] = scored.by_class
    return report


def _read(path: Path, facts: Fingerprint) -> Measured | None:
    """Read a measurement; None if there is none, or if it is damaged or of other inputs."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["facts"] != as_read_back(facts):
            return None
        report = {**record["report"], "metrics": numbers(record["report"]["metrics"])}
        sets = {name: numbers(metrics) for name, metrics in record["sets"].items()}
        return Measured(cast("ModelReport", report), sets, record["answers"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
