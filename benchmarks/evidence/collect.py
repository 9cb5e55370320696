"""Collects the runs of the other benchmarks as cells of the evidence.

Mixed vocabularies, HomoDistil, on-policy distillation and shrink have benchmarks of their own. This
module starts no run: it reads the reports of the runs that have finished with the settings of
`others.py`, and stores them in notebook/evidence/. An arm whose runs have not finished for a seed
has no cell with this seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence.cells import (
    VERSION,
    Cell,
    Stored,
    TeacherGate,
    read_stored,
    stored_path,
    with_cells,
    write_stored,
)
from evidence.others import COLLECTED, Source
from lib import launching
from lib.books import TEACHER
from lib.data import TASKS
from lib.launching import Report
from lib.options import command_of
from lib.tables import machine
from methods import homodistil, homodistil_decoder, mixed_vocabulary, on_policy, shrink
from methods.homodistil import ALONE, BASELINES, CUBIC, ONE_SHOT_ALONE, RANDOM

Reports = dict[str, Report | None]
"""By name of the run; None of a run that has not finished."""
LossOf = Callable[[homodistil.Found, str, int], float | None]
EVERY_SEED = 0
"""Stored as the seed of a teacher that serves all seeds."""
LIBRARIES = ("megakd", "torch", "transformers")
KL, STUDENT = "soft_target_kl", "student"


class Read(NamedTuple):
    """The runs of a comparison in a setting, by name; None if a run has not finished."""

    cells: Sequence[Cell]
    teachers: Sequence[TeacherGate]
    reports: Reports


def collect(folder: Path, data: Path, names: Iterable[str]) -> None:
    """Store the finished runs of comparisons, and print which runs have not finished.

    A setting is stored as soon as the reference arm has a cell. Stored cells of the same settings
    stay, unless a run of the same arm and seed is found.
    """
    for name in names:
        for setting, source in COLLECTED[name].sources.items():
            read = READERS[name](setting, source, data)
            for run, report in read.reports.items():
                if report is None:
                    print(f"{name} on {setting}: {run} has not finished", flush=True)
            if any(cell.arm == COLLECTED[name].reference for cell in read.cells):
                path = write_stored(folder, _stored(folder, name, setting, read))
                print(f"{path}: {len(read.cells)} cells", flush=True)
            else:
                print(f"{name} on {setting}: {advice(name, source)}", flush=True)


def advice(name: str, source: Source) -> str:
    found = COLLECTED[name]
    command = command_of(source.benchmark or found.benchmark, [*found.words, *source.options])
    return f"not stored without the arm {found.reference}; make the runs with `{command}`"


def _stored(folder: Path, name: str, setting: str, read: Read) -> Stored:
    source, settings = COLLECTED[name].sources[setting], digest(name, setting)
    path = stored_path(folder, name, setting)
    before = read_stored(path, settings=settings).cells if path.is_file() else ()
    stored = Stored(
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
    return with_cells(stored, read.cells)


def digest(name: str, setting: str) -> str:
    found = COLLECTED[name]
    source = {**dataclasses.asdict(found.sources[setting]), "title": None}
    del source["benchmark"], source["seeds"]
    text = json.dumps([VERSION, name, setting, found.arms, source], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions(reports: Reports) -> dict[str, str]:
    environment = next(r["environment"] for r in reports.values() if r is not None)
    libraries = {name: environment["versions"][name] for name in LIBRARIES}
    return {"python": environment["python"], **libraries}


def reports_of(
    legs: Iterable[launching.Leg], trees: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Reports:
    """Return the reports of legs by name.

    The configs that the legs override are written to a temporary folder, so that a benchmark that
    runs at the same time keeps its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        launching.write_leg_configs(Path(folder), trees)
        return {
            leg.name: launching.finished(
                leg._replace(
                    config=Path(folder) / "configs" / leg.config.name,
                    overrides=(*leg.overrides, *overrides),
                )
            )
            for leg in legs
        }


def _seconds(report: Report, stages: Iterable[Report] | None = None) -> float:
    """Return the CPU seconds of stages: their time on all threads of all ranks."""
    threads = report["environment"]["ranks"] * report["environment"]["threads"]
    chosen = report["stages"] if stages is None else stages
    return sum(stage["seconds"] for stage in chosen) * threads


def _cell(
    named: tuple[str, int],
    report: Report,
    stages: Sequence[Report],
    *,
    score: float,
    rows: int,
    **fields: Any,
) -> Cell:
    """Return a cell. named: arm and seed. rows: of a step that teachers read."""
    arm, seed = named
    steps = sum(stage["steps"] for stage in stages)
    spent = {"steps": steps, "cpu_seconds": _seconds(report, stages), "teacher_rows": steps * rows}
    known = {"basis": "steps", "divergence": None, **spent, **fields}
    return Cell(arm=arm, seed=seed, score=score, **known)


