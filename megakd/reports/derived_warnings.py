"""Warnings that follow from the numbers of a report, each with what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from megakd.contract.metric import lower_is_better
from megakd.contract.results import Report
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.reports.history import Curves, curves_of
from megakd.reports.quantities import is_number
from megakd.reports.table import score

LEAST_ROWS = 5
"""Rows of a label below which no row that is recognised may be chance."""
NOISE = 0.01
"""Difference of two evaluations that noise may explain: a point, or 1 % if lower is better."""
NAMED = 5


def derived_warnings(report: Report, history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the warnings of a report and of the records of its metrics.jsonl."""
    return [
        *_labels(report),
        *_baselines(report),
        *_above_teacher(report),
        *_rising_teachers(report, curves_of(history)),
        *_chance(report),
    ]


def _labels(report: Report) -> Iterator[str]:
    for name in (TEACHER, STUDENT):
        missed = [
            f"{one['label']} ({one['rows']} rows)"
            for one in report.get(f"{name}.per_class", ())
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
    mine = report.get(f"{STUDENT}.{name}")
    for baseline in report["baselines"]:
        theirs = report.get(f"{baseline}.{name}")
        if _is_better(name, theirs, mine):
            yield (
                f"the baseline {baseline} scores {score(name, theirs)} {name}, the student "
                f"{score(name, mine)}; repeat both with another seed, and take the baseline's "
                "settings if it is ahead again"
            )


def _above_teacher(report: Report) -> Iterator[str]:
    name = report["metric_name"]
    mine, theirs = (report.get(f"{model}.{name}") for model in (STUDENT, TEACHER))
    if not (is_number(mine) and is_number(theirs) and _is_better(name, mine, theirs)):
        return
    # Two standard errors, at most, of the difference of two classifiers: only the rows on which
    # both disagree make one.
    rows = sum(one["rows"] for one in report.get(f"{STUDENT}.per_class", ()))
    noise = 2 * math.sqrt((1 - report.get(f"{STUDENT}.agreement", 0.0)) / rows) if rows else 0.0
    if abs(mine - theirs) > noise:
        yield (
            f"the student is above its teacher ({score(name, mine)} and {score(name, theirs)} "
            f"{name}): the teacher has learnt the task too briefly, or the rows are too few to "
            "tell them apart; train the teacher longer (teacher.finetune), or give more weight to "
            "the labels"
        )


def _rising_teachers(report: Report, curves: Curves) -> Iterator[str]:
    metric = report["metric_name"]
    is_low = lower_is_better(metric)
    for name in report["teachers"]:
        stage = f"{name}-finetune"
        points = curves.get(stage, {}).get(f"eval/{metric}", [])
        if len(points) < 2:
            continue
        *earlier, (step, high) = points
        before, low = (min if is_low else max)(earlier, key=lambda point: point[1])
        noise = NOISE * abs(low) if is_low else NOISE
        if _is_better(metric, high, low) and abs(high - low) > noise:
            yield (
                f"{stage} still rises: {score(metric, low)} {metric} at step {before:,}, "
                f"{score(metric, high)} at step {step:,}, its last evaluation; train the teacher "
                "longer (num_train_epochs or max_steps of its finetune)"
            )


def _chance(report: Report) -> Iterator[str]:
    rows = [one["rows"] for one in report.get(f"{STUDENT}.per_class", ())]
    metric = next((one["metric_name"] for one in report["candidates"]), "")
    # Candidates are scored on validation rows, whose labels may have other shares than test rows.
    if not sum(rows) or (metric == "accuracy" and report["evaluated_on"] != "validation"):
        return
    # What no constant answer exceeds; not known of other metrics.
    chance = {"accuracy": max(rows) / sum(rows), "matthews_correlation": 0.0}.get(metric)
    chance = 1 / len(rows) if metric.endswith("_macro") else chance
    lost = [
        f"{one['sparsity']:g} ({one['metric']:.1%})"
        for one in report["candidates"]
        if chance is not None and is_number(one["metric"]) and one["metric"] <= chance
    ]
    if lost:
        yield (
            f"candidates no better than chance ({chance:.1%}): {_listed(lost)}; they have learnt "
            "nothing in the trial, so the choice among them is noise: train the trial longer, "
            "raise its learning rate, or offer smaller sparsities"
        )


def _is_better(metric: str, one: object, other: object) -> bool:
    if not (is_number(one) and is_number(other)):
        return False
    return one < other if lower_is_better(metric) else one > other


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
