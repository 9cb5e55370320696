"""Five warnings that follow from the numbers of a report, each with what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megakd.contract.results import Report, lower_is_better
from megakd.contract.tasks import STUDENT, TEACHER, TFIDF, THRESHOLD
from megakd.errors import listed
from megakd.reports.report_file import curves_of
from megakd.reports.table import is_number, score

LOSS_ERROR = "loss_difference_error"
"""Of a language model, the standard error of the difference of its loss from the student's."""
LEAST_ROWS = 5
"""Rows of a label below which no row that is recognised may be chance."""
NOISE = 0.01
"""Difference of two evaluations that noise may explain: a point, or 1 % if lower is better."""


def derived_warnings(report: Report, history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the warnings of a report and of the records of its metrics.jsonl."""
    rising = rising_teachers(report["teachers"], report["metric_name"], history)
    return [*_of_labels(report), *_of_scores(report), *rising, *_chance(report)]


def _of_labels(report: Report) -> Iterator[str]:
    for name in (TEACHER, STUDENT):
        missed = [
            f"{one['label']} ({one['rows']} rows)"
            for one in report.get(f"{name}.per_class", ())
            if one["rows"] >= LEAST_ROWS and one["recall"] == 0
        ]
        if missed:
            cure = "give the labels more training rows, or set train.class_weights=balanced"
            if f"{name}.{THRESHOLD}" in report:
                cure = "train longer, or give the labels more training rows"
            yield f"{name}: no row is recognised of {listed(missed)}; look for wrong labels, {cure}"


def _noise(report: Report, model: str) -> float:
    """Return two standard errors of the difference of the main metric from the student's."""
    name = report["metric_name"]
    mine, theirs = (report.get(f"{one}.{name}") for one in (STUDENT, model))
    rows = sum(one["rows"] for one in report.get(f"{STUDENT}.per_class", ()))
    if rows and model == TEACHER:  # only the rows on which both disagree make a difference
        return 2 * math.sqrt((1 - report.get(f"{STUDENT}.agreement", 0.0)) / rows)
    if rows:  # of two shares of the rows
        spread = sum(s * (1 - s) for s in (mine, theirs) if is_number(s) and 0 <= s <= 1)
        return 2 * math.sqrt(spread / rows)
    error, loss = report.get(f"{model}.{LOSS_ERROR}", 0.0), report.get(f"{model}.loss")
    if not error or not is_number(theirs) or not lower_is_better(name):
        return 0.0
    # Perplexity is the exponential of the loss, and nats per character are a multiple of it.
    return 2 * error * (theirs if name == "perplexity" or not loss else theirs / loss)


def _of_scores(report: Report) -> Iterator[str]:
    name = report["metric_name"]
    mine, whole = (report.get(f"{model}.{name}") for model in (STUDENT, TEACHER))
    for baseline in report["baselines"]:
        theirs = report.get(f"{baseline}.{name}")
        if _gain(name, theirs, mine) > _noise(report, baseline):
            cure = (
                "repeat both with another seed, and take the baseline's settings if it is ahead "
                "again"
                if baseline != TFIDF
                else "words alone do better: train the teacher longer (teacher.finetune), label "
                "more rows, or serve the baseline"
            )
            yield (
                f"the baseline {baseline} scores {score(name, theirs)} {name}, the student "
                f"{score(name, mine)}; {cure}"
            )
    if _gain(name, mine, whole) > _noise(report, TEACHER):
        yield (
            f"the student is above its teacher ({score(name, mine)} and {score(name, whole)} "
            f"{name}): the teacher has learnt the task too briefly, or the rows are too few to "
            "tell them apart; train the teacher longer (teacher.finetune), or give more weight to "
            "the labels"
        )


def rising_teachers(
    teachers: Iterable[str], metric: str, history: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a warning for each teacher whose fine-tuning ended while its scores still rose."""
    curves, is_low = curves_of(history), lower_is_better(metric)
    for stage in (f"{name}-finetune" for name in teachers):
        *earlier, last = curves.get(stage, {}).get(f"eval/{metric}") or [(0, 0.0)]
        if not earlier:
            continue
        best = (min if is_low else max)(earlier, key=lambda point: point[1])
        if _gain(metric, last[1], best[1]) > (NOISE * abs(best[1]) if is_low else NOISE):
            yield (
                f"{stage} still rises: {score(metric, best[1])} {metric} at step {best[0]:,}, "
                f"{score(metric, last[1])} at step {last[0]:,}, its last evaluation; train the "
                "teacher longer (num_train_epochs or max_steps of its finetune)"
            )


def _chance(report: Report) -> Iterator[str]:
    rows = [one["rows"] for one in report.get(f"{STUDENT}.per_class", ())]
    metric = next((one["metric_name"] for one in report["candidates"]), "")
    # Candidates are scored on validation rows, whose labels may have other shares than test rows.
    if not sum(rows) or (metric == "accuracy" and report["evaluated_on"] != "validation"):
        return
    # What no constant answer exceeds; not known of other metrics.
    chance = {"accuracy": max(rows) / sum(rows), "matthews_correlation": 0.0}.get(metric, -math.inf)
    chance = 1 / len(rows) if metric.endswith("_macro") else chance
    lost = [
        f"{one['sparsity']:g} ({one['metric']:.1%})"
        for one in report["candidates"]
        if is_number(one["metric"]) and one["metric"] <= chance
    ]
    if lost:
        yield (
            f"candidates no better than chance ({chance:.1%}): {listed(lost)}; they have learnt "
            "nothing in the trial, so the choice among them is noise: train the trial longer, "
            "raise its learning rate, or offer smaller sparsities"
        )


def _gain(metric: str, one: object, other: object) -> float:
    """Return by how much `one` is better than `other`; 0 if one of them is missing."""
    if not (is_number(one) and is_number(other)):
        return 0.0
    return other - one if lower_is_better(metric) else one - other