def _gate(final: float, curve: Sequence[float] = (), *, seed: int = EVERY_SEED) -> TeacherGate:
    return TeacherGate(teacher=TEACHER, seed=seed, scores=tuple(curve), final=final)


def _curve(folder: Path, key: str) -> list[float]:
    return [record[key] for record in launching.records_of(folder) if key in record]


def read_mixed_vocabulary(setting: str, source: Source, data: Path) -> Read:
    """Return the runs on a text, or on a task that the students learned after the books."""
    given = mixed_vocabulary.parse(["--data", str(data), *source.options])
    task = setting if setting in TASKS else None
    try:
        mixed_vocabulary.check(given)
    except launching.UnusableError as error:
        return Read((), (), {str(error): None})
    legs = [*mixed_vocabulary.student_legs(given)]
    legs += mixed_vocabulary.task_legs(given) if task else []
    # The large model is no arm: its shape is not the students'.
    legs = [leg for leg in legs if mixed_vocabulary.LARGE not in leg.name]
    reports = reports_of(legs, mixed_vocabulary.trees(given), source.overrides)
    found = mixed_vocabulary.Found(reports, given.seeds, given.tasks, teacher_bytes=0)
    cells = mixed_vocabulary_cells(found, task=task, rows=given.sizes.short_rows)
    log = given.teacher.parent if given.text == "books" and task is None else None
    return Read(cells, _mixed_teachers(found, task, log), reports)


def _mixed_teachers(
    found: mixed_vocabulary.Found, task: str | None, log: Path | None
) -> list[TeacherGate]:
    """Return the teacher's score on text, or its score on the task with every seed."""
    if task is not None:
        scores = {seed: found.score(task, TEACHER, seed) for seed in found.seeds}
        return [_gate(score, seed=seed) for seed, score in scores.items() if score is not None]
    report = next((r for s in found.seeds if (r := found.on_text(TEACHER, s)) is not None), None)
    if report is None:
        return []
    curve = [] if log is None else _curve(log, "eval/nats_per_character")
    return [_gate(mixed_vocabulary.nats(report, TEACHER), curve)]


def mixed_vocabulary_cells(
    found: mixed_vocabulary.Found, *, task: str | None, rows: int
) -> list[Cell]:
    """Return the cells on text, or on a task that the students learned after the text."""
    cells = list[Cell]()
    for arm, seed in itertools.product(COLLECTED["mixed_vocabulary"].arms, found.seeds):
        report = found.on_text(arm, seed)
        tuned = None if task is None else found.reports.get(f"{task}-{arm}-{seed}")
        if report is None or (task is not None and tuned is None):
            continue
        patient = mixed_vocabulary.PATIENT_KD
        steps = {one["name"]: one["steps"] for one in report["stages"]}
        learned = steps[patient if arm == patient else STUDENT]
        # In version 1 the teacher reads the rows beside the student, in version 2 before it.
        asked = 0 if arm == mixed_vocabulary.ALONE else steps.get("mixed-teacher", learned)
        stages = [s for s in report["stages"] if (s["name"] == patient) == (arm == patient)]
        score = mixed_vocabulary.nats(report, arm) if task is None else found.score(task, arm, seed)
        cell = _cell((arm, seed), report, stages, score=score, rows=rows)
        more, seconds = 0, cell.cpu_seconds
        if tuned is not None:
            more = launching.stage_of(tuned, STUDENT)["steps"]
            seconds += _seconds(tuned)
        spent = {"steps": learned + more, "cpu_seconds": seconds, "teacher_rows": asked * rows}
        cells.append(dataclasses.replace(cell, **spent))
    return cells


def read_homodistil(setting: str, source: Source, data: Path) -> Read:
    """Return the runs on the stories, whose teacher was trained elsewhere, or on the novels."""
    if setting == "stories260K":
        return _read_stories(source, data)
    given = homodistil.parse(["--data", str(data), *source.options])
    legs = [*homodistil.teacher_legs(given), *homodistil.pruning_legs(given)]
    reports = reports_of(legs, homodistil.trees(given), source.overrides)
    found = homodistil.Found(reports, given.seeds, given.tasks)
    cells = homodistil_cells(found, homodistil.held_out, rows=given.sizes.short_rows)
    gates = _pruned_gates(found, homodistil.held_out, _curve(given.out / TEACHER, "eval/loss"))
    return Read(cells, gates, reports)


