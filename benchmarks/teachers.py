"""SKDBERT against its baselines, knowledge selection against its controls: one cell after another.

`python benchmarks/teachers.py [pydocs clinc150] [--table pool|kinds] [--seeds 1,2,3]`, on the CPU.
For every task three teachers learn it once, all-MiniLM-L6-v2 with 2, 4 and 6 of its layers. Then
the same student (2 x 64, random weights) is trained as many steps by each method, seed by seed:

* pool: a teacher drawn per step (uniform, by rank of teachers, by rank of students), the mean of
  all, MT-BERT, TAKD, each teacher alone; the teachers' answers come from caches on disk, except
  where teachers learn from each other;
* kinds: all four kinds of knowledge, each alone, random weights, a selector, soft and hard,
  from the teacher of 2 layers. With the first seed also with labels that mean nothing (planted).

Beside both: the student alone on the labels. Each cell has a folder,
runs/bench/teachers/<task>/<table>-<cell>-seed-<n>, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import random
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launching import ROOT, SHARED, fetch_teacher, launched, write_config
from legs import Leg, report_of
from machine import print_row
from minidisc_cases import prepared_task, training_sections
from options import integers
from real_cases import bert
from teachers_summary import Cell, cell_of, rows, selected, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Settings = tuple[str, str, tuple[str, ...]]
"""A cell's name, its config, and what wins over that."""


class Learning(NamedTuple):
    """The settings of a task.

    steps: of the student.
    teacher_steps: of each teacher, from labels.
    labels: rows that keep theirs.
    """

    steps: int
    teacher_steps: int
    labels: int


LEARNING = {"pydocs": Learning(150, 120, 2000), "clinc150": Learning(250, 240, 6000)}
ROWS, RATE = 64, 3e-3
# Transformers' 0.02 is meant for wide models: 64 wide, it takes thrice as many steps.
INITIALIZER_RANGE = 0.1
# Every cell scores its teachers too, which takes longer than the student does to learn.
SCORED_ROWS = 1500
TEACHER_ROWS, TEACHER_RATE = 32, 5e-4
# More than any teacher takes: teachers are evaluated and saved at their end alone.
TEACHER_EVERY = 300
LAYERS = {"two": 2, "four": 4, "six": 6}
KINDS_TEACHER = "two"
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
    # Whole sections: the controls refuse the options of a selector.
    **{
        policy: (f"method={{name: knowledge_selection, policy: {policy}}}",)
        for policy in ("all", "random_soft", "random_hard")
    },
    "soft": ("method.action=soft",),
    "hard": ("method.action=hard",),
}


def main(arguments: Sequence[str]) -> int:
    """Runs what has not finished, and prints every cell."""
    given = parse(arguments)
    given.teacher = str(fetch_teacher())
    cells: list[Cell] = []
    for task in given.tasks:
        folder = given.output / "teachers" / task
        write_configs(folder, task, given)
        prepare(folder, given)
        for cell in run_cells(folder, task, given):
            cells.append(cell)
            print(table(cells), flush=True)
    command = shlex.join(["python", "benchmarks/teachers.py", *arguments])
    print_row("\n".join(rows(cells, command, f"{given.table}, {given.ranks} rank(s)")))
    return 0


def run_cells(folder: Path, task: str, given: argparse.Namespace) -> Iterator[Cell]:
    """The cells of a task, `--jobs` of them side by side, seed by seed."""
    cells = [(seed, leg) for seed in given.seeds for leg in legs(folder, task, seed, given)]
    with ThreadPoolExecutor(given.jobs) as pool:
        yield from pool.map(lambda cell: _run_cell(task, *cell, given), cells)


def _run_cell(task: str, seed: int, leg: Leg, given: argparse.Namespace) -> Cell:
    report = report_of(leg, ranks=given.ranks, jobs=given.jobs)
    return cell_of(task, seed, leg.name, report)._replace(selected=selected(ROOT / leg.output))


def write_configs(folder: Path, task: str, given: argparse.Namespace) -> None:
    """The configs that the cells of a task override."""
    learning = LEARNING[task]
    rows = {"labelled_examples": learning.labels, "max_eval_examples": SCORED_ROWS}
    section = prepared_task(task, given.data, folder) | rows
    given.rows = ROWS // given.ranks
    train = training_sections(given, steps=given.steps or learning.steps, rate=RATE)
    trees = {
        "teacher": _teacher_tree(train, learning, given),
        **{name: tree | train for name, tree in _student_trees().items()},
    }
    # The tokenizer of the teachers serves the student that has none of its own.
    section_of = {"alone": section | {"tokenizer": given.teacher}}
    for name, tree in trees.items():
        run = {"output_dir": str(folder / name), "task": section_of.get(name, section)}
        write_config(ROOT / folder / f"{name}.yaml", run | tree)


