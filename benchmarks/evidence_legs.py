"""Collects the runs of the other benchmarks as cells of the evidence.

Mixed vocabularies, HomoDistil, on-policy distillation and shrink have benchmarks of their own. This
module starts no run: it reads the reports of the runs that have finished with the settings of
`evidence_others.py`, and stores them in notebook/evidence/.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import homodistil
import homodistil_decoder
import homodistil_summary
import mixed_vocabulary
import mixed_vocabulary_summary
import on_policy
import shrink
from evidence_cells import (
    VERSION,
    Cell,
    Stored,
    TeacherGate,
    read_stored,
    stored_path,
    with_cells,
    write_stored,
)
from evidence_leg_cells import (
    homodistil_cells,
    homodistil_cost_cells,
    logged,
    mixed_vocabulary_cells,
    on_policy_cell,
    shrink_cells,
)
from evidence_others import COLLECTED, Source
from homodistil_cases import TASKS
from legs import Leg, finished, leg_of, write_leg_configs
from machine import machine
from mixed_vocabulary_cases import LARGE, TEACHER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from evidence_leg_cells import LossOf, Report, Reports

EVERY_SEED = 0
"""Stored as the seed of a teacher that serves all seeds."""
LIBRARIES = ("megakd", "torch", "transformers")


class Read(NamedTuple):
    """The runs of a comparison in a setting.

    missing: what has not finished. reports: of the runs that have.
    """

    cells: Sequence[Cell]
    teachers: Sequence[TeacherGate]
    reports: Reports

    @property
    def missing(self) -> list[str]:
        """Return the names of the runs that have not finished."""
        return [name for name, report in self.reports.items() if report is None]


def collect(folder: Path, data: Path, names: Iterable[str]) -> None:
    """Store the finished runs of comparisons, and print which runs have not finished.

    A setting is stored as soon as the reference arm has a cell. Stored cells of the same settings
    stay, unless a run of the same arm and seed is found.

    Args:
        folder: folder of the stored cells.
        data: data folder that the runs have read.
        names: of the comparisons.

    Raises:
        MegakdError: a folder of runs holds a run of other settings.
        StoredCellError: the stored cells belong to other settings.
    """
    for name in names:
        for setting, source in COLLECTED[name].sources.items():
            read = READERS[name](setting, source, data)
            for missing in read.missing:
                print(f"{name} on {setting}: {missing} has not finished", flush=True)
            if any(cell.arm == COLLECTED[name].reference for cell in read.cells):
                path = write_stored(folder, _stored(folder, name, setting, read))
                print(f"{path}: {len(read.cells)} cells", flush=True)
            else:
                print(f"{name} on {setting}: {advice(name, source)}", flush=True)


def advice(name: str, source: Source) -> str:
    """Return how the runs of a setting are made."""
    script, *options = COLLECTED[name].command
    path = f"benchmarks/{source.script or script}"
    words = shlex.join(["python", path, *options, *source.options])
    return f"not stored without the arm {COLLECTED[name].reference}; make the runs with `{words}`"


def _stored(folder: Path, name: str, setting: str, read: Read) -> Stored:
    source, settings = COLLECTED[name].sources[setting], digest(name, setting)
    path = stored_path(folder, name, setting)
    before = read_stored(path, settings=settings).cells if path.is_file() else ()
    found = Stored(
        comparison=name,
        setting=setting,
        settings=settings,
        start=source.start,
        metric=source.metric,
        lower_is_better=source.lower_is_better,
        machine=machine(),
        versions=_versions(read.reports),
        teachers=tuple(read.teachers),
        cells=before,
    )
    return with_cells(found, read.cells)


def digest(name: str, setting: str) -> str:
    """Return a digest of the definitions of a comparison in a setting."""
    found = COLLECTED[name]
    source = {**dataclasses.asdict(found.sources[setting]), "title": None}
    del source["script"], source["seeds"]
    text = json.dumps([VERSION, name, setting, found.arms, source], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(reports: Reports) -> dict[str, str]:
    """Return the versions that the first finished run has used."""
    environment = next(r["environment"] for r in reports.values() if r is not None)
    libraries = {name: environment["versions"][name] for name in LIBRARIES}
    return {"python": environment["python"], **libraries}


def reports_of(
    legs: Iterable[Leg], trees: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Reports:
    """Return the reports of legs by name.

    The configs that the legs override are written to a temporary folder, so that a benchmark that
    runs at the same time keeps its own.

    Args:
        legs: of one benchmark.
        trees: the configs that the legs override, by name.
        overrides: of all configs.

    Raises:
        MegakdError: a folder holds a run of other settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_leg_configs(Path(folder), trees)
        return {leg.name: finished(_moved(leg, Path(folder), overrides)) for leg in legs}


