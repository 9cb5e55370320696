"""Students with a small vocabulary of their own, against their controls: text, then tasks.

`python benchmarks methods.mixed_vocabulary --data FOLDER [--stages students,tasks,table]`, on the
CPU.

* students: for every seed, students of one small shape and with one vocabulary of 2000 pieces
  learn masked words, in as many steps at the same rate. `alone` has no teacher; `patient_kd` learns
  from the hidden states of a frozen teacher; `dual`, `dual_tables`, `down` and `up` learn beside
  the teacher (version 1 of the method); `version_2` starts from a table that the teacher learned.
  `large_alone` has the shape and the vocabulary of the teacher, ten times the parameters, and
  starts from random weights.
* tasks: all models, and the teacher, learn tasks from labels; the last weights are scored.
* table: means and deviations over the seeds, and the differences from `alone`, seed by seed.

The text is that of `methods.homodistil` with the same held-out part, or `--text pydocs`, scored on
its test split. Losses are in nats per character, which compares vocabularies. Rows have as many
tokens in every vocabulary, so a row of a large vocabulary has more characters. The teacher is that
of `methods.homodistil`; `--quick` trains a tiny teacher. Each run has a folder below `--out`, by
text. A run that was stopped is resumed, and a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import books, launching
from lib.data import BOOKS, NO_DROPOUT, TASKS, Config, bert
from lib.options import add_runs, command_of, need, parsed, parser_of, words_of
from lib.tables import mean_and_deviation, print_rows, table_of, yes_or_no

STUDENTS = "students"
TEXTS = ("books", "pydocs")
ALONE, PATIENT_KD, VERSION_2, LARGE = "alone", "patient_kd", "version_2", "large_alone"
ARMS = {
    ALONE: ("method.projections=none", f"baselines=[{PATIENT_KD}]"),
    "dual": ("method.projections=dual",),
    "dual_tables": ("method.projections=dual", "method.embeddings=true"),
    "down": ("method.projections=down",),
    "up": ("method.projections=up",),
    VERSION_2: ("method.version=2",),
}
"""The runs of the small student, with the settings that win over the config `students`."""
SMALL = (ALONE, PATIENT_KD, *(name for name in ARMS if name != ALONE))
"""The models of the small student's shape; `patient_kd` is a baseline of the run `alone`."""
MODELS = (books.TEACHER, LARGE, *SMALL)
SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
BOOK_SIZES = books.Sizes(evaluations=10, rate=2e-3, task_rate=1e-3)
WIDE_RATE, WIDE_TASK_RATE = 1e-3, 1e-4
PRETRAINED = Path("runs/bench/homodistil/teacher/final")
CHOSEN = ("sst2", "banking77")
OF_TRAINING = {"steps": int, "rate": float, "task_steps": int, "task_rate": float}
NATS, SST2 = "nats/char", "sst2"
MOST_MEGABYTES, LEAST_RATIO, MOST_POINTS = 7, 10, 3
Numbers = dict[str, dict[int, float]]
"""Values by column and seed."""


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
OF_STUDENT = {name: type(value) for name, value in Student()._asdict().items()}


class Found(NamedTuple):
    """The reports of the runs by name, None of a run that has not finished.

    teacher_bytes: size of the teacher's weights as stored.
    """

    reports: Mapping[str, launching.Report | None]
    seeds: Sequence[int]
    tasks: Sequence[str]
    teacher_bytes: int

    def on_text(self, model: str, seed: int) -> launching.Report | None:
        run = ALONE if model in (books.TEACHER, PATIENT_KD) else model
        return self.reports.get(f"{run}-{seed}")

    def score(self, task: str, model: str, seed: int) -> float | None:
        """Return the main metric of a task, in points."""
        report = self.reports.get(f"{task}-{model}-{seed}")
        return None if report is None else 100 * report["student"]["metrics"][report["metric_name"]]

    def teacher_parameters(self) -> int | None:
        """Return the number of the teacher's weights, which all runs with a teacher report."""
        teachers = (report["teacher"] for report in self.reports.values() if report is not None)
        return next((teacher["parameters"] for teacher in teachers if teacher), None)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    check(given)
    make_teacher(given)
    launching.write_leg_configs(given.out, trees(given))
    for stage in given.stages:
        STAGES[stage](given)
    return 0


