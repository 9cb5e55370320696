"""Warnings that follow from the numbers of a report, each with what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from megakd.contract.metric import lower_is_better
from megakd.contract.results import Report, WarningReport
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.reports.history import Panels
from megakd.reports.quantities import is_number
from megakd.reports.report_file import completed
from megakd.reports.table import score, teachers_of

LEAST_ROWS = 5
"""Rows of a label below which no row that is recognised may be chance."""
NOISE = 0.01
"""Difference of two evaluations that noise may explain: a point, or 1 % if lower is better."""
NAMED = 5


def derived_warnings(
    report: Report, curves: Mapping[str, Mapping[str, Panels]]
) -> list[WarningReport]:
    """Return the warnings of a report; `curves` are those of `history.panels`."""
    report = completed(report)
    kinds = {
        "label": _labels(report),
        "baseline": _baselines(report),
        "above teacher": _above_teacher(report),
        "rising teacher": _rising_teachers(report, curves),
        "chance": _chance(report),
    }
    return [{"kind": kind, "message": text} for kind, texts in kinds.items() for text in texts]


def _labels(report: Report) -> Iterator[str]:
    for name, model in {TEACHER: report["teacher"], STUDENT: report["student"]}.items():
        classes = () if model is None else model.get("per_class", ())
        missed = [
            f"{one['label']} ({one['rows']} rows)"
            for one in classes
            if one["rows"] >= LEAST_ROWS and one["recall"] == 0
        ]
        if missed:
            yield (
                f"{name}: no row is recognised of {_listed(missed)}; look for wrong labels, give "
                "the labels more training rows, or set class_weights of hard_cross_entropy to "
                "balanced"
            )


def _baselines(report: Report) -> Iterator[str]:
    name = report["metric_name"]
    mine = report["student"]["metrics"].get(name)
    for baseline, metrics in report["baselines"].items():
        if _is_better(name, metrics.get(name), mine):
            yield (
                f"the baseline {baseline} scores {score(name, metrics.get(name))} {name}, the "
                f"student {score(name, mine)}; repeat both with another seed, and take the "
                "baseline's settings if it is ahead again"
            )


def _above_teacher(report: Report) -> Iterator[str]:
    name, student, teacher = report["metric_name"], report["student"], report["teacher"]
    mine = student["metrics"].get(name)
    theirs = None if teacher is None else teacher["metrics"].get(name)
    if not (is_number(mine) and is_number(theirs) and _is_better(name, mine, theirs)):
        return
    # Two standard errors, at most, of the difference of two classifiers: only the rows on which
    # both disagree make one.
    rows = sum(one["rows"] for one in student.get("per_class", ()))
    noise = 2 * math.sqrt((1 - student.get("agreement", 0.0)) / rows) if rows else 0.0
    if abs(mine - theirs) > noise:
        yield (
            f"the student is above its teacher ({score(name, mine)} and {score(name, theirs)} "
            f"{name}): the teacher has learnt the task too briefly, or the rows are too few to "
            "tell them apart; train the teacher longer (teacher.finetune), or give more weight to "
            "the labels"
        )


def _rising_teachers(report: Report, curves: Mapping[str, Mapping[str, Panels]]) -> Iterator[str]:
    metric = report["metric_name"]
    is_low = lower_is_better(metric)
    for name in teachers_of(report):
        stage = f"{name}-finetune"
        curve = curves.get(stage, {}).get("eval", {}).get(metric, {}).get("")
        if curve is None or len(curve.points) < 2:
            continue
        *earlier, (step, high) = curve.points
        before, low = (min if is_low else max)(earlier, key=lambda point: point[1])
        noise = NOISE * abs(low) if is_low else NOISE
        if _is_better(metric, high, low) and abs(high - low) > noise:
            yield (
                f"{stage} still rises: {score(metric, low)} {metric} at step {before:,}, "
                f"{score(metric, high)} at step {step:,}, its last evaluation; train the teacher "
                "longer (num_train_epochs or max_steps of its finetune)"
            )


def _chance(report: Report) -> Iterator[str]:
    rows = [one["rows"] for one in report["student"].get("per_class", ())]
    metric = next((one.get("metric_name", "") for one in report["candidates"]), "")
    # Candidates are scored on validation rows, whose labels may have other shares than test rows.
    is_known = sum(rows) and (report["evaluated_on"] == "validation" or metric != "accuracy")
    chance = _chance_score(metric, rows) if is_known else None
    if chance is None:
        return
    lost = [
        f"{one.get('shape') or format(one['sparsity'], 'g')} ({one['metric']:.1%})"
        for one in report["candidates"]
        if is_number(one["metric"]) and one["metric"] <= chance
    ]
    if lost:
        yield (
            f"candidates no better than chance ({chance:.1%}): {_listed(lost)}; they have learnt "
            "nothing in the trial, so the choice among them is noise: train the trial longer, "
            "raise its learning rate, or offer smaller sparsities"
        )


def _chance_score(metric: str, rows: Sequence[int]) -> float | None:
    # What no constant answer exceeds; None if that is not known of a metric.
    if metric == "accuracy":  # whoever says the most frequent label has its share
        return max(rows) / sum(rows)
    if metric.endswith("_macro"):
        return 1 / len(rows)
    return 0.0 if metric == "matthews_correlation" else None


def _is_better(metric: str, one: float | None, other: float | None) -> bool:
    if not (is_number(one) and is_number(other)):
        return False
    return one < other if lower_is_better(metric) else one > other


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
