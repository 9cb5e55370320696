"""The tables of a report, and the report as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from megakd.contract.metrics import lower_is_better
from megakd.contract.tasks import STUDENT, TEACHER

if TYPE_CHECKING:
    from pathlib import Path

    from megakd.contract.results import CandidateReport, CostReport, ModelReport, PoolReport, Report

MOST_CLASSES_SHOWN = 6
PERPLEXITY = "perplexity"
WITHOUT_EMBEDDINGS = "non-embedding"
"""Title of the parameter count without embeddings, pooler and heads."""


def result_table(report: Report, *, final: Path | None = None) -> str:
    """Return the report as aligned plain text, for the end of a run.

    Args:
        report: the content of report.json.
        final: folder of the student.
    """
    lines = [f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}", ""]
    lines += [*aligned_rows(model_rows(report)), *model_notes(report)]
    classes = class_rows(report, most=MOST_CLASSES_SHOWN)
    if classes:
        lines += ["", *aligned_rows(classes)]
    sets = set_rows(report)
    if sets:
        lines += ["", *aligned_rows(sets)]
    if report["candidates"]:
        lines += ["", *aligned_rows(candidate_rows(report["candidates"]))]
    pool = report.get("pool")
    if pool is not None:
        lines += ["", *aligned_rows(pool_rows(pool, report["metric_name"]))]
    if report["stages"]:
        lines += ["", *aligned_rows(stage_rows(report))]
        peak = max(stage["peak_memory_bytes"] for stage in report["stages"])
        seconds = sum(stage["seconds"] for stage in report["stages"])
        lines += ["", f"training {duration(seconds)}, peak memory {gigabytes(peak)} per rank"]
        lines += elsewhere_lines(report.get("seconds") or {})
    cost = report.get("cost")
    if cost is not None:
        lines.append(cost_line(cost))
    if final is not None:
        lines.append(f"the student is in {final}")
    return "\n".join(lines)


def elsewhere_lines(seconds: Mapping[str, float]) -> list[str]:
    """Return a line with the time outside training of the last start of a run, if known."""
    if not seconds:
        return []
    parts = {name: value for name, value in seconds.items() if name != "training"}
    listed = ", ".join(f"{name} {duration(value)}" for name, value in parts.items())
    return [f"beside training {duration(sum(parts.values()))}: {listed}"]


def cost_line(cost: CostReport) -> str:
    """Return a line with the cost of a method's choice and of the alternative method."""
    spent, whole = cost["seconds"], cost["alternative_seconds"]
    ratio = f"{whole / spent:.1f}x" if spent > 0 else ""
    times = {"": "", "1.0x": " (as long)"}.get(ratio, f" ({ratio})")
    return (
        f"{_trials(cost['trials'])}, {duration(spent)}; "
        f"{cost['alternative_does']} ({cost['alternative']}): "
        f"{_trials(cost['alternative_trials'])}, about {duration(whole)}{times}"
    )


def _trials(number: int) -> str:
    return f"{number} trial{'' if number == 1 else 's'}"


def sized_models(report: Report) -> dict[str, ModelReport]:
    """Return the models with a size of their own by name, from the teacher to the student.

    Reports of earlier versions have no assistants, latencies, cost or pool of teachers.
    """
    assistants = {entry["name"]: entry for entry in report.get("assistants", ())}
    return {**teachers_of(report), **assistants, STUDENT: report["student"]}


def teachers_of(report: Report) -> dict[str, ModelReport]:
    """Return the teachers of the config by name."""
    pool: dict[str, ModelReport] = {entry["name"]: entry for entry in report.get("teachers", ())}
    return pool or ({} if report["teacher"] is None else {TEACHER: report["teacher"]})


def largest(teachers: Mapping[str, ModelReport]) -> str | None:
    """Return the name of the largest teacher, the reference of comparisons; None without one."""
    return max(teachers, key=lambda name: teachers[name]["parameters"], default=None)