def check(given: argparse.Namespace) -> None:
    text = (BOOKS,) if reads_books(given) else ()
    need(given.data / part for part in (*text, *(TASKS[name].data for name in given.tasks)))
    if not given.trains_teacher and not (given.teacher / "config.json").is_file():
        words = ["--data", str(given.data), "--stages", books.TEACHER]
        command = command_of("methods.homodistil", words)
        raise launching.UnusableError(
            f"the teacher {given.teacher} does not exist; make it with `{command}`"
        )


def reads_books(given: argparse.Namespace) -> bool:
    return given.text == "books" or given.trains_teacher


def make_teacher(given: argparse.Namespace) -> None:
    """Write the text of the books, and train the tiny teacher of `--quick`."""
    if reads_books(given):
        books.write_text(given.data, given.out / "text", given.sizes)
    if given.trains_teacher:
        launching.write_leg_configs(
            given.out, {books.TEACHER: books.short_config(given.out, given)}
        )
        launching.report_of(
            launching.leg_of(given.out, books.TEACHER, books.TEACHER, ()), ranks=given.ranks
        )


def trees(given: argparse.Namespace) -> dict[str, Any]:
    configs = {STUDENTS: students_config(given), LARGE: large_config(given)}
    for name in given.tasks:
        configs[f"task-{name}"] = books.task_config(name, given.out, given)
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
        task = {"type": "mlm", "dataset": "pydocs", "max_length": sizes.short}
        task["max_eval_examples"] = sizes.task_scored
    return task | {"whole_word_masking": True}


def students_config(given: argparse.Namespace) -> Config:
    """A small student with a vocabulary of its own; each arm overrides the settings of ARMS."""
    vocabulary = {"type": "wordpiece", "size": given.student.vocabulary}
    return {
        "task": text_section(given),
        "teacher": {"model": str(given.teacher), "deepspeed": "teacher_zero0"},
        "student": {"model": {"config": small_shape(given)}, "deepspeed": "zero2"},
        "method": {"name": "mixed_vocabulary", "student_vocabulary": vocabulary},
        **_training(given),
    }


def arm_overrides(arm: str, student: Student) -> tuple[str, ...]:
    """Return what wins over the config `students`; the teacher learns in all arms but `alone`."""
    learning = {"teacher_learning_rate": student.teacher_rate} if arm != ALONE else {}
    if arm == VERSION_2:
        learning["teacher_steps"] = student.teacher_steps
    return (*ARMS[arm], *(f"method.{key}={value}" for key, value in learning.items()))