def _read_stories(source: Source, data: Path) -> Read:
    given = homodistil_decoder.parse(["--data", str(data), *source.options])
    trees, loss_of = homodistil_decoder.trees(given), homodistil_decoder.loss_of
    rows = trees[homodistil_decoder.RUN]["train"]["per_device_train_batch_size"]
    reports = reports_of(homodistil_decoder.legs(given), trees, source.overrides)
    found = homodistil.Found(reports, given.seeds, ())
    cells = homodistil_cells(found, loss_of, rows=rows)
    steps = homodistil_decoder.steps_at_cost(found, given.steps)
    longer = reports_of(homodistil_decoder.cost_legs(given, steps), trees, source.overrides)
    renamed = homodistil_decoder.at_equal_cost(found, longer)
    trained_longer = homodistil_cells(renamed, loss_of, rows=rows)
    cells += homodistil_cost_cells(cells, trained_longer, steps)
    return Read(cells, _pruned_gates(found, loss_of, ()), {**reports, **longer})


def _pruned_gates(
    found: homodistil.Found, loss_of: LossOf, curve: Sequence[float]
) -> list[TeacherGate]:
    scores = (loss_of(found, TEACHER, seed) for seed in found.seeds)
    return [_gate(score, curve) for score in scores if score is not None][:1]


def homodistil_cells(found: homodistil.Found, loss_of: LossOf, *, rows: int) -> list[Cell]:
    cells = list[Cell]()
    for arm, seed in itertools.product(COLLECTED["homodistil"].arms, found.seeds):
        report, score = found.pruning(arm, seed), loss_of(found, arm, seed)
        if report is None or score is None:
            continue
        last = launching.stage_of(report, arm if arm in BASELINES else STUDENT)
        cells.append(
            _cell(
                (arm, seed),
                report,
                homodistil.stages_of(report, arm),
                score=score,
                rows=0 if arm in (ALONE, ONE_SHOT_ALONE) else rows,
                divergence=last["metrics"].get(KL),
            )
        )
    return cells


def homodistil_cost_cells(
    cells: Iterable[Cell], longer: Iterable[Cell], arms: Container[str]
) -> list[Cell]:
    """Return the cells at equal cost; the method and `random` have none."""
    same = [cell for cell in cells if cell.arm not in (CUBIC, RANDOM) and cell.arm not in arms]
    chosen = [*same, *(cell for cell in longer if cell.arm in arms)]
    return [dataclasses.replace(cell, basis="cost") for cell in chosen]


def read_on_policy(_: str, source: Source, __: Path) -> Read:
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
    legs = [launching.leg_of(given.out, name, name, (f"seed={seeds[name]}",)) for name in trees]
    reports = reports_of(legs, trees, source.overrides)
    rows = on_policy.common(given, 1, 1.0)["train"]["per_device_train_batch_size"]
    cells = list[Cell]()
    for name, named in arms.items():
        report = reports[name]
        if report is None:
            continue
        scored = on_policy.last_evaluation(given.out / name, STUDENT)
        cells.append(
            _cell(
                named,
                report,
                report["stages"],
                score=100 * scored["eval/match"],
                rows=0 if report["teacher"] is None else rows,
                divergence=scored.get(f"eval/{KL}"),
            )
        )
    curve = [100 * share for share in _curve(given.out / TEACHER, "eval/match")]
    return Read(cells, [_gate(curve[-1], curve)] if reports[TEACHER] else [], reports)


def read_shrink(_: str, source: Source, data: Path) -> Read:
    given = shrink.parse(["--data", str(data), *source.options])
    names = [name for name in given.runs if name in COLLECTED["shrink"].arms.values()]
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
            run=given.out / f"shrink-{seed}",
            rows=rows,
        )
    ]
    # The teacher of the stories was trained elsewhere.
    curve = _curve(given.teacher, "eval/loss") if given.case == "books" else []
    scores = (r["teacher"]["metrics"]["loss"] for r in reports.values() if r is not None)
    return Read(cells, [_gate(score, curve) for score in scores][:1], reports)


def shrink_cells(reports: Reports, seed: int, *, run: Path, rows: int) -> list[Cell]:
    cells = list[Cell]()
    for arm, name in COLLECTED["shrink"].arms.items():
        report = reports.get(name)
        if report is None:
            continue
        stages = [one for one in report["stages"] if one["name"] not in report["baselines"]]
        details: dict[str, float] = {"layers": shrink.chosen_of(report)}
        if arm == "shrink":
            details["loss before repair"] = shrink.cut_loss(run, shrink.chosen_of(report))
        loss = report[STUDENT]["metrics"]["loss"]
        cells.append(_cell((arm, seed), report, stages, score=loss, rows=rows, details=details))
    report = reports["shrink"]
    if report is not None:
        # The baseline of the run `shrink`.
        loss = report["baselines"]["random"]["loss"]
        stages = [launching.stage_of(report, "random")]
        cells.append(_cell(("random weights", seed), report, stages, score=loss, rows=rows))
    return cells


READERS: Mapping[str, Callable[[str, Source, Path], Read]] = {
    "mixed_vocabulary": read_mixed_vocabulary,
    "homodistil": read_homodistil,
    "on_policy": read_on_policy,
    "shrink": read_shrink,
}
