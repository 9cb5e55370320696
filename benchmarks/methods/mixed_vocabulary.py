"""Students with a small vocabulary of their own, against their controls: text, then tasks.

`python benchmarks methods.mixed_vocabulary --data FOLDER [--stages students,tasks,table]`, on the
CPU.

* students: for every seed, students of one small shape and with one vocabulary of 2000 pieces
  learn masked words, in as many steps at the same rate. `alone` has no teacher; `patient_kd` learns
  from the hidden states of a frozen teacher; `dual`, `dual_tables`, `down`, `up` and `matrices`
  (down, without norms and biases, with a measured weight) learn beside the teacher (version 1 of
  the method); `version_2` starts from a table that the teacher learned from random values, and
  `version_2_pieces` from one that began as the teacher's own embeddings, the default.
  `large_alone` has the shape and the vocabulary of the teacher, ten times the parameters, and
  starts from random weights.
* tasks: all models, and the teacher, learn tasks from labels; the last weights are scored.
* table: means and deviations over the seeds, and the differences from `alone`, seed by seed.

The text is that of `methods.homodistil` with the same held-out part, `--text pydocs`, which `python
launch/pydocs.py texts` writes, or `--text stories`, of which 5 % are held out. Losses are in nats
per character, which compares vocabularies. Rows have as many tokens in every vocabulary, so a row
of a large vocabulary has more characters. The teacher is that of `methods.homodistil`; `--quick`
trains a tiny teacher. Each run has a folder below `--out`, by text. A run that was stopped is
resumed, and a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lib import books, launching, stories
from lib.data import BOOKS, NO_DROPOUT, TASKS, Config, bert
from lib.options import add_runs, command_of, need, parsed, parser_of, words_of
from lib.tables import columns_of, print_models

STUDENTS = "students"
ALONE, PATIENT_KD, VERSION_2, LARGE = "alone", "patient_kd", "version_2", "large_alone"
ARMS = {
    ALONE: ("method.projections=none", f"baselines=[{PATIENT_KD}]"),
    "dual": ("method.projections=dual",),
    "dual_tables": ("method.projections=dual", "method.embeddings=true"),
    "down": ("method.projections=down",),
    "up": ("method.projections=up",),
    "matrices": ("method.projections=down", "method.vectors=false", "method.projection_ratio=0.3"),
    VERSION_2: ("method.version=2", "method.table=random"),
    f"{VERSION_2}_pieces": ("method.version=2", "method.table=pieces"),
}
"""The runs of the small student, with the settings that win over the config `students`."""
SMALL = (ALONE, PATIENT_KD, *(name for name in ARMS if name != ALONE))
"""The models of the small student's shape; `patient_kd` is a baseline of the run `alone`."""
MODELS = (books.TEACHER, LARGE, *SMALL)
BOOK_SIZES = books.Sizes(evaluations=10, rate=2e-3, task_rate=1e-3)
WIDE_RATE = 1e-3
"""Of `large_alone`, which diverges at the small models' rate."""
PRETRAINED = Path("runs/bench/homodistil/teacher/final")
OF_TRAINING = ("rows", "steps", "task_steps")
OF_STUDENT = ("layers", "vocabulary", "intermediate", "teacher_steps")


class Student(NamedTuple):
    """The small student, and how its teacher learns.

    vocabulary: pieces of the student's own vocabulary.
    teacher_steps: steps of the teacher in `version_2`, before the student's.
    teacher_rate: learning rate of the teacher, which is pretrained.
    """

    layers: int = 4
    width: int = 64
    heads: int = 2
    intermediate: int = 256
    vocabulary: int = 2000
    teacher_steps: int = 500
    teacher_rate: float = 1e-4


QUICK_STUDENT = Student(
    layers=books.QUICK.layers, width=16, heads=2, intermediate=32, vocabulary=200, teacher_steps=5
)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    text = (BOOKS,) if reads_books(given) else ()
    need(given.data / part for part in (*text, *(TASKS[name].data for name in given.tasks)))
    if not given.trains_teacher and not (given.teacher / "config.json").is_file():
        words = ["--data", str(given.data), "--stages", books.TEACHER]
        command = command_of("methods.homodistil", words)
        raise launching.UnusableError(
            f"the teacher {given.teacher} does not exist; make it with `{command}`"
        )
    make_teacher(given)
    launching.write_leg_configs(given.out, trees(given))
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def reads_books(given: argparse.Namespace) -> bool:
    return given.text == "books" or given.trains_teacher