def milliseconds(report: Report) -> dict[int, dict[str, float]]:
    """Return the measured times of a forward by batch size, the smallest first, and by model."""
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
    """Return whether a value of report.json is a finite number; NaN is stored as null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def model_rows(report: Report) -> list[list[str]]:
    """Return titles, then one row per model with sizes, scores and measured times."""
    comparison = [against_title(report["metric_name"])] if report["teacher"] is not None else []
    titles = ["", "parameters", WITHOUT_EMBEDDINGS, "size MB", *metric_names(report), *comparison]
    times = milliseconds(report)
    for batch in times:
        titles += [f"ms (batch {batch})", "speed-up"]
    reference = largest(teachers_of(report))
    return [titles] + [
        [name, *_size(model), *_scores(report, metrics), *speeds(name, reference, times)]
        for name, model, metrics in scored_models(report)
    ]


def scored_models(report: Report) -> list[tuple[str, ModelReport, Mapping[str, float]]]:
    """Return name, size and metrics of all models; a baseline has the student's size."""
    sized = [(name, model, model["metrics"]) for name, model in sized_models(report).items()]
    baselines = report["baselines"].items()
    return sized + [(name, report["student"], metrics) for name, metrics in baselines]


def model_notes(report: Report) -> list[str]:
    """Return lines that explain the columns of `model_rows`."""
    lower = [name for name in metric_names(report) if lower_is_better(name)]
    direction = [f"{', '.join(lower)}: lower is better"] if lower else []
    return [*direction, *latency_notes(report)]


def latency_notes(report: Report) -> list[str]:
    """Return a line with length, dtype and device of the timing, if the report has them."""
    timed = [entry for entry in report.get("latency", ()) if "length" in entry]
    if not timed:
        return []
    lengths, devices = (
        dict.fromkeys(str(entry.get(key, "")) for entry in timed) for key in ("length", "device")
    )
    dtypes = {entry["model"]: entry.get("dtype", "") for entry in timed}
    alike = len(set(dtypes.values())) == 1
    held = [next(iter(dtypes.values()))] if alike else [f"{n} {d}" for n, d in dtypes.items()]
    return [
        f"ms: median of one forward, {', '.join(lengths)} tokens per text, {', '.join(held)}, "
        f"on {', '.join(devices)}"
    ]


def _size(model: ModelReport) -> list[str]:
    size = model.get("bytes")
    counts = (model["parameters"], model["encoder_parameters"])
    return [*map(short_count, counts), f"{size / 1e6:,.1f}" if is_number(size) else "-"]


def _scores(report: Report, metrics: Mapping[str, float]) -> list[str]:
    comparison = [] if report["teacher"] is None else [against_teacher(report, metrics)]
    return [*(score(name, metrics.get(name)) for name in metric_names(report)), *comparison]


def metric_names(report: Report) -> list[str]:
    """Return the metrics of the table; `loss` only if lower is better for the main metric."""
    names = list(report["student"]["metrics"])
    says_more = lower_is_better(report["metric_name"])
    return [name for name in names if name != "loss" or says_more]


def score(name: str, value: float | None) -> str:
    """Return a metric as a percentage, or as a plain number if lower is better."""
    if not is_number(value):
        return "-"
    return f"{value:.3f}" if lower_is_better(name) else f"{value:.1%}"


def against_title(metric_name: str) -> str:
    """Return the title of the column with `against_teacher`."""
    return "vs teacher" if lower_is_better(metric_name) else "kept"


def against_teacher(report: Report, metrics: Mapping[str, float]) -> str:
    """Return a comparison of a model's main metric with the teacher's.

    If higher is better, the comparison is the percentage of the teacher's score. For perplexity,
    it is the ratio to the teacher's perplexity (x1.20). For other metrics for which lower is
    better, it is the difference (+0.18).
    """
    name, teacher = report["metric_name"], report["teacher"]
    mine = metrics.get(name)
    reference = None if teacher is None else teacher["metrics"].get(name)
    if not (is_number(mine) and is_number(reference)):
        return "-"
    if lower_is_better(name) and name != PERPLEXITY:
        return f"{mine - reference:+.3f}"
    if mine <= 0 or reference <= 0:
        return "-"
    return f"x{mine / reference:.2f}" if name == PERPLEXITY else f"{mine / reference:.1%}"


