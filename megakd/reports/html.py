"""report.html: the report of a run in one file, built only from report.json and metrics.jsonl.

The file loads no other files and has no scripts. Equal inputs result in equal bytes. A section
without content is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from megakd.contract.metrics import lower_is_better
from megakd.contract.results import CandidateReport, Report, SampleReport
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.errors import CheckpointError
from megakd.reports.charts import Chart, Dot, choice_chart, plane_chart, tick
from megakd.reports.curves import training_sections
from megakd.reports.history import panels, read_history
from megakd.reports.page import (
    Bar,
    BarGroups,
    Bars,
    Block,
    Facts,
    Figure,
    Folded,
    Listing,
    Paragraph,
    Samples,
    Section,
    Table,
    page,
)
from megakd.reports.table import (
    WITHOUT_EMBEDDINGS,
    against_teacher,
    candidate_rows,
    class_rows,
    cost_line,
    duration,
    gigabytes,
    is_number,
    largest,
    latency_notes,
    milliseconds,
    model_rows,
    pool_rows,
    score,
    scored_models,
    set_rows,
    sized_models,
    stage_rows,
    teachers_of,
)
from megakd.storage import atomic

HTML_REPORT = "report.html"
SIZES = 3
"""Number of columns of sizes in `model_rows`; these columns follow the name."""
LATER_KEYS = frozenset(
    {"assistants", "latency", "cost", "teachers", "pool", "samples", "evaluation_sets"}
)
"""Keys that reports of earlier versions do not have."""


def write_html_report(output_dir: Path) -> Path:
    """Write report.html of a finished run, whole or not at all; an old file is replaced.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: report.json does not exist, or is not a report of megakd.
    """
    report = read_report(output_dir / "report.json")
    config = output_dir / "config.yaml"
    text = html_report(
        report,
        read_history(output_dir / "metrics.jsonl"),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    path = output_dir / HTML_REPORT
    atomic.write_text(path, text)
    return path


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        CheckpointError: the file does not exist, or is not a report of megakd.
    """
    again = f"remove {path} and start the run's command again: its finished stages are used again"
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: it is written when the run is complete; start the run's "
            f"command again to go on with it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); {again}") from error
    wanted = Report.__required_keys__ - LATER_KEYS
    missing = sorted(wanted - set(content)) if isinstance(content, dict) else sorted(wanted)
    if missing:
        raise CheckpointError(
            f"{path} is no report of megakd: it lacks {', '.join(missing)}; {again}"
        )
    return cast("Report", content)


def html_report(report: Report, history: Iterable[Mapping[str, Any]], *, config: str = "") -> str:
    """Return the page as text.

    Args:
        report: the content of report.json.
        history: the records of metrics.jsonl in order.
        config: the content of config.yaml.
    """
    title = f"{report['method']} on {report['task']}"
    names = [stage["name"] for stage in report["stages"]]
    facts = list(_flat(report["environment"]))
    sections = [
        Section(title, [Paragraph(_headline(report)), *_models(report)], level=1),
        Section("Evaluation sets", list(_sets(report))),
        Section("Size, quality, latency", list(_planes(report))),
        Section("Scores by label", list(_classes(report))),
        Section("Samples", list(_samples(report))),
        Section("Choice by trade-off", list(_choices(report["candidates"]))),
        Section("What trying every assistant would have cost", list(_cost(report))),
        Section("Who taught", list(_pool(report))),
        Section("Time and memory", list(_stages(report))),
        Section("Training", list(training_sections(panels(history), names))),
        Section("Environment", [Facts(facts)] if facts else []),
        Section("Config", [Folded("config.yaml", [Listing(config)])] if config else []),
    ]
    return page(f"megakd: {title}", sections)


def _headline(report: Report) -> str:
    """Return a few sentences with the main results of the run."""
    student, teacher = report["student"], report["teacher"]
    name, split = report["metric_name"], report["evaluated_on"]
    mine = score(name, student["metrics"].get(name))
    if teacher is None:
        return f"The student scores {mine} {name} on {split}."
    theirs = score(name, teacher["metrics"].get(name))
    which = "the largest teacher" if len(teachers_of(report)) > 1 else "the teacher"
    words = [f"The student scores {mine} {name} on {split}, {which} {theirs}."]
    words += [comparison(report)]
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


def comparison(report: Report) -> str:
    """Return a sentence that compares the student's main metric with the teacher's."""
    name, beside = report["metric_name"], against_teacher(report, report["student"]["metrics"])
    if beside == "-":
        return ""
    if not lower_is_better(name):
        return f"It keeps {beside} of the teacher's score."
    if not beside.startswith("x"):
        return f"Its {name} differs from the teacher's by {beside} (lower is better)."
    nats = math.log(float(beside[1:])) if float(beside[1:]) > 0 else 0
    return f"Its {name} is {beside[1:]} times the teacher's, {nats:+.2f} nats (lower is better)."


