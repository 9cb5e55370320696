"""report.html: the whole story of a run in one file, from report.json and metrics.jsonl alone.

The file asks nothing of the outside and holds no script. The same input always gives the same
bytes. Where there is nothing to show, the section is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megakd import atomic
from megakd.config import STUDENT, TEACHER
from megakd.errors import CheckpointError
from megakd.evaluation import LOWER_IS_BETTER
from megakd.report import CandidateReport, Report
from megakd.report_curves import training_sections
from megakd.report_history import panels, read_history
from megakd.report_page import facts, figure, folded, listing, page, paragraph, section, table
from megakd.report_plots import (
    Bar,
    Bars,
    Dot,
    Plane,
    bars_picture,
    plane_picture,
    tradeoff_picture,
)
from megakd.report_table import (
    WITHOUT_EMBEDDINGS,
    against_teacher,
    candidate_rows,
    cost_line,
    duration,
    gigabytes,
    is_number,
    largest,
    milliseconds,
    model_notes,
    model_rows,
    pool_rows,
    score,
    sized_models,
    stage_rows,
    teachers_of,
)

HTML_REPORT = "report.html"
LATER_KEYS = frozenset({"assistants", "latency", "cost", "teachers", "pool", "samples"})
"""Keys that reports of earlier versions lack."""


def write_html_report(output_dir: Path) -> Path:
    """Writes report.html of a finished run, whole or not at all; what was there is replaced.

    Returns:
        Where it is.

    Raises:
        CheckpointError: there is no report.json, or it is none of megakd's.
    """
    report = _read_report(output_dir / "report.json")
    config = output_dir / "config.yaml"
    text = html_report(
        report,
        read_history(output_dir / "metrics.jsonl"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    path = output_dir / HTML_REPORT
    atomic.write_text(path, text)
    return path


def _read_report(path: Path) -> Report:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: it is written when the run is complete; start the run's "
            f"command again to go on with it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); it may be cut off") from error
    wanted = Report.__required_keys__ - LATER_KEYS
    missing = sorted(wanted - set(content)) if isinstance(content, dict) else sorted(wanted)
    if missing:
        raise CheckpointError(f"{path} is no report of megakd: it lacks {', '.join(missing)}")
    return cast("Report", content)


def html_report(report: Report, history: Iterable[Mapping[str, Any]], *, config: str = "") -> str:
    """The page as text.

    Args:
        report: the content of report.json.
        history: the records of metrics.jsonl in their order.
        config: the content of config.yaml.
    """
    title = f"{report['method']} on {report['task']}"
    names = [stage["name"] for stage in report["stages"]]
    parts = [
        f"{section(title, paragraph(_headline(report)), _models(report), level=1)}",
        section("Size, quality, latency", _sizes(report)),
        section("Choice by trade-off", *_choices(report["candidates"])),
        section("What trying every assistant would have cost", _cost(report)),
        section("Who taught", _pool(report)),
        section("Time and memory", _stages(report)),
        section("Training", *training_sections(panels(history), names)),
        section("Environment", facts(list(_flat(report["environment"])))),
        section("Config", folded("config.yaml", listing(config) if config else "")),
    ]
    return page(f"megakd: {title}", parts)


def _headline(report: Report) -> str:
    """What came of the run, in one sentence."""
    student, teacher = report["student"], report["teacher"]
    name, split = report["metric_name"], report["evaluated_on"]
    mine = score(name, student["metrics"].get(name))
    if teacher is None:
        return f"The student scores {mine} {name} on {split}."
    theirs = score(name, teacher["metrics"].get(name))
    which = "the largest teacher" if len(teachers_of(report)) > 1 else "the teacher"
    words = [f"The student scores {mine} {name} on {split}, {which} {theirs}."]
    words += [_comparison(report)]
    sizes = teacher["encoder_parameters"], student["encoder_parameters"]
    ratio = sizes[0] / sizes[1] if all(sizes) else 0
    gains = [f"has {ratio:.1f}x fewer parameters without embeddings"] if ratio else []
    reference = largest(teachers_of(report)) or TEACHER
    gains += [
        f"is {times[reference] / times[STUDENT]:.1f}x as fast at batch {batch}"
        for batch, times in milliseconds(report).items()
        if reference in times and STUDENT in times
    ]
    words += [f"It {', '.join(gains)}."] if gains else []
    return " ".join(word for word in words if word)


def _comparison(report: Report) -> str:
    """Return how the student's main metric compares with the teacher's, in one sentence."""
    name, beside = report["metric_name"], against_teacher(report, report["student"]["metrics"])
    if beside == "-":
        return ""
    if name not in LOWER_IS_BETTER:
        return f"It keeps {beside} of the teacher's score."
    if beside.startswith("x"):
        return f"Its {name} is {beside[1:]} times the teacher's (lower is better)."
    return f"Its {name} differs by {beside} from the teacher's (lower is better)."


def _models(report: Report) -> str:
    split = report["evaluated_on"]
    return table(
        model_rows(report),
        caption=f"Scores on {split}. {WITHOUT_EMBEDDINGS}: parameters without embeddings, pooler "
        f"and heads. {'. '.join(model_notes(report))}",
    )


def _sizes(report: Report) -> str:
    planes = [plane for plane in _planes(report) if plane.dots]
    if not planes:
        return ""
    upwards = "Down" if report["metric_name"] in LOWER_IS_BETTER else "Up"
    return figure(
        plane_picture(planes, report["metric_name"], name="sizes"),
        f"{upwards} and to the left is better. A baseline (hollow) has the student's shape, so "
        "it stands at the student's size and time. The numbers are in the table above.",
    )


def _planes(report: Report) -> list[Plane]:
    sizes = {name: m["encoder_parameters"] for name, m in sized_models(report).items()}
    planes = [Plane("parameters without embeddings", _dots(report, sizes))]
    for batch, times in milliseconds(report).items():
        planes.append(Plane(f"ms per forward of batch {batch}", _dots(report, times)))
    return planes


def _dots(report: Report, sizes: Mapping[str, float]) -> list[Dot]:
    """Every model with a size and a score; a baseline has the student's size."""
    metric = report["metric_name"]
    kinds = {**dict.fromkeys(teachers_of(report), TEACHER), STUDENT: STUDENT}
    found = [
        Dot(name, kinds.get(name, "assistant"), sizes[name], value)
        for name, model in sized_models(report).items()
        if is_number(value := model["metrics"].get(metric)) and sizes.get(name, 0) > 0
    ]
    found += [
        Dot(name, "baseline", sizes["student"], value)
        for name, metrics in report["baselines"].items()
        if is_number(value := metrics.get(metric)) and sizes.get("student", 0) > 0
    ]
    return found


