"""Texts that evaluations have generated: the entries of report.json, and their table."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from megakd.contract.tasks import MATCH, TEXT_METRIC, TEXTS, file_of_step, is_text_metric
from megakd.reports.history import panels, read_history
from megakd.reports.quantities import is_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from megakd.contract.results import GenerationReport, Report, TextReport
    from megakd.reports.history import Panels

SHARES = (MATCH, *(f"{TEXT_METRIC}{n}" for n in ("truncated", "distinct_2", "top1_agreement")))
"""Metrics of generated texts that are shares; the others are numbers of tokens, or nats."""
SHOWN = 8
"""Texts of an evaluation in the report."""
LENGTH = f"{TEXT_METRIC}tokens"


def generation_reports(output_dir: Path, stages: Sequence[str]) -> list[GenerationReport]:
    """Return the last evaluation on generated texts of each stage that has one.

    Args:
        output_dir: folder of a run with metrics.jsonl and the files of the texts.
        stages: names of the stages, in order.
    """
    history = panels(read_history(output_dir / "metrics.jsonl"))
    found: list[GenerationReport] = []
    for stage in stages:
        metrics = _metrics(history.get(stage, {}).get("eval", {}))
        if LENGTH in metrics:
            step = metrics[LENGTH][0]
            last = {name: value for name, (at, value) in metrics.items() if at == step}
            texts = _texts(file_of_step(output_dir / TEXTS / stage, step))
            found.append({"stage": stage, "step": step, "metrics": last, "texts": texts})
    return found


def _metrics(evaluations: Panels) -> dict[str, tuple[int, float]]:
    """Return step and value of the last finite value of each metric of generated texts."""
    curves = {name: by_view[""] for name, by_view in evaluations.items() if "" in by_view}
    return {
        name: curve.points[-1]
        for name, curve in curves.items()
        if curve.points and is_text_metric(name)
    }


def _texts(path: Path) -> list[TextReport]:
    """Return the first texts of a file; none if the file was removed or is damaged."""
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, SHOWN)]
    except (OSError, ValueError):
        return []


def generation_rows(report: Report) -> list[list[str]]:
    """Return a row per evaluation on generated texts, with `match` first."""
    entries = report["generation"]
    known = dict.fromkeys(name for entry in entries for name in entry["metrics"])
    names = sorted(known, key=lambda name: name != MATCH)
    rows = [["generated texts", "step", *(name.removeprefix(TEXT_METRIC) for name in names)]]
    for entry in entries:
        cells = (text_value(name, entry["metrics"].get(name)) for name in names)
        rows.append([entry["stage"], f"{entry['step']:,}", *cells])
    return rows


def text_value(name: str, value: Any) -> str:
    """Return a metric of generated texts as a percentage, or as a plain number."""
    if not is_number(value):
        return "-"
    return f"{value:.1%}" if name in SHARES else f"{value:.4g}"


def shares_matched(texts: Sequence[Mapping[str, Any]]) -> str:
    """Return how many of the texts match, such as "3 of 8"; "" if texts are not compared."""
    compared = [text for text in texts if text["matches"] is not None]
    matched = sum(bool(text["matches"]) for text in compared)
    return f"{matched} of {len(compared)}" if compared else ""