def speeds(name: str, reference: str | None, times: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Return milliseconds and speed-up of a model for each batch size."""
    cells = []
    for measured in times.values():
        mine, teacher = measured.get(name), measured.get(reference or TEACHER)
        cells.append("-" if mine is None else f"{mine:.2f}")
        cells.append("-" if mine is None or teacher is None else f"{teacher / mine:.2f}x")
    return cells


def candidate_rows(candidates: Sequence[CandidateReport]) -> list[list[str]]:
    """Return titles, then one row per candidate; metric and trade-off are fractions."""
    rows = [["iteration", "sparsity", "parameters", "metric", "trade-off", "chosen"]]
    for row in candidates:
        weighed = [_fraction(row["metric"]), _fraction(row["tradeoff"])]
        size = [f"{row['sparsity']:g}", short_count(row["parameters"])]
        rows.append([str(row["iteration"]), *size, *weighed, "yes" if row["chosen"] else "-"])
    return rows


def _fraction(value: float | None) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def class_rows(report: Report, *, most: int) -> list[list[str]]:
    """Return titles and a row per label of the student; empty if there are more than `most`."""
    classes = report["student"].get("per_class", ())
    if not classes or len(classes) > most:
        return []
    rows = [["student, by label", "precision", "recall", "f1", "rows"]]
    for one in classes:
        scores = (one["precision"], one["recall"], one["f1"])
        rows.append([one["label"], *(f"{value:.1%}" for value in scores), f"{one['rows']:,}"])
    return rows


def set_rows(report: Report) -> list[list[str]]:
    """Return titles, then one row per evaluation set and model; empty without sets."""
    sets = report.get("evaluation_sets", {})
    names = list(report["student"]["metrics"])
    rows = [
        [
            name,
            model,
            f"{entry['rows']:,}",
            *(score(metric, metrics.get(metric)) for metric in names),
        ]
        for name, entry in sets.items()
        for model, metrics in entry["metrics"].items()
    ]
    return [["evaluation set", "model", "rows", *names], *rows] if rows else []


def pool_rows(pool: PoolReport, metric_name: str) -> list[list[str]]:
    """Return titles, then one row per teacher, with the score if teachers were ranked."""
    is_ranked = any(one["score"] is not None for one in pool["teachers"])
    rows = [["taught by", pool["distribution"], "steps"]]
    rows[0] += [f"{metric_name} (validation)"] if is_ranked else []
    for one in pool["teachers"]:
        ranked_by = [score(metric_name, _as_metric(metric_name, one["score"]))] if is_ranked else []
        rows.append([one["name"], f"{one['weight']:.3f}", f"{one['steps']:,}", *ranked_by])
    return rows


def _as_metric(name: str, worth: float | None) -> float | None:
    """Return the metric of a worth, which is the negated metric if lower is better."""
    return -worth if is_number(worth) and lower_is_better(name) else worth


def stage_rows(report: Report) -> list[list[str]]:
    """Return titles, then one row per stage."""
    rows = [["stage", "steps", "time", "tokens/s", "peak memory"]]
    for stage in report["stages"]:
        trained = stage["steps"] > 0 and is_number(stage["tokens_per_second"])
        speed = f"{stage['tokens_per_second']:,.0f}" if trained else "-"
        memory = gigabytes(stage["peak_memory_bytes"])
        rows.append(
            [stage["name"], f"{stage['steps']:,}", duration(stage["seconds"]), speed, memory]
        )
    return rows


def aligned_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with the first cells left-aligned and the other cells right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def short_count(number: float) -> str:
    """Return a large number with at least three digits, such as 22.71M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:g}"


def gigabytes(size: float) -> str:
    """Return a size in bytes as text in decimal gigabytes."""
    return f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Return a duration as hours and minutes, minutes and seconds, or seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{seconds:.1f}s"
