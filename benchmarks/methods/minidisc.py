"""MiniDisc against MaxiDisc and no assistant: does one trial choose well, and what does it cost?

`python benchmarks methods.minidisc [pydocs clinc150 sst2] [--seeds 1,2,3] [--teacher FOLDER]
[--set key=value]`, on two CPU ranks under DeepSpeed's launcher. For every task and seed a teacher
learns the task, then three legs distil it on the same grid with the same number of steps:

* minidisc: all assistants in one trial, the chosen one teaches the student;
* maxidisc: every assistant is trained, and a student through each;
* direct: the student without an assistant.

Each leg has a folder, runs/bench/minidisc/<task>/<leg>-seed-<n>, is gone on with where it was, and
is not started again once it has finished; a leg of other settings in its place is refused.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from lib.data import CLINC150, Config, bert, clinc150, sizes_of, write_labelled
from lib.launching import ROOT, SHARED, Leg, Report, report_of, seconds_of, write_config
from lib.options import command_of, fractions, integers, need, parser_of
from lib.tables import aligned, mean_and_deviation, mean_interval, print_rows, yes_or_no

METHODS = ("minidisc", "maxidisc", "direct")
TOKENIZER = {"type": "wordpiece", "vocab_size": 8000}
TASKS = {"pydocs": 600, "clinc150": 2500, "sst2": 1500}
"""Steps of 16 rows that a small teacher from scratch needs to learn each task."""
NEEDED = {"clinc150": CLINC150, "sst2": Path("glue/SST-2")}
DIFFERENCE_TARGET, TIME_TARGET, POINTS = -0.5, 0.6, 100


class Outcome(NamedTuple):
    """One task and seed; scores in points, on the split that the reports are about.

    tried: Spearman's correlation, over the grid, of the trade-offs of assistants that were trained
        one by one with the scores of the students that they taught.
    in_trial: likewise, of the trade-offs that MiniDisc's first trial saw.
    regret: what the best student has over the one taught by the assistant that MiniDisc chose,
        both trained by MaxiDisc, in points of the validation split.
    chosen: the sparsity that MiniDisc chose; best: of the assistant with the best student.
    ratio: MiniDisc's seconds of training over MaxiDisc's.
    to_best: MiniDisc's student against MaxiDisc's best. to_direct: against `direct`.
    """

    task: str
    seed: int
    teacher: float
    minidisc: float
    maxidisc: float
    direct: float
    to_best: float
    to_direct: float
    tried: float
    in_trial: float
    regret: float
    chosen: float
    best: float
    ratio: float
    seconds: float


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(ROOT / given.data / NEEDED[task] for task in given.tasks if task in NEEDED)
    outcomes: list[Outcome] = []
    for task in given.tasks:
        folder = given.output / "minidisc" / task
        write_configs(folder, task, given)
        for seed in given.seeds:
            made = [
                (leg.name, report_of(leg, ranks=given.ranks)) for leg in legs(folder, seed, given)
            ]
            outcomes.append(outcome(task, seed, dict(made[1:])))
            print(table(outcomes), flush=True)
    print(verdict(outcomes))
    what = f"teacher {given.teacher}, grid {given.grid}, {given.steps} steps, {given.ranks} rank(s)"
    print_rows(given.command, *rows(outcomes, what))
    return 0


def task_section(task: str, data: Path, folder: Path) -> Config:
    if task == "pydocs":
        section: Config = {"dataset": "pydocs", "max_length": 24, "max_eval_examples": 2000}
    elif task == "sst2":
        section = {"dataset": "glue/sst2", "data_dir": str(data / "glue"), "max_length": 64}
    else:
        for split, texts in clinc150(ROOT / data).items():
            write_labelled(ROOT / folder / "clinc150" / f"{split}.csv", texts)
        section = {"dataset": str(folder / "clinc150"), "max_length": 32}
        section |= {"text_columns": ["text"], "label_column": "label"}
    return {"type": "classification", **section}


def write_configs(folder: Path, task: str, given: argparse.Namespace) -> None:
    section = task_section(task, given.data, folder)
    is_size = re.fullmatch(r"\d+x\d+", given.teacher)
    layers, width = sizes_of(given.teacher) if is_size else (0, 0)
    model = {"config": bert(layers, width, width // 32)} if is_size else given.teacher
    teacher = {
        "task": section | ({"tokenizer": TOKENIZER} if is_size else {}),
        "student": {"model": model, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **training(given, given.teacher_steps or TASKS[task], given.teacher_rate),
    }
    # The legs that are compared override the method's name and the teacher's folder.
    schedule = {
        "task": section,
        "teacher": {"model": "overridden", "deepspeed": "teacher_zero3"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "minidisc",
            "target_sparsity": given.target,
            "sparsities": given.grid,
            "tradeoff": given.tradeoff,
        },
        **training(given, given.steps, given.rate),
    }
    for name, tree in (("teacher", teacher), ("schedule", schedule)):
        # Every leg gives its own folder on the command line.
        write_config(ROOT / folder / f"{name}.yaml", {"output_dir": str(folder / name), **tree})


def training(given: argparse.Namespace, steps: int, rate: float) -> Config:
    evaluate_every = max(1, steps // given.evaluations)
    return {
        "train": {
            "per_device_train_batch_size": given.rows,
            "max_steps": steps,
            "learning_rate": rate,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "max_grad_norm": 5.0,
        },
        "eval": {"eval_steps": evaluate_every, "per_device_eval_batch_size": 100},
        "save": {"save_steps": evaluate_every},
        "log": {"logging_steps": 25},
    }


def legs(folder: Path, seed: int, given: argparse.Namespace) -> list[Leg]:
    """Return the runs of one seed, in order: each teacher is its seed's."""

    def leg(name: str, config: str, *overrides: str) -> Leg:
        output = folder / f"{name}-seed-{seed}"
        return Leg(name, folder / f"{config}.yaml", output, (*overrides, f"seed={seed}"))

    teacher = leg("teacher", "teacher")
    model = f"teacher.model={teacher.output / 'final'}"
    others = (leg(name, "schedule", *given.set, f"method.name={name}", model) for name in METHODS)
    return [teacher, *others]