def _pool(report: Report) -> str:
    pool = report.get("pool")
    if pool is None:
        return ""
    return table(
        pool_rows(pool, report["metric_name"]),
        caption="How likely each teacher was, or its share of the loss; the steps of the student "
        "in which it answered; and the score on validation that it was ranked by.",
    )


def _choices(candidates: Sequence[CandidateReport]) -> list[str]:
    """One picture and one table per iteration."""
    iterations = sorted({row["iteration"] for row in candidates})
    parts = [paragraph(_rule(candidates))] if iterations else []
    for iteration in iterations:
        rows = [row for row in candidates if row["iteration"] == iteration]
        parts.append(section(f"Iteration {iteration}", _choice(rows), level=3))
    return parts


def _rule(candidates: Sequence[CandidateReport]) -> str:
    tradeoff = _lambda(candidates)
    weight = f" with \N{GREEK SMALL LETTER LAMDA} = {tradeoff}" if tradeoff else ""
    return (
        "trade-off = metric + \N{GREEK SMALL LETTER LAMDA} \N{MIDDLE DOT} sparsity"
        f"{weight}; all are fractions, and the metric is that on validation."
    )


def _lambda(candidates: Sequence[CandidateReport]) -> str:
    """The weight of sparsity in the rows' trade-offs, where they agree on one."""
    weights = [
        (row["tradeoff"] - row["metric"]) / row["sparsity"]
        for row in _weighed(candidates)
        if row["sparsity"] > 0
    ]
    agree = bool(weights) and max(weights) - min(weights) < 1e-6
    return f"{weights[0]:.4g}" if agree else ""


def _weighed(rows: Sequence[CandidateReport]) -> list[CandidateReport]:
    return [row for row in rows if is_number(row["metric"]) and is_number(row["tradeoff"])]


def _choice(rows: Sequence[CandidateReport]) -> str:
    numbers = table(candidate_rows(rows), is_chosen=lambda row: row[-1] == "yes")
    weighed = _weighed(rows)
    chosen = [row for row in weighed if row["chosen"]]
    if not chosen or len(weighed) < 2:
        return numbers
    best = max(weighed, key=lambda row: row["tradeoff"])
    words = f"Chosen: sparsity {chosen[0]['sparsity']:g}."
    if best is not chosen[0]:
        words += f" The highest trade-off is that of sparsity {best['sparsity']:g}."
    name = f"tradeoff-{rows[0]['iteration']}"
    return figure(tradeoff_picture(weighed, name=name), words, numbers)


def _cost(report: Report) -> str:
    cost = report.get("cost")
    if cost is None:
        return ""
    line = f"{cost_line(cost)}."
    spent, whole = cost["seconds"], cost["maxidisc_seconds"]
    bars = [
        Bar("this run", spent, duration(spent)),
        Bar("MaxiDisc", whole, duration(whole), "baseline"),
    ]
    drawn = bars_picture([Bars("training time", bars)], name="cost", label=line)
    return figure(drawn, f"{line} MaxiDisc's time is reckoned from the speed of this run.")


def _stages(report: Report) -> str:
    stages = report["stages"]
    if not stages:
        return ""
    time = [Bar(s["name"], s["seconds"], duration(s["seconds"])) for s in stages]
    sizes = [(s["name"], s["peak_memory_bytes"]) for s in stages]
    memory = [Bar(name, size, gigabytes(size), "assistant") for name, size in sizes]
    total = duration(sum(bar.value for bar in time))
    label = f"Training time and peak memory of {len(stages)} stages; {total} in all."
    groups = [Bars("training time", time), Bars("peak memory per rank", memory)]
    caption = f"{total} in all, evaluations and saves of a stage included."
    return figure(bars_picture(groups, name="stages", label=label), caption, _stage_table(report))


def _stage_table(report: Report) -> str:
    stages = report["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["metrics"]))
    titles, *rows = stage_rows(report)
    scored = [
        [*row, *(score(name, stage["metrics"].get(name)) for name in names)]
        for row, stage in zip(rows, stages, strict=True)
    ]
    caption = "Scores on validation, of what the stage kept." if names else ""
    return table([[*titles, *names], *scored], caption=caption)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        elif value is not None:
            yield f"{before}{key}", str(value)