def large_config(given: argparse.Namespace) -> Config:
    """A student of the teacher's shape and vocabulary, which learns from random weights."""
    return {
        "task": {**text_section(given), "tokenizer": str(given.teacher)},
        "student": {"model": {"config": large_shape(given.teacher)}, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **_training(given),
    }


def small_shape(given: argparse.Namespace) -> Config:
    """The shape of the small student; a table of positions for its short rows is enough."""
    student: Student = given.student
    return {
        **bert(student.layers, student.width, student.heads),
        "intermediate_size": student.intermediate,
        "max_position_embeddings": given.sizes.short,
        "initializer_range": books.INITIALIZER_RANGE,
        **NO_DROPOUT,
    }


def large_shape(teacher: Path) -> Config:
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    shape = {key: config[key] for key in SHAPE}
    return {**shape, "initializer_range": books.INITIALIZER_RANGE, **NO_DROPOUT}


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
    teacher_bytes = sum(file.stat().st_size for file in given.teacher.glob("*.safetensors"))
    show(Found(reports, given.seeds, given.tasks, teacher_bytes), given.text, given.command)


STAGES = {STUDENTS: learn, "tasks": tune, "table": tell}


def student_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return the runs on text of all seeds; `patient_kd` is a baseline of `alone`."""
    wide = (LARGE, LARGE, (f"train.learning_rate={given.wide_rate}",))
    small = [(arm, STUDENTS, arm_overrides(arm, given.student)) for arm in given.arms]
    return [
        launching.leg_of(given.out, f"{name}-{seed}", config, (*overrides, f"seed={seed}"))
        for seed in given.seeds
        for name, config, overrides in (*small, wide)
    ]


def task_legs(given: argparse.Namespace) -> list[launching.Leg]:
    """Return a run per model, task and seed; wide models learn tasks at a rate of their own."""
    legs = list[launching.Leg]()
    for seed in given.seeds:
        small = models(given, seed)
        wide = {name: small.pop(name) for name in (books.TEACHER, LARGE)}
        slower = (f"train.learning_rate={given.wide_task_rate}",)
        legs += books.task_legs_of(given.out, wide, given.tasks, seed=seed, overrides=slower)
        legs += books.task_legs_of(given.out, small, given.tasks, seed=seed)
    return legs


def models(given: argparse.Namespace, seed: int) -> dict[str, Path]:
    alone = given.out / f"{ALONE}-{seed}"
    return {
        books.TEACHER: given.teacher,
        **{name: given.out / f"{name}-{seed}" / "final" for name in (*given.arms, LARGE)},
        **({PATIENT_KD: alone / "stages" / PATIENT_KD} if ALONE in given.arms else {}),
    }


def show(found: Found, text: str, command: str) -> None:
    lines = {model: numbers(found, model) for model in MODELS}
    print(table_of("model", _texts(lines, _cell)))
    gains = {model: less_alone(lines, model, found.tasks) for model in (LARGE, *SMALL[1:])}
    print(f"\nless {ALONE}, seed by seed, in nats/char and points:")
    print(table_of("model", _texts(gains, _gain)))
    print("\n".join(verdicts(lines)))
    cells, differences = _texts(lines, _cell), _texts(gains, _gain)
    print_rows(
        command,
        *(
            (
                f"mixed vocabulary, {text}, {model}",
                _listed(cells[model]),
                f"less {ALONE}: {_listed(differences[model])}" if model in differences else "-",
            )
            for model in MODELS
        ),
    )


def numbers(found: Found, model: str) -> Numbers:
    """Return every column's values by seed, without those of runs that have not finished."""
    columns: Numbers = {title: {} for title in (NATS, *found.tasks)}
    for seed in found.seeds:
        scores = {task: found.score(task, model, seed) for task in found.tasks}
        report = found.on_text(model, seed)
        text = {} if report is None else on_text(found, model, report)
        for title, value in {**text, **scores}.items():
            if value is not None:
                columns.setdefault(title, {})[seed] = value
    return columns


def on_text(found: Found, model: str, report: launching.Report) -> dict[str, float | None]:
    whole = found.teacher_parameters()
    values: dict[str, float | None] = {NATS: nats(report, model)}
    if model == books.TEACHER:
        return {**values, "parameters": whole, "MB": found.teacher_bytes / 1e6}
    parameters = report["student"]["parameters"]
    return {
        **values,
        "parameters": parameters,
        "MB": report["student"]["bytes"] / 1e6,
        "of teacher": None if whole is None else parameters / whole,
        "seconds": seconds(report, model),
    }


def nats(report: launching.Report, model: str) -> float:
    """Return the nats per character on all held-out books, or on the test split of pydocs."""
    name = model if model in (books.TEACHER, PATIENT_KD) else "student"
    sets = report["evaluation_sets"]
    if books.HELD_OUT in sets:
        metrics = sets[books.HELD_OUT]["metrics"][name]
    elif name in report["baselines"]:
        metrics = report["baselines"][name]
    else:
        metrics = report[name]["metrics"]
    return metrics["nats_per_character"]


def seconds(report: launching.Report, model: str) -> float:
    """Return the seconds of training on text, with those of a teacher that learns before."""
    stages = launching.seconds_of(report)
    patient = stages.pop(PATIENT_KD, 0.0)
    return patient if model == PATIENT_KD else sum(stages.values())


def less_alone(lines: Mapping[str, Numbers], model: str, tasks: Iterable[str]) -> Numbers:
    """Return a model's scores less those of `alone` with the same seed."""
    return {
        title: {
            seed: value - lines[ALONE][title][seed]
            for seed, value in lines[model][title].items()
            if seed in lines[ALONE][title]
        }
        for title in (NATS, *tasks)
    }


def verdicts(lines: Mapping[str, Numbers]) -> list[str]:
    """Return what the sizes and the scores on SST-2 say about the claims."""
    small, large, told = lines[ALONE], lines[LARGE], list[str]()
    if "MB" in small:
        size = _mean(small["MB"])
        line = f"small student: {_mean(small['parameters']):,.0f} parameters, {size:.2f} MB, below "
        told.append(f"{line}{MOST_MEGABYTES} MB: {yes_or_no(size < MOST_MEGABYTES)}")
    if "MB" in small and "MB" in large:
        ratio = _mean(large["parameters"]) / _mean(small["parameters"])
        line = f"{LARGE}: {_mean(large['parameters']):,.0f} parameters, {ratio:.2f} times as many"
        told.append(f"{line}, at least {LEAST_RATIO}: {yes_or_no(ratio >= LEAST_RATIO)}")
    scores = {model: _mean(lines[model][SST2]) for model in SMALL if lines[model].get(SST2)}
    if not scores or not large.get(SST2):
        return [*told, f"SST-2: the small students or {LARGE} have not been scored"]
    best, score = max(scores, key=lambda model: scores[model]), _mean(large[SST2])
    is_near = score - scores[best] <= MOST_POINTS
    line = f"SST-2: best small student {best} {scores[best]:.2f}, {LARGE} {score:.2f}; within"
    return [*told, f"{line} {MOST_POINTS} points: {yes_or_no(is_near)}"]


def _texts(lines: Mapping[str, Numbers], cell: Any) -> dict[str, dict[str, str]]:
    return {
        model: {title: cell([*by_seed.values()]) for title, by_seed in line.items() if by_seed}
        for model, line in lines.items()
    }


def _cell(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}"
    return f"{text} ±{deviation:.2g}" if deviation else text


def _gain(values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    by_seed = ", ".join(f"{value:+.3g}" for value in values)
    return by_seed if len(values) == 1 else f"{mean:+.3g} ±{deviation:.2g} ({by_seed})"


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{title} {value}" for title, value in values.items())


def _mean(values: Mapping[int, float]) -> float:
    return mean_and_deviation([*values.values()])[0]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    given = parsed(parser, __name__, arguments)
    given.sizes = (books.QUICK if given.quick else BOOK_SIZES)._replace(
        **books.changed(given, OF_TRAINING)
    )
    student = QUICK_STUDENT if given.quick else Student()
    given.student = student._replace(**books.changed(given, OF_STUDENT))
    books.check_ranks(parser, given, given.sizes.short_rows)
    given.out /= given.text
    given.trains_teacher = given.quick and given.teacher is None
    teacher = (
        given.out / books.TEACHER / "final" if given.trains_teacher else launching.ROOT / PRETRAINED
    )
    given.teacher = given.teacher.resolve() if given.teacher else teacher
    return given


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    add_runs(parser, "mixed_vocabulary", data="lm/, glue/, banking77/, …")
    parser.add_argument("--stages", type=words_of(STAGES), default=[*STAGES], help="with commas")
    parser.add_argument("--text", choices=TEXTS, default="books")
    parser.add_argument("--teacher", type=Path, help=f"pretrained encoder; default: {PRETRAINED}")
    parser.add_argument("--tasks", type=words_of(TASKS), default=[*CHOSEN], help=f"of {[*TASKS]}")
    parser.add_argument("--arms", type=words_of(ARMS), default=[*ARMS], help=f"of {[*ARMS]}")
    parser.add_argument("--ranks", type=int, default=2, help=f"of the stage {STUDENTS}")
    books.add_changeable(parser, OF_TRAINING | OF_STUDENT)
    wide = "rate of large_alone, which diverges at the small models' rate"
    parser.add_argument("--wide-rate", type=float, default=WIDE_RATE, help=wide)
    on_tasks = "rate of the teacher and of large_alone on tasks"
    parser.add_argument("--wide-task-rate", type=float, default=WIDE_TASK_RATE, help=on_tasks)
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps")
    # The tiny teacher's config reads this option of methods.homodistil.
    parser.set_defaults(bf16=False)
    return parser