def outcome(task: str, seed: int, reports: Mapping[str, Report]) -> Outcome:
    minidisc, maxidisc = reports["minidisc"], reports["maxidisc"]
    students = {row["sparsity"]: row["student_metric"] for row in maxidisc["candidates"]}
    tried = {row["sparsity"]: row["tradeoff"] for row in maxidisc["candidates"]}
    trial = [row for row in minidisc["candidates"] if row["iteration"] == 1]
    chosen = next(row["sparsity"] for row in trial if row["chosen"])
    scores = {name: score(report) for name, report in reports.items()}
    seconds = {name: sum(seconds_of(report).values()) for name, report in reports.items()}
    return Outcome(
        task=task,
        seed=seed,
        teacher=score(minidisc, "teacher"),
        **scores,
        to_best=scores["minidisc"] - scores["maxidisc"],
        to_direct=scores["minidisc"] - scores["direct"],
        tried=correlation(tried, students),
        in_trial=correlation({row["sparsity"]: row["tradeoff"] for row in trial}, students),
        regret=POINTS * (max(students.values()) - students[chosen]),
        chosen=chosen,
        best=max(students, key=lambda sparsity: students[sparsity]),
        ratio=seconds["minidisc"] / seconds["maxidisc"],
        seconds=seconds["minidisc"],
    )


def score(report: Report, model: str = "student") -> float:
    """Return the headline metric of a model, in points."""
    return POINTS * report[model]["metrics"][report["metric_name"]]