def _models(report: Report) -> Iterator[Block]:
    """Yield the table of scores and sizes, with scores first, and the table of times."""
    times = milliseconds(report)
    titles, *rows = model_rows(report)
    width = len(titles) - 2 * len(times)
    order = [0, *range(SIZES + 1, width), *range(1, SIZES + 1)]
    lower = {name for name in titles if lower_is_better(name)}
    shown = [
        f"{name}\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}" if name in lower else name for name in titles
    ]
    notes = [f"Scores on {report['evaluated_on']}"]
    notes += ["\N{DOWNWARDS ARROW}: lower is better"] if lower else []
    notes += [f"{WITHOUT_EMBEDDINGS}: parameters without embeddings, pooler and heads"]
    cells = [[row[column] for column in order] for row in (shown, *rows)]
    yield Table(cells, caption=f"{'. '.join(notes)}.")
    if times:
        timed = [[row[0], *row[width:]] for row in rows if set(row[width:]) != {"-"}]
        words = ". ".join(["Latency", *latency_notes(report)])
        yield Table([["", *titles[width:]], *timed], caption=f"{words}.")


def _classes(report: Report) -> Iterator[Block]:
    """Yield the student's scores by label."""
    rows = class_rows(report, most=200)
    if rows:
        yield Table(rows, caption=f"Of the student on {report['evaluated_on']}.")


def _sets(report: Report) -> Iterator[Block]:
    rows = set_rows(report)
    if rows:
        yield Table(rows, caption="Named sets of rows, each scored whole.")


def _planes(report: Report) -> Iterator[Block]:
    sizes = {name: m["encoder_parameters"] for name, m in sized_models(report).items()}
    measures = {"parameters without embeddings": _dots(report, sizes)}
    for batch, times in milliseconds(report).items():
        measures[f"ms per forward of batch {batch}"] = _dots(report, times)
    charts = [
        _plane(report["metric_name"], measure, dots) for measure, dots in measures.items() if dots
    ]
    is_low = lower_is_better(report["metric_name"])
    if charts:
        yield Figure(
            charts,
            f"{'Lower' if is_low else 'Higher'} and further to the left is better. A baseline "
            "(hollow) has the student's shape. The numbers are in the tables above.",
        )


def _plane(metric: str, measure: str, dots: Sequence[Dot]) -> Chart:
    words = ", ".join(f"{dot.name} {score(metric, dot.y)} at {tick(dot.x)}" for dot in dots)
    unit = "lower is better" if lower_is_better(metric) else "%"
    label = f"{metric} against {measure}: {words}."
    return plane_chart(dots, title=metric, unit=unit, label=label, x_title=measure)


def _dots(report: Report, sizes: Mapping[str, float]) -> list[Dot]:
    """Return every model with a size and a score; an unmeasured baseline has the student's size."""
    metric = report["metric_name"]
    kinds = {**dict.fromkeys(teachers_of(report), TEACHER), STUDENT: STUDENT}
    kinds |= dict.fromkeys(report["baselines"], "baseline")
    baseline_size = sizes.get(STUDENT, 0)
    found = []
    for name, _, metrics in scored_models(report):
        size = sizes.get(name, baseline_size if name in report["baselines"] else 0)
        if is_number(value := metrics.get(metric)) and size > 0:
            found.append(Dot(name, kinds.get(name, "assistant"), size, value))
    return found


def _samples(report: Report) -> Iterator[Block]:
    samples = report.get("samples", ())
    if samples:
        yield Paragraph(
            "Held-out prompts. Each model answers with its most likely tokens: a decoder "
            "continues the text, a masked language model fills the masks in their order."
        )
        yield Samples([_shown(one) for one in samples])


def _shown(sample: SampleReport) -> SampleReport:
    """Replace line breaks by symbols: an answer of only line breaks would fill the page."""
    said = sample["teacher"]
    return {
        "prompt": _with_signs(sample["prompt"]),
        "teacher": None if said is None else _with_signs(said),
        "student": _with_signs(sample["student"]),
    }


def _with_signs(text: str) -> str:
    return text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} ")


def _pool(report: Report) -> Iterator[Block]:
    pool = report.get("pool")
    if pool is not None:
        yield Table(
            pool_rows(pool, report["metric_name"]),
            caption="The probability of each teacher, or its share of the loss; the steps of the "
            "student in which it answered; and the validation score that ranked it, if any.",
        )