def make_teacher(given: argparse.Namespace) -> None:
    if reads_books(given):
        books.write_text(given.data, given.out / "text", given.sizes)
    if given.trains_teacher:
        launching.write_leg_configs(given.out, {books.TEACHER: books.short_config(given)})
        leg = launching.leg_of(given.out, books.TEACHER, books.TEACHER, ())
        launching.report_of(leg, ranks=given.ranks)


def trees(given: argparse.Namespace) -> dict[str, Any]:
    configs = {STUDENTS: students_config(given), LARGE: large_config(given)}
    for name in given.tasks:
        configs[f"task-{name}"] = books.task_config(name, given)
        # Each model is read with the tokenizer in its own folder.
        del configs[f"task-{name}"]["task"]["tokenizer"]
    return configs


def text_section(given: argparse.Namespace) -> Config:
    """Masked words of the books, or of the docstrings of installed packages.

    All pieces of a word are masked together, so that vocabularies compare by characters.
    """
    sizes: books.Sizes = given.sizes
    if given.text == "books":
        task = books.text_task(given.out / "text", sizes.short)
    else:
        is_pydocs = given.text == "pydocs"
        dataset = "runs/pydocs-texts" if is_pydocs else str(given.data / stories.STORIES)
        task = {"type": "mlm", "dataset": dataset, "max_length": sizes.short}
        task["max_eval_examples"] = sizes.task_scored
    return task | {"whole_word_masking": True}


def students_config(given: argparse.Namespace) -> Config:
    """A small student with a vocabulary of its own; each arm overrides the settings of ARMS."""
    student: Student = given.student
    vocabulary = {"type": "wordpiece", "size": student.vocabulary}
    shape = {
        **bert(student.layers, student.width, student.heads),
        "intermediate_size": student.intermediate,
        "max_position_embeddings": given.sizes.short,  # enough for its short rows
        "initializer_range": books.INITIALIZER_RANGE,
        **NO_DROPOUT,
    }
    return {
        "task": text_section(given),
        "teacher": {"model": str(given.teacher), "deepspeed": "teacher_zero0"},
        "student": {"model": {"config": shape}, "deepspeed": "zero2"},
        "method": {"name": "mixed_vocabulary", "student_vocabulary": vocabulary},
        **_training(given),
    }


def arm_overrides(arm: str, student: Student) -> tuple[str, ...]:
    """Return what wins over the config `students`; the teacher learns in all arms but `alone`."""
    learning = {"teacher_learning_rate": student.teacher_rate} if arm != ALONE else {}
    if arm.startswith(VERSION_2):
        learning["teacher_steps"] = student.teacher_steps
    return (*ARMS[arm], *(f"method.{key}={value}" for key, value in learning.items()))