def correlation(tradeoffs: Mapping[float, float], students: Mapping[float, float]) -> float:
    """Return Spearman's, over the sparsities that both have; NaN where it is not defined."""
    pairs = [(tradeoffs[sparsity], students[sparsity]) for sparsity in tradeoffs.keys() & students]
    if len(pairs) < 2 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def table(outcomes: Sequence[Outcome]) -> str:
    columns = Outcome._fields[2:]
    lines = [["task", "seed", *columns]]
    lines += ([o.task, str(o.seed), *(f"{value:.2f}" for value in o[2:])] for o in outcomes)
    means = (_mean(getattr(one, column) for one in outcomes) for column in columns)
    return aligned([*lines, ["mean", "", *(f"{mean:.2f}" for mean in means)]])


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return the claims, each with what was measured over all tasks and seeds."""
    mean, low, _ = mean_interval([one.to_best for one in outcomes])
    ratio = _mean(one.ratio for one in outcomes)
    tried, in_trial = (_with_interval(outcomes, name) for name in ("tried", "in_trial"))
    lines = [
        f"minidisc - maxidisc's best, points: {_with_interval(outcomes, 'to_best')}",
        f"  at least {DIFFERENCE_TARGET}: the mean {yes_or_no(mean >= DIFFERENCE_TARGET)}, "
        f"its whole interval {yes_or_no(low >= DIFFERENCE_TARGET)}",
        f"minidisc - direct, points: {_with_interval(outcomes, 'to_direct')}",
        f"correlation of trade-off and student, assistants tried: {tried}",
        f"correlation of trade-off and student, seen in the trial: {in_trial}",
        f"regret of the choice, points: {_with_interval(outcomes, 'regret')}",
        f"training time of minidisc / maxidisc: {ratio:.2f}",
        f"  at most {TIME_TARGET}: {yes_or_no(ratio <= TIME_TARGET)}",
    ]
    return "\n".join(lines)


def rows(outcomes: Sequence[Outcome], what: str) -> list[tuple[str, str, str]]:
    made = []
    for task in dict.fromkeys(one.task for one in outcomes):
        mine = [one for one in outcomes if one.task == task]
        names = ("teacher", *METHODS)
        means = {name: mean_and_deviation([getattr(o, name) for o in mine]) for name in names}
        numbers = ", ".join(f"{name} {mean:.2f}" for name, (mean, _) in means.items())
        numbers += f"; correlation {_mean(o.tried for o in mine):.2f}"
        numbers += f", in the trial {_mean(o.in_trial for o in mine):.2f}"
        numbers += f"; time {_mean(o.ratio for o in mine):.2f} of maxidisc's"
        spread = f"sd over {len(mine)} seed(s): "
        spread += ", ".join(f"{name} {deviation:.2f}" for name, (_, deviation) in means.items())
        spread += f"; to maxidisc's best {_with_interval(mine, 'to_best')}"
        made.append((f"{task}, {what}", numbers, spread))
    return made


def _with_interval(outcomes: Sequence[Outcome], name: str) -> str:
    defined = [value for one in outcomes if not math.isnan(value := getattr(one, name))]
    if not defined:
        return "not defined"
    mean, low, high = mean_interval(defined)
    return f"{mean:.2f}" if math.isnan(low) else f"{mean:.2f} (95 %: {low:.2f} to {high:.2f})"


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return float(np.mean(finite)) if finite else math.nan


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="default: all")
    parser.add_argument("--seeds", type=integers, default=[1], help="separated by commas")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--tradeoff", type=float, default=0.2)
    parser.add_argument("--teacher", default="4x192", help="layers x width, or a pretrained folder")
    parser.add_argument("--teacher-steps", type=int, help="default: what the task needs")
    parser.add_argument("--teacher-rate", type=float, default=5e-4)
    parser.add_argument("--steps", type=int, default=200, help="of a trial and of every leg")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--evaluations", type=int, default=2, help="in every training")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=Path, default=SHARED, help="holds clinc150/ and glue/SST-2/")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    changes = {"action": "append", "default": [], "metavar": "key=value"}
    parser.add_argument("--set", **changes, help="for the three schedules")
    given = parser.parse_args(arguments)
    given.command, given.tasks = command_of(__name__, arguments), given.tasks or list(TASKS)
    return given
