"""SKDBERT against its baselines, knowledge selection against its controls: one cell after another.

`python benchmarks/teachers.py [pydocs clinc150] [--table pool|kinds] [--seeds 1,2,3]`, on two CPU
ranks. For every task and seed three teachers learn the task, all-MiniLM-L6-v2 with 2, 4 and 6 of
its layers. Then the same student (2 x 64, random weights) is trained as many steps by each method:

* pool: a teacher drawn per step (uniform, by rank of teachers, by rank of students), the mean of
  all, MT-BERT, TAKD, each teacher alone; the teachers' answers come from caches on disk, except
  where teachers learn from each other;
* kinds: all four kinds of knowledge, each alone, random weights, and a selector, soft and hard.

Beside both: the student alone on the labels. Each cell has a folder,
runs/bench/teachers/<task>/<cell>-seed-<n>, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launching import ROOT, SHARED, fetch_teacher, launched, write_config
from legs import Leg, report_of
from machine import print_row
from minidisc_cases import CASES, prepared_task, training_sections
from options import integers
from real_cases import bert
from teachers_summary import Cell, cell_of, rows, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYERS = {"two": 2, "four": 4, "six": 6}
KINDS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse", "relation_fsp")
SOFT = "objective=[{loss: soft_target_kl}]"
POOL = {
    "uniform": "{name: skdbert}",
    "teacher_rank": "{name: skdbert, distribution: teacher_rank}",
    "student_rank": "{name: skdbert, distribution: student_rank}",
    "mean": "{name: mean_of_teachers}",
    "mt_bert": "{name: mt_bert}",
    "takd": "{name: takd}",
    **{f"one-{name}": f"{{name: single, teacher: {name}}}" for name in LAYERS},
}
SELECTION = {
    "all": "policy: all",
    "random_soft": "policy: random_soft",
    "random_hard": "policy: random_hard",
    "soft": "action: soft, episodes: 4",
    "hard": "action: hard, episodes: 4",
}


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints every cell."""
    given = parse(arguments)
    given.teacher = str(fetch_teacher())
    cells: list[Cell] = []
    for task in given.tasks:
        folder = given.output / "teachers" / task
        write_configs(folder, task, given)
        for seed in given.seeds:
            prepare(folder, seed, given)
            for leg in legs(folder, seed, given):
                cells.append(cell_of(task, seed, leg.name, report_of(leg, ranks=given.ranks)))
                print(table(cells), flush=True)
    command = shlex.join(["python", "benchmarks/teachers.py", *arguments])
    print_row("\n".join(rows(cells, command, f"{given.steps} steps, {given.ranks} rank(s)")))
    return 0


def write_configs(folder: Path, task: str, given: argparse.Namespace) -> None:
    """The configs that the cells of a task override."""
    section = prepared_task(task, given.data, folder) | {"labelled_examples": given.labels}
    student = {"model": bert(layers=2, width=64), "deepspeed": "zero2"}
    learning = training_sections(given, steps=given.steps, rate=given.rate)
    pool = [{"name": name, "model": "overridden"} for name in LAYERS]
    trees: dict[str, dict[str, Any]] = {
        "teacher": {
            "student": {"model": given.teacher, "deepspeed": "zero2"},
            "method": {"name": "finetune"},
            **training_sections(given, steps=given.teacher_steps, rate=given.teacher_rate),
        },
        "pool": {"teachers": pool, "student": student, "method": {"name": "skdbert"}, **learning},
        "kinds": {
            "teacher": {"model": "overridden"},
            "student": student,
            "method": {"name": "knowledge_selection"},
            **learning,
        },
        "alone": {"student": student, "method": {"name": "finetune"}, **learning},
    }
    # The tokenizer of the teachers serves the student that has none of its own.
    own = {"teacher": {}, "pool": {}, "kinds": {}, "alone": {"tokenizer": given.teacher}}
    for name, tree in trees.items():
        whole = {"output_dir": str(folder / name), "task": section | own[name], **tree}
        write_config(ROOT / folder / f"{name}.yaml", whole)


def prepare(folder: Path, seed: int, given: argparse.Namespace) -> None:
    """The seed's teachers, and for pools the caches of their answers."""
    for name, layers in LAYERS.items():
        output = folder / f"teacher-{name}-seed-{seed}"
        settings = (f"student.layers={layers}", f"seed={seed}")
        leg = Leg(name, folder / "teacher.yaml", output, settings)
        report_of(leg, ranks=given.ranks)
    if given.table == "pool":
        output = f"output_dir={folder / f'caches-seed-{seed}'}"
        settings = [*_teachers(folder, seed, cached=True), f"seed={seed}", output]
        if launched("cache_teacher", folder / "pool.yaml", given.ranks, settings) != 0:
            raise SystemExit("the teachers' answers could not be kept")


def _teachers(folder: Path, seed: int, *, cached: bool) -> Iterator[str]:
    for index, name in enumerate(LAYERS):
        yield f"teachers.{index}.model={folder / f'teacher-{name}-seed-{seed}' / 'final'}"
        if cached:
            yield f"teachers.{index}.cache={folder / f'caches-seed-{seed}' / name}"


def legs(folder: Path, seed: int, given: argparse.Namespace) -> Iterator[Leg]:
    """The cells of a seed."""
    yield _leg(folder, seed, "alone", "alone", ())
    if given.table == "pool":
        for name, method in POOL.items():
            # TAKD's teachers learn from each other; all else can be read from disk.
            teachers = _teachers(folder, seed, cached=name != "takd")
            objective = (SOFT,) if name.startswith("one-") else ()
            yield _leg(folder, seed, name, "pool", (*teachers, f"method={method}", *objective))
        return
    teacher = f"teacher.model={folder / f'teacher-six-seed-{seed}' / 'final'}"
    for kind in KINDS:
        objective = f"objective=[{{loss: {kind}}}]"
        settings = (teacher, "method={name: single}", objective)
        yield _leg(folder, seed, f"only-{kind}", "kinds", settings)
    for name, options in SELECTION.items():
        method = f"method={{name: knowledge_selection, {options}}}"
        yield _leg(folder, seed, f"kinds-{name}", "kinds", (teacher, method))


def _leg(folder: Path, seed: int, name: str, config: str, settings: tuple[str, ...]) -> Leg:
    output = folder / f"{name}-seed-{seed}"
    return Leg(name, folder / f"{config}.yaml", output, (*settings, f"seed={seed}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(CASES)}")
    parser.add_argument("--table", choices=("pool", "kinds"), default="pool")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--steps", type=int, default=300, help="of the student")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--teacher-steps", type=int, default=80)
    parser.add_argument("--teacher-rate", type=float, default=2e-4)
    parser.add_argument("--labels", type=int, default=2000, help="rows that keep their label")
    parser.add_argument("--rows", type=int, default=32, help="of each rank's batch")
    parser.add_argument("--evaluations", type=int, default=2, help="in every training")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=Path, default=SHARED, help="holds clinc150/")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    given = parser.parse_args(arguments)
    given.tasks = given.tasks or ["pydocs", "clinc150"]
    for task in given.tasks:
        if task not in CASES:
            parser.error(f"there is no task {task!r}; known: {', '.join(CASES)}")
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
