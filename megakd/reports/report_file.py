"""The files that a report is read from, and warnings that follow from their numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megakd.config.task import FROZEN, STANDARD_ERROR, STUDENT, TEACHER, TFIDF, THRESHOLD
from megakd.errors import CheckpointError, listed
from megakd.process import files
from megakd.reports.table import is_number, score
from megakd.stage import lower_is_better
from megakd.training.record import Report

if TYPE_CHECKING:
    import torch

LIBRARIES = ("megakd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy")

GRAPH = f"{STUDENT}_onnx"
"""The student's graph among the models of the report, if it is written."""

REQUIRED = ("method", "task", "metric_name", "metrics", "models", "student.parameters", "stages")
"""Some keys of every report; reports of earlier versions lack the last ones."""


def write_report(path: Path, report: Report) -> None:
    """Write report.json, whole or not at all."""
    files.write_json(path, report)


def read_report(path: Path) -> Report:
    """Read report.json.

    Raises:
        CheckpointError: the file is missing, damaged, or no report of this version.
    """
    again = f"remove {path} and start the command of the run again, which reuses finished stages"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path} does not exist: megakd writes the file when the run is complete; start the "
            "command of the run again to continue the run"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is not JSON ({error}); {again}") from error
    report = cast("Report", content) if isinstance(content, dict) else {}
    missing = [key for key in REQUIRED if key not in report]
    if missing:
        raise CheckpointError(
            f"{path} is not a report of this version of megakd: {', '.join(missing)} missing; "
            f"{again}"
        )
    return report


@functools.cache
def installed_versions() -> Mapping[str, str]:
    """Return the versions of megakd and of what its numbers depend on."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def environment(
    *, ranks: int, device: torch.device, corpus_content_hash: str | None
) -> dict[str, Any]:
    """Return the conditions of a report's numbers: versions, ranks, device and data."""
    import torch

    from megakd.engine.memory import device_name

    versions = {f"versions.{name}": version for name, version in installed_versions().items()}
    return {
        "environment.python": platform.python_version(),
        "environment.platform": platform.platform(),
        "environment.device": device_name(device),
        "environment.cores": os.cpu_count(),
        "environment.threads": torch.get_num_threads(),
        "environment.ranks": ranks,
        "environment.corpus_content_hash": corpus_content_hash,
        **versions,
    }


Points = list[tuple[int, float]]

Curves = dict[str, dict[str, Points]]
"""(step, value) with rising steps and finite values, by stage and key, such as `train/loss`."""

LAST_STEP = 2**53
"""A record with a larger step is damaged: an axis could not tell the step from the next."""


def read_history(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the records of metrics.jsonl in order; none if the file does not exist.

    Truncated lines of a killed run and damaged lines are skipped.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            # An integer of too many digits and a structure that is too deep are damage, too.
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, Mapping):
                    yield cast("Mapping[str, Any]", record)


def curves_of(history: Iterable[Mapping[str, Any]]) -> Curves:
    """Return all curves, in the order of their first record.

    If a step was logged twice, because the run was killed and resumed, the last value is used.
    """
    stages: dict[str, dict[str, dict[int, float]]] = {}
    for record in history:
        stage, step = record.get("stage"), record.get("step")
        if not isinstance(stage, str) or not isinstance(step, int) or abs(step) > LAST_STEP:
            continue
        for key, value in record.items():
            if "/" in key and is_number(value):
                stages.setdefault(stage, {}).setdefault(key, {})[step] = float(value)
    return {
        stage: {key: sorted(values.items()) for key, values in curves.items()}
        for stage, curves in stages.items()
    }


LOSS_ERROR = "loss_difference_error"
"""Of a language model, the standard error of the difference of its loss from the student's."""

LEAST_ROWS = 5
"""Rows of a label below which no row that is recognised may be chance."""

MANY_ROWS, MOST_MISCALIBRATED, ROUNDING = 100, 0.2, 1e-4
"""Fewest scored rows, largest calibration error of useful probabilities, relative error of a loss.
"""