def _choices(candidates: Sequence[CandidateReport]) -> Iterator[Block]:
    """Yield one figure and one table per iteration."""
    iterations = sorted({row["iteration"] for row in candidates})
    if iterations:
        yield Paragraph(_rule(candidates))
    for iteration in iterations:
        rows = [row for row in candidates if row["iteration"] == iteration]
        yield Section(f"Iteration {iteration}", [_choice(rows)], level=3)


def _rule(candidates: Sequence[CandidateReport]) -> str:
    tradeoff = _lambda(candidates)
    weight = f" with \N{GREEK SMALL LETTER LAMDA} = {tradeoff}" if tradeoff else ""
    return (
        "trade-off = metric + \N{GREEK SMALL LETTER LAMDA} \N{MIDDLE DOT} sparsity"
        f"{weight}; all are fractions, measured on validation. Higher is better."
    )


def _lambda(candidates: Sequence[CandidateReport]) -> str:
    """Return the weight of sparsity in the trade-offs if it is the same in all rows, else ""."""
    weights = [
        (row["tradeoff"] - row["metric"]) / row["sparsity"]
        for row in _weighed(candidates)
        if row["sparsity"] > 0
    ]
    agree = bool(weights) and max(weights) - min(weights) < 1e-6
    return f"{weights[0]:.4g}" if agree else ""


def _weighed(rows: Sequence[CandidateReport]) -> list[CandidateReport]:
    return [row for row in rows if is_number(row["metric"]) and is_number(row["tradeoff"])]


def _choice(rows: Sequence[CandidateReport]) -> Block:
    marked = frozenset(number for number, row in enumerate(rows, 1) if row["chosen"])
    numbers = Table(candidate_rows(rows), chosen=marked)
    weighed = _weighed(rows)
    chosen = next((row for row in weighed if row["chosen"]), None)
    if chosen is None or len(weighed) < 2:
        return numbers
    best = max(weighed, key=lambda row: row["tradeoff"])
    words = f"Chosen: sparsity {chosen['sparsity']:g}."
    if best is not chosen:
        words += f" The highest trade-off is that of sparsity {best['sparsity']:g}."
    charts = [_choice_chart(weighed, chosen, key) for key in ("metric", "tradeoff")]
    return Figure(charts, words, numbers=[numbers])


def _choice_chart(
    rows: Sequence[CandidateReport], chosen: CandidateReport, key: Literal["metric", "tradeoff"]
) -> Chart:
    title = {"metric": "metric", "tradeoff": "trade-off"}[key]
    label = (
        f"{title} of {len(rows)} candidates of iteration {chosen['iteration']} against their "
        f"scale. Chosen: sparsity {chosen['sparsity']:g}, {title} {chosen[key]:.4f}."
    )
    points = [(1 - row["sparsity"], row[key]) for row in rows]
    place = (1 - chosen["sparsity"], chosen[key])
    x_title = "scale (1 \N{MINUS SIGN} sparsity)"
    return choice_chart(points, place, title=title, label=label, x_title=x_title)


def _cost(report: Report) -> Iterator[Block]:
    cost = report.get("cost")
    if cost is None:
        return
    spent, whole = cost["seconds"], cost["alternative_seconds"]
    bars = [
        Bar("this run", spent, duration(spent)),
        Bar(cost["alternative"], whole, duration(whole), "baseline"),
    ]
    words = f"{cost_line(cost)}. The other time is estimated from the speed of this run."
    yield BarGroups([Bars("training time", bars)], words)


def _stages(report: Report) -> Iterator[Block]:
    stages = report["stages"]
    if not stages:
        return
    time = [Bar(s["name"], s["seconds"], duration(s["seconds"])) for s in stages]
    sizes = [(s["name"], s["peak_memory_bytes"]) for s in stages]
    memory = [Bar(name, size, gigabytes(size), "assistant") for name, size in sizes]
    total = duration(sum(bar.value for bar in time))
    groups = [Bars("training time", time), Bars("peak memory per rank", memory)]
    yield BarGroups(groups, f"{total} in all, with the evaluations and saves of each stage.")
    yield _stage_table(report)


def _stage_table(report: Report) -> Table:
    stages = report["stages"]
    names = list(dict.fromkeys(name for stage in stages for name in stage["metrics"]))
    titles, *rows = stage_rows(report)
    scored = [
        [*row, *(score(name, stage["metrics"].get(name)) for name in names)]
        for row, stage in zip(rows, stages, strict=True)
    ]
    caption = "Scores on validation, of the model that the stage keeps." if names else ""
    return Table([[*titles, *names], *scored], caption)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key} ")
        elif value is not None:
            yield f"{before}{key}", str(value)