def _moved(leg: Leg, folder: Path, overrides: Sequence[str]) -> Leg:
    config = folder / "configs" / leg.config.name
    return leg._replace(config=config, overrides=(*leg.overrides, *overrides))


def read_mixed_vocabulary(setting: str, source: Source, data: Path) -> Read:
    """Return the runs on a text, or on a task that the students learned after the books."""
    given = mixed_vocabulary.parse(["--data", str(data), *source.options])
    task = setting if setting in TASKS else None
    problem = mixed_vocabulary.missing(given)
    if problem is not None:
        return Read((), (), {problem: None})
    legs = [*mixed_vocabulary.student_legs(given)]
    legs += mixed_vocabulary.task_legs(given) if task else []
    # The large model is no arm: its shape is not the students'.
    legs = [leg for leg in legs if LARGE not in leg.name]
    reports = reports_of(legs, mixed_vocabulary.trees(given), source.overrides)
    found = mixed_vocabulary_summary.Found(reports, given.seeds, given.tasks, teacher_bytes=0)
    cells = mixed_vocabulary_cells(found, task=task, rows=given.sizes.short_rows)
    log = given.teacher.parent if given.text == "books" and task is None else None
    return Read(cells, _mixed_teachers(found, task, log), reports)


def _mixed_teachers(
    found: mixed_vocabulary_summary.Found, task: str | None, log: Path | None
) -> list[TeacherGate]:
    """Return the teacher's score on text, or its score on the task with every seed."""
    if task is not None:
        scores = {seed: found.score(task, TEACHER, seed) for seed in found.seeds}
        return [_gate(score, seed=seed) for seed, score in scores.items() if score is not None]
    report = next((r for s in found.seeds if (r := found.on_text(TEACHER, s)) is not None), None)
    if report is None:
        return []
    curve = [] if log is None else logged(log, "eval/nats_per_character")
    return [_gate(mixed_vocabulary_summary.nats(report, TEACHER), curve)]


def _gate(final: float, curve: Sequence[float] = (), *, seed: int = EVERY_SEED) -> TeacherGate:
    return TeacherGate(teacher=TEACHER, seed=seed, scores=tuple(curve), final=final)


def read_homodistil(setting: str, source: Source, data: Path) -> Read:
    """Return the runs on the stories, whose teacher was trained elsewhere, or on the novels."""
    return _read_stories(source, data) if setting == "stories260K" else _read_novels(source, data)


def _read_stories(source: Source, data: Path) -> Read:
    given = homodistil_decoder.parse(["--data", str(data), *source.options])
    trees = homodistil_decoder.trees(given)
    rows = trees[homodistil_decoder.RUN]["train"]["per_device_train_batch_size"]
    reports = reports_of(homodistil_decoder.legs(given), trees, source.overrides)
    found = homodistil_summary.Found(reports, given.seeds, ())
    read = _homodistil(found, homodistil_decoder.loss_of, curve=(), rows=rows)
    steps = homodistil_decoder.steps_at_cost(found, given.steps)
    longer = reports_of(homodistil_decoder.cost_legs(given, steps), trees, source.overrides)
    renamed = homodistil_decoder.at_equal_cost(found, longer)
    trained_longer = homodistil_cells(renamed, homodistil_decoder.loss_of, rows=rows)
    return Read(
        cells=[*read.cells, *homodistil_cost_cells(read.cells, trained_longer, steps)],
        teachers=read.teachers,
        reports={**reports, **longer},
    )