def large_config(given: argparse.Namespace) -> Config:
    """A student of the teacher's shape and vocabulary, which learns from random weights."""
    config = json.loads((given.teacher / "config.json").read_text(encoding="utf-8"))
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    shape = {key: config[key] for key in ("model_type", *sizes, "max_position_embeddings")}
    shape |= {"initializer_range": books.INITIALIZER_RANGE, **NO_DROPOUT}
    return {
        "task": {**text_section(given), "tokenizer": str(given.teacher)},
        "student": {"model": {"config": shape}, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **_training(given),
    }


def _training(given: argparse.Namespace) -> Config:
    sizes: books.Sizes = given.sizes
    train = books.text_train(sizes.short_rows // given.ranks, sizes.steps, sizes.rate)
    every = max(1, sizes.steps // sizes.evaluations)
    return books.common_sections(train, evaluate_every=every, log_every=max(1, every // 2))


def learn(given: argparse.Namespace) -> None:
    for leg in student_legs(given):
        launching.report_of(leg, ranks=given.ranks)


def tune(given: argparse.Namespace) -> None:
    launching.run_side_by_side(task_legs(given), jobs=given.jobs)


def tell(given: argparse.Namespace) -> None:
    reports = launching.reports_of([*student_legs(given), *task_legs(given)])
    models = {
        model: columns_of(given.seeds, partial(numbers, reports, given.tasks, model))
        for model in MODELS
    }
    print_models(f"mixed vocabulary, {given.text}", given.command, models, reference=ALONE)


STAGES = {STUDENTS: learn, "tasks": tune, "table": tell}


def student_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return the runs on text of all seeds; `patient_kd` is a baseline of `alone`."""
    wide = (LARGE, LARGE, (f"train.learning_rate={WIDE_RATE}",))
    arms = [
        wide if arm == LARGE else (arm, STUDENTS, arm_overrides(arm, given.student))
        for arm in given.arms
    ]
    return [
        launching.leg_of(given.out, f"{name}-{seed}", config, (*overrides, f"seed={seed}"))
        for seed in given.seeds
        for name, config, overrides in arms
    ]


def task_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return a run per model, task and seed; wide models learn tasks at a rate of their own."""
    legs = list[launching.Leg]()
    for seed in given.seeds:
        small = models(given, seed)
        wide = {name: small.pop(name) for name in (books.TEACHER, LARGE) if name in small}
        slower = (f"train.learning_rate={given.wide_task_rate}",)
        legs += books.task_legs_of(given.out, wide, given.tasks, seed=seed, overrides=slower)
        legs += books.task_legs_of(given.out, small, given.tasks, seed=seed)
    return legs


def models(given: argparse.Namespace, seed: int) -> dict[str, Path]:
    alone = given.out / f"{ALONE}-{seed}"
    return {
        books.TEACHER: given.teacher,
        **{name: given.out / f"{name}-{seed}" / "final" for name in given.arms},
        **({PATIENT_KD: alone / "stages" / PATIENT_KD} if ALONE in given.arms else {}),
    }


def numbers(
    reports: Mapping[str, launching.Report | None], tasks: Sequence[str], model: str, seed: int
) -> dict[str, float | None]:
    columns = {task: launching.points(reports.get(f"{task}-{model}-{seed}")) for task in tasks}
    # `patient_kd` is a baseline of `alone`, and every run has the teacher's score.
    of_alone = model in (books.TEACHER, PATIENT_KD)
    report = reports.get(f"{ALONE if of_alone else model}-{seed}")
    if report is None:
        return columns
    name = model if of_alone else "student"
    columns["nats/char"] = launching.metric_of(report, name, "nats_per_character", books.HELD_OUT)
    if model != books.TEACHER:
        # With those of a teacher that learns before.
        stages = launching.seconds_of(report)
        patient = stages.pop(PATIENT_KD, 0.0)
        columns["seconds"] = patient if model == PATIENT_KD else sum(stages.values())
        columns["parameters"] = report["student.parameters"]
    return columns


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "mixed_vocabulary", data="lm/, glue/, banking77/, …")
    parser.add_argument("--stages", type=words_of(STAGES), default=[*STAGES], help="with commas")
    parser.add_argument("--text", choices=("books", "pydocs", "stories"), default="books")
    parser.add_argument("--teacher", type=Path, help=f"pretrained encoder; default: {PRETRAINED}")
    tasks = {"type": words_of(TASKS), "default": ["sst2", "banking77"]}
    parser.add_argument("--tasks", **tasks, help=f"of {[*TASKS]}")
    arms = [*ARMS, LARGE]
    parser.add_argument("--arms", type=words_of(arms), default=arms, help=f"of {arms}")
    parser.add_argument("--ranks", type=int, default=2, help=f"of the stage {STUDENTS}")
    books.add_changeable(parser, (*OF_TRAINING, *OF_STUDENT))
    on_tasks = "rate of the teacher and of large_alone on tasks"
    parser.add_argument("--wide-task-rate", type=float, default=1e-4, help=on_tasks)
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    given = parsed(parser, __name__, arguments)
    given.sizes = (books.QUICK if given.quick else BOOK_SIZES)._replace(
        **books.changed(given, OF_TRAINING)
    )
    given.student = (QUICK_STUDENT if given.quick else Student())._replace(
        **books.changed(given, OF_STUDENT)
    )
    books.check_ranks(parser, given, given.sizes.short_rows)
    given.out /= given.text
    given.trains_teacher = given.quick and given.teacher is None
    teacher = (
        given.out / books.TEACHER / "final" if given.trains_teacher else launching.ROOT / PRETRAINED
    )
    given.teacher = given.teacher.resolve() if given.teacher else teacher
    return given
