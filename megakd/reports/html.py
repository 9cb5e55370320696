"""report.html: the report of a run in one file, built only from report.json and metrics.jsonl.

`templates/report.html.jinja` draws the page. The file loads no other files and has no scripts.
Equal inputs result in equal bytes. A section without content is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from megakd.contract.metric import lower_is_better
from megakd.contract.results import CandidateReport, Report
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.errors import CheckpointError
from megakd.reports import table
from megakd.reports.charts import Chart, Dot, choice_charts, plane_chart
from megakd.reports.curves import pruning_section, training
from megakd.reports.history import panels, read_history
from megakd.reports.quantities import is_number
from megakd.reports.report_file import completed, read_report
from megakd.storage import atomic

TEMPLATES = Environment(
    loader=PackageLoader("megakd.reports", "templates"),
    autoescape=select_autoescape(("html.jinja", "svg.jinja")),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write_html_report(output_dir: Path) -> Path:
    """Write report.html of a finished run, whole or not at all; an old file is replaced."""
    if output_dir.is_file():
        raise CheckpointError(
            f"{output_dir} is a file; give the output_dir of a finished run, such as "
            f"{output_dir.parent}"
        )
    report = read_report(output_dir / "report.json")
    config, path = output_dir / "config.yaml", output_dir / "report.html"
    try:
        text = config.read_text(encoding="utf-8") if config.is_file() else ""
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{config} is damaged: it is not UTF-8 text (byte 0x{error.object[error.start]:02x} at "
            f"position {error.start}); restore the file, or remove it to draw the report without it"
        ) from error
    page = html_report(report, read_history(output_dir / "metrics.jsonl"), config=text)
    try:
        atomic.write_text(path, page)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def html_report(report: Report, history: Iterable[Mapping[str, Any]], *, config: str = "") -> str:
    """Return the page as text."""
    report = completed(report)
    models = _models(report)
    stages, left_out = training(panels(history), [stage["name"] for stage in report["stages"]])
    return TEMPLATES.get_template("report.html.jinja").render(
        tables=table,
        report=report,
        config=config,
        comparison=_comparison(report),
        gains=_gains(report),
        planes=_planes(report, models),
        legend=[(f"{dot.number} {dot.name}", dot.kind, dot.look) for dot in models],
        choices=_choices(report["candidates"]),
        weight=_weight(report["candidates"]),
        pruning=pruning_section(report),
        training=stages,
        left_out=left_out,
    )


def _gains(report: Report) -> list[str]:
    teacher = report["teacher"]
    if teacher is None:
        return []
    whole, left = teacher["encoder_parameters"], report["student"]["encoder_parameters"]
    gains: list[str] = []
    if whole and left:
        times = f"{max(whole, left) / min(whole, left):.1f}x"
        many = "as many" if times == "1.0x" else f"{times} {'more' if left > whole else 'fewer'}"
        gains.append(f"has {many} parameters without embeddings")
    reference = table.largest(table.teachers_of(report)) or TEACHER
    for timing in table.timings(report):
        ratio = timing.speed_up(STUDENT, reference)
        if ratio is not None and ratio.is_clear:
            verb = "is" if timing.kind == table.FORWARD else "generates"
            gains.append(f"{verb} {ratio} as fast at batch {timing.batch}")
    return gains


def _comparison(report: Report) -> str:
    name, metrics = report["metric_name"], report["student"]["metrics"]
    beside = table.against_teacher(report, metrics)
    if beside == "-":
        return ""
    if not lower_is_better(name):
        return f"It keeps {beside} of the teacher's score."
    if not beside.startswith("x"):
        return f"Its {name} differs from the teacher's by {beside} (lower is better)."
    teacher = report["teacher"]
    nats = math.log(metrics[name] / teacher["metrics"][name]) if teacher else 0.0
    return f"Its {name} is {beside[1:]} times the teacher's, {nats:+.2f} nats (lower is better)."


def _models(report: Report) -> list[Dot]:
    metric = report["metric_name"]
    kinds = {**dict.fromkeys(table.teachers_of(report), TEACHER), STUDENT: STUDENT}
    kinds |= dict.fromkeys((entry["name"] for entry in report["sizes"]), STUDENT)
    kinds |= dict.fromkeys(report["baselines"], "baseline")
    scored = [
        (name, kinds.get(name, "assistant"), model["encoder_parameters"], metrics[metric])
        for name, model, metrics in table.scored_models(report)
        if is_number(metrics.get(metric))
    ]
    return [Dot(number, *model) for number, model in enumerate(scored, 1)]


def _planes(report: Report, models: Sequence[Dot]) -> list[Chart]:
    measures = {"parameters without embeddings": models}
    for timing in table.timings(report):
        if timing.kind == table.FORWARD:
            # A baseline that was not timed has the student's shape.
            alike = dict.fromkeys(report["baselines"], timing.values.get(STUDENT, 0))
            timed = [dot._replace(x=(alike | timing.values).get(dot.name, 0)) for dot in models]
            measures[f"ms per forward of batch {timing.batch}"] = timed
    shown = {measure: [dot for dot in dots if dot.x > 0] for measure, dots in measures.items()}
    metric = report["metric_name"]
    return [plane_chart(dots, metric=metric, measure=m) for m, dots in shown.items() if dots]


def _choices(candidates: Sequence[CandidateReport]) -> dict[int, dict[str, Any]]:
    # By iteration; without charts if less than two candidates were scored.
    choices: dict[int, dict[str, Any]] = {}
    for iteration in sorted({row["iteration"] for row in candidates}):
        rows = [row for row in candidates if row["iteration"] == iteration]
        scored = _scored(rows)
        chosen = next((row for row in scored if row["chosen"]), None)
        best = max(scored, key=lambda row: row["tradeoff"], default=None)
        # Candidates of one size have no curve over sizes.
        single = len(scored) < 2 or any("shape" in row for row in rows)
        charts = [] if chosen is None or single else choice_charts(scored, chosen)
        shown = {"rows": table.candidate_rows(rows), "charts": charts}
        choices[iteration] = {**shown, "chosen": chosen, "best": best}
    return choices


def _scored(candidates: Sequence[CandidateReport]) -> list[CandidateReport]:
    return [c for c in candidates if is_number(c["metric"]) and is_number(c["tradeoff"])]


def _weight(candidates: Sequence[CandidateReport]) -> str:
    weights = [
        (row["tradeoff"] - row["metric"]) / row["sparsity"]
        for row in _scored(candidates)
        if row["sparsity"] > 0
    ]
    agree = bool(weights) and max(weights) - min(weights) < 1e-6
    return f"{weights[0]:.4g}" if agree else ""
