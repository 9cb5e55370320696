"""Summary of the runs of `mixed_vocabulary.py`: losses, tasks, sizes, and gains over `alone`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from homodistil_cases import HELD_OUT
from machine import markdown_row, mean_and_deviation, print_row
from mixed_vocabulary_cases import ALONE, LARGE, PATIENT_KD, SMALL, TEACHER
from summary import aligned

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NATS = "nats/char"
MODELS = (TEACHER, LARGE, *SMALL)
MOST_MEGABYTES, LEAST_RATIO, MOST_POINTS = 7, 10, 3
SST2 = "sst2"

Numbers = dict[str, dict[int, float]]
"""Values by column and seed."""


class Found(NamedTuple):
    """The reports of the runs by name, None of a run that has not finished.

    teacher_bytes: size of the teacher's weights as stored.
    """

    reports: Mapping[str, Mapping[str, Any] | None]
    seeds: Sequence[int]
    tasks: Sequence[str]
    teacher_bytes: int

    def on_text(self, model: str, seed: int) -> Mapping[str, Any] | None:
        """Return the report of the run that scored a model on text."""
        run = ALONE if model in (TEACHER, PATIENT_KD) else model
        return self.reports.get(f"{run}-{seed}")

    def score(self, task: str, model: str, seed: int) -> float | None:
        """Return the main metric of a task, in points."""
        report = self.reports.get(f"{task}-{model}-{seed}")
        return None if report is None else 100 * report["student"]["metrics"][report["metric_name"]]

    def teacher_parameters(self) -> int | None:
        """Return the number of the teacher's weights, which all runs with a teacher report."""
        teachers = (report["teacher"] for report in self.reports.values() if report is not None)
        return next((teacher["parameters"] for teacher in teachers if teacher), None)


def show(found: Found, text: str, command: str) -> None:
    """Print the tables, the verdicts, and the rows for docs/measurements.md."""
    lines = {model: numbers(found, model) for model in MODELS}
    print(_table("model", lines, _cell))
    gains = {model: less_alone(lines, model, found.tasks) for model in (LARGE, *SMALL[1:])}
    print(f"\nless {ALONE}, seed by seed, in nats/char and points:")
    print(_table("model", gains, _gain))
    print("\n".join(verdicts(lines)))
    made = [row(model, lines[model], gains.get(model, {}), (text, command)) for model in MODELS]
    print_row("\n".join(made))


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


def on_text(found: Found, model: str, report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers of a run on text."""
    whole = found.teacher_parameters()
    values: dict[str, float | None] = {NATS: nats(report, model)}
    if model == TEACHER:
        return {**values, "parameters": whole, "MB": found.teacher_bytes / 1e6}
    parameters = report["student"]["parameters"]
    return {
        **values,
        "parameters": parameters,
        "MB": report["student"]["bytes"] / 1e6,
        "of teacher": None if whole is None else parameters / whole,
        "seconds": seconds(report, model),
    }


def nats(report: Mapping[str, Any], model: str) -> float:
    """Return the nats per character on all held-out books, or on the test split of pydocs."""
    name = model if model in (TEACHER, PATIENT_KD) else "student"
    sets = report["evaluation_sets"]
    if HELD_OUT in sets:
        metrics = sets[HELD_OUT]["metrics"][name]
    elif name in report["baselines"]:
        metrics = report["baselines"][name]
    else:
        metrics = report[name]["metrics"]
    return metrics["nats_per_character"]


def seconds(report: Mapping[str, Any], model: str) -> float:
    """Return the seconds of training on text, with those of a teacher that learns before."""
    stages = {stage["name"]: stage["seconds"] for stage in report["stages"]}
    own = stages.pop(PATIENT_KD, 0.0)
    return own if model == PATIENT_KD else sum(stages.values())


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
    said = list[str]()
    small, large = lines[ALONE], lines[LARGE]
    if "MB" in small:
        size = _mean(small["MB"])
        line = f"small student: {_mean(small['parameters']):,.0f} parameters, {size:.2f} MB, below "
        said.append(f"{line}{MOST_MEGABYTES} MB: {_answer(size < MOST_MEGABYTES)}")
    if "MB" in small and "MB" in large:
        ratio = _mean(large["parameters"]) / _mean(small["parameters"])
        line = f"{LARGE}: {_mean(large['parameters']):,.0f} parameters, {ratio:.2f} times as many"
        said.append(f"{line}, at least {LEAST_RATIO}: {_answer(ratio >= LEAST_RATIO)}")
    return [*said, _on_sst2(lines)]


def _on_sst2(lines: Mapping[str, Numbers]) -> str:
    scores = {model: _mean(lines[model][SST2]) for model in SMALL if lines[model].get(SST2)}
    if not scores or not lines[LARGE].get(SST2):
        return f"SST-2: the small students or {LARGE} have not been scored"
    best, large = max(scores, key=lambda model: scores[model]), _mean(lines[LARGE][SST2])
    is_near = large - scores[best] <= MOST_POINTS
    line = f"SST-2: best small student {best} {scores[best]:.2f}, {LARGE} {large:.2f}; within"
    return f"{line} {MOST_POINTS} points: {_answer(is_near)}"


def row(model: str, line: Numbers, gains: Numbers, run: tuple[str, str]) -> str:
    """Return a model's row for docs/measurements.md; `run` is the text and the command."""
    text, command = run
    values = {title: list(by_seed.values()) for title, by_seed in line.items() if by_seed}
    means = {title: _plain(mean_and_deviation(given)[0]) for title, given in values.items()}
    deviations = {t: f"{mean_and_deviation(v)[1]:.2g}" for t, v in values.items() if len(v) > 1}
    spread = f"sd over seeds: {_listed(deviations)}" if deviations else "one seed"
    differences = {title: _gain([*by.values()]) for title, by in gains.items() if by}
    if differences:
        spread += f"; less {ALONE}: {_listed(differences)}"
    return markdown_row(f"mixed vocabulary, {text}, {model}", command, _listed(means), spread)


def _table(corner: str, lines: Mapping[str, Numbers], cell: Any) -> str:
    titles = list(dict.fromkeys(title for line in lines.values() for title in line))
    cells = [[m, *(cell([*line.get(t, {}).values()]) for t in titles)] for m, line in lines.items()]
    return aligned([[corner, *titles], *cells])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{_plain(mean)} ±{deviation:.2g}" if deviation else _plain(mean)


def _gain(values: Sequence[float]) -> str:
    """Return the mean, its deviation, and every seed's difference."""
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    by_seed = ", ".join(f"{value:+.3g}" for value in values)
    return by_seed if len(values) == 1 else f"{mean:+.3g} ±{deviation:.2g} ({by_seed})"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{title} {value}" for title, value in values.items())


def _mean(values: Mapping[int, float]) -> float:
    return mean_and_deviation([*values.values()])[0]


def _answer(is_met: bool) -> str:  # noqa: FBT001
    return "yes" if is_met else "no"
