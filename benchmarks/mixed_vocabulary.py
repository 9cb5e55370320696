"""Students with a small vocabulary of their own, against their controls: text, then tasks.

`python benchmarks/mixed_vocabulary.py --data FOLDER [--stages students,tasks,table]`, on the CPU.

* students: for every seed, students of one small shape and with one vocabulary of 2000 pieces
  learn masked words, in as many steps at the same rate. `alone` has no teacher; `patient_kd` learns
  from the hidden states of a frozen teacher; `dual`, `dual_tables`, `down` and `up` learn beside
  the teacher (version 1 of the method); `version_2` starts from a table that the teacher learned.
  `large_alone` has the shape and the vocabulary of the teacher, ten times the parameters, and
  starts from random weights.
* tasks: all models, and the teacher, learn tasks from labels; the last weights are scored.
* table: means and deviations over the seeds, and the differences from `alone`, seed by seed.

The text is that of `homodistil.py` with the same held-out part, or `--text pydocs`, scored on its
test split. Losses are in nats per character, which compares vocabularies. Rows have as many tokens
in every vocabulary, so a row of a large vocabulary has more characters. The teacher is that of
`homodistil.py`; `--quick` trains a tiny teacher. Each run has a folder below `--out`, by text. A
run that was stopped is resumed, and a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from homodistil_cases import BOOKS, QUICK, TASKS, write_text
from launching import ROOT
from legs import (
    Leg,
    leg_of,
    report_of,
    reports_of,
    run_side_by_side,
    task_legs_of,
    write_leg_configs,
)
from mixed_vocabulary_cases import (
    ALONE,
    ARMS,
    BOOK_SIZES,
    LARGE,
    PATIENT_KD,
    QUICK_STUDENT,
    TEACHER,
    Student,
    Text,
    arm_overrides,
    large_config,
    own_task_config,
    students_config,
    tiny_teacher_config,
)
from mixed_vocabulary_summary import Found, show
from options import integers, positive, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

STUDENTS = "students"
WIDE_RATE, WIDE_TASK_RATE = 1e-3, 1e-4
PRETRAINED = Path("runs/bench/homodistil/teacher/final")
CHOSEN = ("sst2", "banking77")
OF_TRAINING = {"steps": int, "rate": float, "task_steps": int, "task_rate": float}
OF_STUDENT = {
    "layers": int,
    "width": int,
    "heads": int,
    "intermediate": int,
    "vocabulary": int,
    "teacher_steps": int,
    "teacher_rate": float,
}


def main(arguments: Sequence[str]) -> int:
    """Run the stages that were asked for; finished runs are not repeated."""
    given = parse(arguments)
    problem = missing(given)
    if problem is not None:
        print(f"mixed_vocabulary: error: {problem}", file=sys.stderr)
        return 1
    make_teacher(given)
    write_configs(given)
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def missing(given: argparse.Namespace) -> str | None:
    """Return the error of the first path that does not exist."""
    books = (BOOKS,) if reads_books(given) else ()
    for part in (*books, *(TASKS[name].data for name in given.tasks)):
        if not (given.data / part).exists():
            return f"{given.data / part} does not exist"
    if given.trains_teacher or (given.teacher / "config.json").is_file():
        return None
    command = ["python", "benchmarks/homodistil.py", "--data", str(given.data), "--stages", TEACHER]
    return f"the teacher {given.teacher} does not exist; make it with `{shlex.join(command)}`"


def reads_books(given: argparse.Namespace) -> bool:
    """Return whether a run learns the books."""
    return given.text == "books" or given.trains_teacher


def make_teacher(given: argparse.Namespace) -> None:
    """Write the text of the books, and train the tiny teacher of `--quick`."""
    if reads_books(given):
        write_text(given.data, given.out / "text", given.sizes)
    if given.trains_teacher:
        write_leg_configs(given.out, {TEACHER: tiny_teacher_config(given)})
        report_of(leg_of(given.out, TEACHER, TEACHER, ()), ranks=given.ranks)


def write_configs(given: argparse.Namespace) -> None:
    """Write the configs that the runs override."""
    write_leg_configs(given.out, trees(given))


def trees(given: argparse.Namespace) -> dict[str, Any]:
    """Return the configs that the runs override, by name."""
    return {
        STUDENTS: students_config(given),
        LARGE: large_config(given),
        **{f"task-{name}": own_task_config(name, given) for name in given.tasks},
    }


def learn(given: argparse.Namespace) -> None:
    """Train the students of all seeds."""
    for leg in student_legs(given):
        report_of(leg, ranks=given.ranks)


def tune(given: argparse.Namespace) -> None:
    """Train every model on every task, `--jobs` side by side."""
    run_side_by_side(task_legs(given), jobs=given.jobs)


def tell(given: argparse.Namespace) -> None:
    """Print the tables of what has finished."""
    reports = reports_of([*student_legs(given), *task_legs(given)])
    teacher_bytes = sum(file.stat().st_size for file in given.teacher.glob("*.safetensors"))
    found = Found(reports, given.seeds, given.tasks, teacher_bytes)
    show(found, given.text, given.command)


STAGES = {STUDENTS: learn, "tasks": tune, "table": tell}


def student_legs(given: argparse.Namespace) -> list[Leg]:
    """Return the runs on text of all seeds; `patient_kd` is a baseline of `alone`."""
    return [
        leg_of(given.out, f"{name}-{seed}", config, (*own, f"seed={seed}"))
        for seed in given.seeds
        for name, config, own in (
            *((arm, STUDENTS, arm_overrides(arm, given.student)) for arm in given.arms),
            (LARGE, LARGE, (f"train.learning_rate={given.wide_rate}",)),
        )
    ]


def task_legs(given: argparse.Namespace) -> list[Leg]:
    """Return a run per model, task and seed; wide models learn tasks at a rate of their own."""
    legs = list[Leg]()
    for seed in given.seeds:
        found = models(given, seed)
        wide = {name: found.pop(name) for name in (TEACHER, LARGE)}
        slower = (f"train.learning_rate={given.wide_task_rate}",)
        legs += task_legs_of(given.out, wide, given.tasks, seed=seed, overrides=slower)
        legs += task_legs_of(given.out, found, given.tasks, seed=seed)
    return legs


def models(given: argparse.Namespace, seed: int) -> dict[str, Path]:
    """Return the folders of a seed's finished models."""
    alone = given.out / f"{ALONE}-{seed}"
    return {
        TEACHER: given.teacher,
        **{name: given.out / f"{name}-{seed}" / "final" for name in (*given.arms, LARGE)},
        **({PATIENT_KD: alone / "stages" / PATIENT_KD} if ALONE in given.arms else {}),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = _parser()
    given = parser.parse_args(arguments)
    given.command = shlex.join(["python", "benchmarks/mixed_vocabulary.py", *arguments])
    given.sizes = (QUICK if given.quick else BOOK_SIZES)._replace(**_changed(given, OF_TRAINING))
    given.student = (QUICK_STUDENT if given.quick else Student())._replace(
        **_changed(given, OF_STUDENT)
    )
    if given.sizes.short_rows % given.ranks:
        rows = given.sizes.short_rows
        parser.error(f"--ranks: {rows} rows cannot be shared by {given.ranks} ranks")
    # The runs start in the repository.
    given.data, given.out = given.data.resolve(), ROOT / given.out / given.text
    given.trains_teacher = given.quick and given.teacher is None
    own = given.out / TEACHER / "final" if given.trains_teacher else ROOT / PRETRAINED
    given.teacher = given.teacher.resolve() if given.teacher else own
    return given


def _changed(given: argparse.Namespace, names: dict[str, type]) -> dict[str, float]:
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, required=True, help="holds lm/, glue/, banking77/, …")
    parser.add_argument("--stages", type=words_of(STAGES), default=[*STAGES], help="with commas")
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3], help="separated by commas")
    parser.add_argument("--text", choices=get_args(Text), default="books")
    parser.add_argument("--teacher", type=Path, help=f"pretrained encoder; default: {PRETRAINED}")
    parser.add_argument("--tasks", type=words_of(TASKS), default=[*CHOSEN], help=f"of {[*TASKS]}")
    parser.add_argument("--arms", type=words_of(ARMS), default=[*ARMS], help=f"of {[*ARMS]}")
    parser.add_argument("--ranks", type=int, default=2, help=f"of the stage {STUDENTS}")
    parser.add_argument(
        "--jobs", type=positive, default=2, help="tasks side by side, one rank each"
    )
    for name, kind in (OF_TRAINING | OF_STUDENT).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, help="in place of the benchmark's own")
    wide = "rate of large_alone, which diverges at the small models' rate"
    parser.add_argument("--wide-rate", type=float, default=WIDE_RATE, help=wide)
    on_tasks = "rate of the teacher and of large_alone on tasks"
    parser.add_argument("--wide-task-rate", type=float, default=WIDE_TASK_RATE, help=on_tasks)
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/mixed_vocabulary"))
    # The tiny teacher's config reads this option of homodistil.py.
    parser.set_defaults(bf16=False)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
