"""A report in rows and columns: as plain text here, as HTML in `report_html`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from megakd.config import STUDENT, TEACHER
from megakd.evaluation import LOWER_IS_BETTER

if TYPE_CHECKING:
    from pathlib import Path

    from megakd.report import CandidateReport, CostReport, ModelReport, PoolReport, Report


def result_table(report: Report, *, final: Path | None = None) -> str:
    """The report as aligned plain text, for the end of a run.

    Args:
        report: the content of report.json.
        final: where the student's folder is.
    """
    lines = [f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}", ""]
    lines += aligned_rows(model_rows(report))
    if report["candidates"]:
        lines += ["", *aligned_rows(candidate_rows(report["candidates"]))]
    pool = report.get("pool")
    if pool is not None:
        lines += ["", *aligned_rows(pool_rows(pool))]
    if report["stages"]:
        lines += ["", *aligned_rows(stage_rows(report))]
        peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
        seconds = sum(stage["seconds"] for stage in report["stages"])
        lines += ["", f"training {duration(seconds)}, peak memory {gigabytes(peak)} per rank"]
    cost = report.get("cost")
    if cost is not None:
        lines.append(cost_line(cost))
    if final is not None:
        lines.append(f"the student is in {final}")
    return "\n".join(lines)


def cost_line(cost: CostReport) -> str:
    """What the choice of the assistant cost beside trying all of them."""
    spent, whole = cost["seconds"], cost["maxidisc_seconds"]
    times = f" ({whole / spent:.1f}x)" if spent > 0 else ""
    return (
        f"{_trials(cost['trials'])}, {duration(spent)}; every assistant tried (MaxiDisc): "
        f"{_trials(cost['maxidisc_trials'])}, about {duration(whole)}{times}"
    )


def _trials(number: int) -> str:
    return f"{number} trial{'' if number == 1 else 's'}"


def sized_models(report: Report) -> dict[str, ModelReport]:
    """The models that have a size of their own, by name, from the teacher to the student.

    A report of an earlier version has no assistants, latencies, cost or pool of teachers.
    """
    assistants = {entry["name"]: entry for entry in report.get("assistants", ())}
    return {**teachers_of(report), **assistants, STUDENT: report["student"]}


def teachers_of(report: Report) -> dict[str, ModelReport]:
    """The teachers of the config by name."""
    pool: dict[str, ModelReport] = {entry["name"]: entry for entry in report.get("teachers", ())}
    return pool or ({} if report["teacher"] is None else {TEACHER: report["teacher"]})


def largest(teachers: Mapping[str, ModelReport]) -> str | None:
    """The name of the teacher that students are measured against; None where there is none."""
    return max(teachers, key=lambda name: teachers[name]["parameters"], default=None)


def milliseconds(report: Report) -> dict[int, dict[str, float]]:
    """Times of a forward by batch, smallest first, and model; only what was measured."""
    speedup = report["speedup"]
    found: dict[int, dict[str, float]] = {}
    if speedup is not None:
        teacher = largest(teachers_of(report)) or TEACHER
        times = {teacher: speedup["teacher_ms"], STUDENT: speedup["student_ms"]}
        found[speedup["batch"]] = {name: ms for name, ms in times.items() if _is_time(ms)}
    for entry in report.get("latency", ()):
        if _is_time(entry["ms"]):
            found.setdefault(entry["batch"], {})[entry["model"]] = entry["ms"]
    return dict(sorted(found.items()))


def _is_time(value: float | None) -> bool:
    return is_number(value) and value > 0


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of report.json can be shown: null stands for what was not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def model_rows(report: Report) -> list[list[str]]:
    """Titles, then one row per model: size, scores, and times where they were measured."""
    times = milliseconds(report) or {0: {}}
    titles = ["", "parameters", "encoder", "size MB", *report["student"]["metrics"], "kept"]
    for batch in times:
        titles += [f"ms (batch {batch})" if batch else "ms", "speed-up"]
    models = [(name, model, model["metrics"]) for name, model in sized_models(report).items()]
    baselines = report["baselines"].items()
    models += [(name, report["student"], metrics) for name, metrics in baselines]
    reference = largest(teachers_of(report))
    return [titles] + [
        [name, *_size(model), *_scores(report, metrics), *_speeds(name, reference, times)]
        for name, model, metrics in models
    ]


def _size(model: ModelReport) -> list[str]:
    size = model.get("bytes")
    counts = (model["parameters"], model["encoder_parameters"])
    return [*map(short_count, counts), f"{size / 1e6:,.1f}" if is_number(size) else "-"]


def _scores(report: Report, metrics: Mapping[str, float]) -> list[str]:
    names = report["student"]["metrics"]
    return [*(score(name, metrics.get(name)) for name in names), kept(report, metrics)]


def score(name: str, value: float | None) -> str:
    """A metric as a percentage, or as it is where less of it is better."""
    if not is_number(value):
        return "-"
    return f"{value:.3f}" if name in LOWER_IS_BETTER else f"{value:.1%}"


def kept(report: Report, metrics: Mapping[str, float]) -> str:
    """What is left of the teacher's score; a perplexity is kept in inverse proportion."""
    name, teacher = report["metric_name"], report["teacher"]
    mine = metrics.get(name)
    reference = None if teacher is None else teacher["metrics"].get(name)
    if not (is_number(mine) and is_number(reference)) or mine <= 0 or reference <= 0:
        return "-"
    return f"{(reference / mine if name in LOWER_IS_BETTER else mine / reference):.1%}"


def _speeds(
    name: str, reference: str | None, times: Mapping[int, Mapping[str, float]]
) -> list[str]:
    cells = []
    for measured in times.values():
        mine, teacher = measured.get(name), measured.get(reference or TEACHER)
        cells.append("-" if mine is None else f"{mine:.2f}")
        cells.append("-" if mine is None or teacher is None else f"{teacher / mine:.2f}x")
    return cells


def candidate_rows(candidates: Sequence[CandidateReport]) -> list[list[str]]:
    """Titles, then one row per candidate; metric and trade-off are fractions."""
    rows = [["iteration", "sparsity", "parameters", "metric", "trade-off", "chosen"]]
    for row in candidates:
        weighed = [_fraction(row["metric"]), _fraction(row["tradeoff"])]
        size = [f"{row['sparsity']:g}", short_count(row["parameters"])]
        rows.append([str(row["iteration"]), *size, *weighed, "yes" if row["chosen"] else "-"])
    return rows


def _fraction(value: float | None) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def pool_rows(pool: PoolReport) -> list[list[str]]:
    """Titles, then one row per teacher."""
    rows = [["taught by", pool["distribution"], "steps", "ranked by"]]
    for one in pool["teachers"]:
        weighed = [f"{one['weight']:.3f}", f"{one['steps']:,}", _fraction(one["score"])]
        rows.append([one["name"], *weighed])
    return rows


def stage_rows(report: Report) -> list[list[str]]:
    """Titles, then one row per stage."""
    rows = [["stage", "steps", "time", "tokens/s", "peak memory"]]
    for stage in report["stages"]:
        speed = (
            f"{stage['tokens_per_second']:,.0f}" if is_number(stage["tokens_per_second"]) else "-"
        )
        memory = gigabytes(stage["peak_memory_bytes"])
        rows.append(
            [stage["name"], f"{stage['steps']:,}", duration(stage["seconds"]), speed, memory]
        )
    return rows


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines: first cells at the left of their column, others at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def short_count(number: float) -> str:
    """A large number in three or more digits: 22.71M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def gigabytes(size: float) -> str:
    """Bytes in decimal gigabytes."""
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"