def _teacher_tree(
    train: dict[str, Any], learning: Learning, given: argparse.Namespace
) -> dict[str, Any]:
    return {
        "student": {"model": given.teacher, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **train,
        "train": train["train"] | _teacher_learning(learning.teacher_steps, given),
        "eval": train["eval"] | {"eval_steps": TEACHER_EVERY},
        "save": {"save_steps": TEACHER_EVERY},
    }


def _student_trees() -> dict[str, dict[str, Any]]:
    """Return the models and methods of the student's cells, by config."""
    model = bert(layers=2, width=64)
    model["config"]["initializer_range"] = INITIALIZER_RANGE
    student = {"model": model, "deepspeed": "zero2"}
    selection = {"name": "knowledge_selection", "episodes": 3, "episode_steps": 100}
    return {
        "pool": {"teachers": _pool(), "student": student, "method": {"name": "skdbert"}},
        "kinds": {"teacher": {"model": "overridden"}, "student": student, "method": selection},
        "alone": {"student": student, "method": {"name": "finetune"}},
    }


def _teacher_learning(steps: int, given: argparse.Namespace) -> dict[str, Any]:
    rows = TEACHER_ROWS // given.ranks
    return {"per_device_train_batch_size": rows, "max_steps": steps, "learning_rate": TEACHER_RATE}


def _pool() -> list[dict[str, str]]:
    return [{"name": name, "model": "overridden"} for name in LAYERS]


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """The task's teachers, and for pools the caches of their answers."""
    legs = [
        Leg(name, folder / "teacher.yaml", folder / f"teacher-{name}", (f"student.layers={n}",))
        for name, n in reversed(LAYERS.items())
    ]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda leg: report_of(leg, ranks=given.ranks, jobs=given.jobs), legs))
    if given.table == "pool":
        settings = [*_teachers(folder, cached=True), f"output_dir={folder / 'caches'}"]
        if launched("cache_teacher", folder / "pool.yaml", given.ranks, settings) != 0:
            raise SystemExit("the teachers' answers could not be kept")


def _teachers(folder: Path, *, cached: bool) -> Iterator[str]:
    for index, name in enumerate(LAYERS):
        yield f"teachers.{index}.model={folder / f'teacher-{name}' / 'final'}"
        if cached:
            yield f"teachers.{index}.cache={folder / 'caches' / name}"


def legs(folder: Path, task: str, seed: int, given: argparse.Namespace) -> Iterator[Leg]:
    """The cells of a seed."""
    found: list[Settings] = [("alone", "alone", ())]
    if given.table == "pool":
        found += _pool_legs(folder, task, given)
    else:
        found += _kinds_legs(folder)
        if seed == given.seeds[0]:
            found += _planted_legs(folder)
    for name, config, settings in found:
        output = folder / f"{given.table}-{name}-seed-{seed}"
        yield Leg(name, folder / f"{config}.yaml", output, (*settings, f"seed={seed}"))


def _pool_legs(folder: Path, task: str, given: argparse.Namespace) -> Iterator[Settings]:
    taught = _teacher_learning(LEARNING[task].teacher_steps // 4, given)
    for name, method in POOL.items():
        settings = [*_teachers(folder, cached=name != "takd"), f"method={method}"]
        if name == "takd":
            # Its smaller teachers have learned from labels; a quarter of the steps follows.
            settings += [f"teachers.{index}.finetune={taught}" for index in (0, 1)]
        if name.startswith("one-"):
            settings.append(SOFT)
        yield name, "pool", tuple(settings)


def _kinds_legs(folder: Path) -> Iterator[Settings]:
    for kind in KINDS:
        objective = f"objective=[{{loss: {kind}}}]"
        yield f"only-{kind}", "kinds", (_kinds_teacher(folder), "method={name: single}", objective)
    for name, options in SELECTION.items():
        yield name, "kinds", (_kinds_teacher(folder), *options)


def _planted_legs(folder: Path) -> Iterator[Settings]:
    columns = ("task.text_columns=[text]", "task.label_column=label")
    planted = (f"task.dataset={plant(folder)}", *columns)
    for name in ("all", "soft"):
        settings = (_kinds_teacher(folder), *planted, *SELECTION[name])
        yield f"planted-{name}", "kinds", settings


def _kinds_teacher(folder: Path) -> str:
    return f"teacher.model={folder / f'teacher-{KINDS_TEACHER}' / 'final'}"


def plant(folder: Path) -> Path:
    """The task's rows as csv, with the labels of the training split shuffled among them."""
    from megakd.config.file import load_config
    from megakd.data.splits import load_splits
    from megakd.data.tables import SPLIT_NAMES
    from megakd.training.run_data import cache_folder

    task = load_config(ROOT / folder / "kinds.yaml").task
    task = dataclasses.replace(task, labelled_examples=None, max_eval_examples=None)
    splits = load_splits(task, seed=0, cache_dir=cache_folder())
    planted = folder / "planted"
    (ROOT / planted).mkdir(parents=True, exist_ok=True)
    for name, split in zip(SPLIT_NAMES, splits, strict=False):
        labels = [splits.label_names[label] for label in split["label"]]
        if name == "train":
            random.Random(0).shuffle(labels)
        with (ROOT / planted / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = zip(split["text"], labels, strict=True)
            csv.writer(file).writerows([("text", "label"), *rows])
    return planted


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(LEARNING)}")
    parser.add_argument("--table", choices=("pool", "kinds"), default="pool")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--steps", type=int, help="of the student, in place of the task's own")
    parser.add_argument("--evaluations", type=int, default=2, help="in every training")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--data", type=Path, default=SHARED, help="holds clinc150/")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    given = parser.parse_args(arguments)
    given.tasks = given.tasks or list(LEARNING)
    for task in given.tasks:
        if task not in LEARNING:
            parser.error(f"there is no task {task!r}; known: {', '.join(LEARNING)}")
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
