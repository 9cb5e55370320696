"""report.html: the report of a run in one file, built only from report.json and metrics.jsonl.

`templates/report.html.jinja` draws the page. The file loads no other files and has no scripts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megakd.contract.results import Report
from megakd.errors import CheckpointError
from megakd.reports import figures, table
from megakd.reports.history import curves_of, read_history
from megakd.reports.report_file import read_report
from megakd.storage import atomic

MANY_LABELS = 200
TEMPLATES = Path(__file__).parent / "templates"


def write_html_report(output_dir: Path) -> Path:
    """Write report.html of a finished run, whole or not at all; an old file is replaced."""
    if output_dir.is_file():
        raise CheckpointError(
            f"{output_dir} is a file; give the output_dir of a finished run, such as "
            f"{output_dir.parent}"
        )
    report = read_report(output_dir / "report.json")
    config, path = output_dir / "config.yaml", output_dir / "report.html"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    page = html_report(report, read_history(output_dir / "metrics.jsonl"), config=text)
    try:
        atomic.write_text(path, page)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def html_report(report: Report, history: Iterable[Mapping[str, Any]], *, config: str = "") -> str:
    """Return the page as text; equal inputs result in equal texts."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prefixes = ("environment.", "versions.", "latency.", "seconds.", "cost.", "vocabulary.")
    return templates.get_template("report.html.jinja").render(
        report=report,
        models=table.model_rows(report),
        notes=table.notes(report),
        sizes=figures.size_figure(report),
        confusions=figures.confusion_figure(report),
        candidates=figures.candidate_figure(report),
        tables=table.tables(report, most_labels=MANY_LABELS),
        stages=figures.stage_figures(report, curves_of(history)),
        facts={key: value for key, value in report.items() if key.startswith(prefixes)},
        config=config,
    )