NOISE = 0.01
"""Difference of two evaluations that noise may explain: a point, or 1 % if lower is better."""


def derived_warnings(report: Report, history: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the warnings of a report and of the records of its metrics.jsonl."""
    rising = rising_teachers(report["teachers"], report["metric_name"], history)
    parts = (_of_labels, _of_scores, _chance, _of_probabilities, _of_few_rows)
    return [*rising, *(warning for part in parts for warning in part(report))]


def standard_errors(scores: Mapping[str, object], rows: int) -> dict[str, float]:
    """Return the standard error of every score that is a share of `rows` rows, by its key."""
    return {
        key + STANDARD_ERROR: math.sqrt(max(0.0, value * (1 - value)) / rows)
        for key, value in scores.items()
        if key.rpartition(".")[2] in ("accuracy", "exact_match") and is_number(value) and rows
    }


def _of_probabilities(report: Report) -> Iterator[str]:
    guess = report.get("loss_of_guessing", math.inf)
    for name in (TEACHER, STUDENT):
        loss, error = (report.get(f"{name}.{key}") for key in ("loss", "calibration_error"))
        if is_number(loss) and 0 < guess <= loss * (1 + ROUNDING):  # 0: all rows have one label
            yield (
                f"{name}: the loss {loss:.3f} is not below {guess:.3f}, that of guessing: it has "
                "learnt nothing, or is sure of wrong answers; train longer, try another "
                "train.learning_rate, and look for wrong labels"
            )
        if is_number(error) and error > MOST_MISCALIBRATED:
            yield (
                f"{name}: the calibration error is {error:.1%}: do not use its probabilities as "
                "such; train shorter, or fit a temperature on validation rows"
            )


def _of_few_rows(report: Report) -> Iterator[str]:
    if (rows := report.get("rows", MANY_ROWS)) < MANY_ROWS:
        yield (
            f"only {rows} rows were scored, fewer than {MANY_ROWS}: small differences of scores "
            "are chance; set task.test_files or task.validation_files to more rows"
        )
    if f"{STUDENT}.{THRESHOLD}" in report and report["evaluated_on"] == "validation":
        yield (
            f"the {THRESHOLD} was chosen on the rows that are scored, so the scores are too good; "
            "set task.test_files to other rows"
        )


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
    rows = report["rows"] if f"{STUDENT}.per_class" in report else 0
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


AGAIN = "repeat both with another seed, and take the baseline's settings if it is ahead again"

ABOVE = {
    TFIDF: "words alone do better: train the teacher longer (teacher.finetune), label more rows, "
    "or serve the baseline",
    FROZEN: "a linear classifier on the vectors of the pretrained model does better: train the "
    "teacher longer or with a smaller rate (teacher.finetune), or label more rows",
}
"""By baseline without training, what to do if it is ahead of the student."""

TEACHES_LESS = {
    TFIDF: "it teaches less than words alone tell; train it longer (teacher.finetune)",
    FROZEN: "its fine-tuning has lost what its vectors told; train it longer or with a smaller "
    "rate (teacher.finetune)",
}


def _of_scores(report: Report) -> Iterator[str]:
    name = report["metric_name"]
    mine, whole = (report.get(f"{model}.{name}") for model in (STUDENT, TEACHER))
    for baseline in report["baselines"]:
        theirs = report.get(f"{baseline}.{name}")
        if _gain(name, theirs, mine) > _noise(report, baseline):
            cure = ABOVE.get(baseline, AGAIN)
            yield (
                f"the baseline {baseline} scores {score(name, theirs)} {name}, the student "
                f"{score(name, mine)}; {cure}"
            )
    for baseline in (one for one in report["baselines"] if one in ABOVE):
        theirs = report.get(f"{baseline}.{name}")
        if _gain(name, theirs, whole) > 0:
            yield (
                f"the baseline {baseline} scores {score(name, theirs)} {name}, the teacher "
                f"{score(name, whole)}: {TEACHES_LESS[baseline]}"
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