def _read_novels(source: Source, data: Path) -> Read:
    given = homodistil.parse(["--data", str(data), *source.options])
    legs = [*homodistil.teacher_legs(given), *homodistil.pruning_legs(given)]
    reports = reports_of(legs, homodistil.trees(given), source.overrides)
    found = homodistil_summary.Found(reports, given.seeds, given.tasks)
    return _homodistil(
        found,
        homodistil_summary.held_out,
        curve=logged(given.out / TEACHER, "eval/loss"),
        rows=given.sizes.short_rows,
    )


def _homodistil(
    found: homodistil_summary.Found,
    loss_of: LossOf,
    *,
    curve: Sequence[float],
    rows: int,
) -> Read:
    cells = homodistil_cells(found, loss_of, rows=rows)
    scores = (loss_of(found, TEACHER, seed) for seed in found.seeds)
    gates = [_gate(score, curve) for score in scores if score is not None][:1]
    return Read(cells, gates, {**found.reports})


def read_on_policy(_: str, source: Source, __: Path) -> Read:
    """Return the runs on sums in steps."""
    given = on_policy.parse(source.options)
    arms = {
        f"{name}-{seed}": (arm, seed)
        for arm, name in COLLECTED["on_policy"].arms.items()
        for seed in given.seeds
    }
    trees = {TEACHER: on_policy.teacher_config(given)} | {
        name: on_policy.arm(given, arm, given.out / f"half-way-{seed}" / "final")
        for name, (arm, seed) in arms.items()
    }
    seeds = {TEACHER: EVERY_SEED, **{name: seed for name, (_, seed) in arms.items()}}
    legs = [leg_of(given.out, name, name, (f"seed={seeds[name]}",)) for name in trees]
    reports = reports_of(legs, trees, source.overrides)
    rows = on_policy.common(given, 1, 1.0)["train"]["per_device_train_batch_size"]
    cells = [
        on_policy_cell(*arms[name], report, _last_evaluation(given.out / name), rows=rows)
        for name, report in reports.items()
        if name in arms and report is not None
    ]
    curve = [100 * share for share in logged(given.out / TEACHER, "eval/match")]
    return Read(cells, [_gate(curve[-1], curve)] if reports[TEACHER] else [], reports)


def _last_evaluation(folder: Path) -> dict[str, float]:
    return on_policy.last_evaluation(folder, "student")


def read_shrink(_: str, source: Source, data: Path) -> Read:
    """Return the runs of a case."""
    given = shrink.parse(["--data", str(data), *source.options])
    known = COLLECTED["shrink"].arms.values()
    names = [name for name in given.runs if name in known]
    tree = shrink.config(given)
    legs = [shrink.leg(given, name, seed) for seed in given.seeds for name in names]
    reports = reports_of(legs, {"run": tree}, source.overrides)
    rows = tree["train"]["per_device_train_batch_size"]
    cells = [
        cell
        for seed in given.seeds
        for cell in shrink_cells(
            {name: reports[f"{name}-{seed}"] for name in names},
            seed,
            metrics=given.out / f"shrink-{seed}" / "metrics.jsonl",
            rows=rows,
        )
    ]
    # The teacher of the stories was trained elsewhere.
    curve = logged(given.teacher, "eval/loss") if given.case == "books" else []
    scores = (_teacher_loss(report) for report in reports.values() if report is not None)
    return Read(cells, [_gate(score, curve) for score in scores][:1], reports)


def _teacher_loss(report: Report) -> float:
    return report["teacher"]["metrics"]["loss"]


READERS: Mapping[str, Callable[[str, Source, Path], Read]] = {
    "mixed_vocabulary": read_mixed_vocabulary,
    "homodistil": read_homodistil,
    "on_policy": read_on_policy,
    "shrink": read_shrink,
}
