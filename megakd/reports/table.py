"""The result table: report.json as rows of text, which the page shows too.

The first row of a table has the titles; a table without further rows is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.contract.metric import lower_is_better
from megakd.contract.results import Report
from megakd.contract.tasks import MATCH, STUDENT, TEACHER, TEXT_METRIC
from megakd.process.terminal import aligned_rows
from megakd.reports.quantities import (
    duration,
    gigabytes,
    is_number,
    megabytes,
    short_count,
    step_time,
)

Rows = list[list[str]]
Form = str | Callable[[Any], str]
FEW_LABELS = 6
"""Labels of which the terminal shows scores and confusions."""
PRUNING_ROWS = 12
LEAST_ROUNDS = 5
"""Of five rounds, the range has the true median with a probability of 93 %."""


def result_table(report: Report, *, final: Path | None = None) -> str:
    """Return the report as aligned plain text, for the end of a run."""
    blocks = [
        [f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}"],
        [*aligned_rows(model_rows(report)), *notes(report)],
        *(aligned_rows(rows) for rows in tables(report, labels=FEW_LABELS).values()),
        [*_cost_lines(report), *([f"the student is in {final}"] if final else [])],
        [f"warning: {message}" for message in report["warnings"]],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def tables(report: Report, *, labels: int) -> dict[str, Rows]:
    """Return the tables below that of the models by title; of at most `labels` labels."""
    classes = report.get(f"{STUDENT}.per_class", ())
    classes = classes if len(classes) <= labels else ()
    names, counts = confusions(report) if classes else ([], [])
    pruning, most = report["pruning"], PRUNING_ROWS if report["pruning"] else 0
    # Evenly spaced, with both ends.
    shown = dict.fromkeys(n * (len(pruning) - 1) // (most - 1) for n in range(most))
    # A teacher is ranked by its metric, negated if lower is better.
    metric = report["metric_name"]
    sign = -1 if lower_is_better(metric) else 1
    ranking = [(f"{metric} (validation)", "score", lambda value: score(metric, sign * value))]
    has_rows = all(is_number(row.get("rows")) for row in report["pool"])
    every = {
        "Scores by label": _rows(
            classes, ("student, by label", "label", ""),
            ("precision", "precision", ".1%"), ("recall", "recall", ".1%"), ("f1", "f1", ".1%"),
            ("rows", "rows", ","),
        ),
        "Confusions": [
            ["student, by label", *(f"as {label}" for label in names)],
            *([name, *map("{:,}".format, row)] for name, row in zip(names, counts, strict=True)),
        ],
        "Evaluation sets": _set_rows(report),
        "Candidates": _rows(
            report["candidates"], ("iteration", "iteration", ""),
            ("sparsity", "sparsity", "g"), ("parameters", "parameters", short_count),
            ("metric", "metric", ".4f"), ("trade-off", "tradeoff", ".4f"),
            ("chosen", "chosen", ""),
        ),
        "Who taught": _rows(
            report["pool"], ("taught by", "name", ""),
            (report.get("pool.distribution", ""), "weight", ".3f"), ("steps", "steps", ","),
            *(ranking if any(is_number(one["score"]) for one in report["pool"]) else ()),
            *((("rows", "rows", ","),) if has_rows else ()),
        ),
        "Pruning": _rows(
            [pruning[index] for index in shown], ("pruned, step", "step", ","),
            ("width", "width", ","), ("parameters", "parameters", short_count),
            ("KL (nats)", "teacher_kl", ".4f"), ("step time", "step_seconds", step_time),
        ),
        "Stages": _stage_rows(report),
    }  # fmt: skip
    return {title: rows for title, rows in every.items() if rows[1:]}


def cell(value: object, form: Form = "") -> str:
    """Return a value as text; "-" if it is missing or not finite."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "-"
    return format(value, form) if isinstance(form, str) else form(value)


def _rows(items: Sequence[Mapping[str, Any]], *columns: tuple[str, str, Form]) -> Rows:
    titles = [title for title, _, _ in columns]
    return [titles, *([cell(one.get(key), form) for _, key, form in columns] for one in items)]


def score(name: str, value: object) -> str:
    """Return a metric as a percentage, or as a plain number if lower is better."""
    return cell(value, ".3f" if lower_is_better(name) else ".1%")


def shown_metrics(report: Report) -> list[str]:
    """Return the metrics of the table: `loss` only if lower is better for the main metric."""
    says_more = lower_is_better(report["metric_name"])
    return [name for name in report["metrics"] if name != "loss" or says_more]


def against_teacher(report: Report, model: str) -> str:
    """Return a comparison of a model's main metric with the largest teacher's.

    If higher is better, the comparison is the percentage of the teacher's score. For perplexity,
    it is the ratio to the teacher's perplexity (x1.20). For other metrics for which lower is
    better, it is the difference (+0.18).
    """
    name = report["metric_name"]
    mine, theirs = (report.get(f"{one}.{name}") for one in (model, TEACHER))
    if not (is_number(mine) and is_number(theirs)):
        return "-"
    if lower_is_better(name) and name != "perplexity":
        return f"{mine - theirs:+.3f}"
    if mine <= 0 or theirs <= 0:
        return "-"
    return f"x{mine / theirs:.2f}" if name == "perplexity" else f"{mine / theirs:.1%}"


def speed_up(report: Report, model: str, batch: int) -> str:
    """Return how many times as fast as the largest teacher a model is, with the range of rounds.

    The range alone is within the noise: it has 1, or it is of too few rounds.
    """
    key = f"{model}.speedup_batch_{batch}"
    low, high = report.get(f"{key}_low"), report.get(f"{key}_high")
    if not (is_number(low) and is_number(high)):
        return "-"
    if low == high:
        return f"{low:.2f}x"
    is_clear = report[f"latency.rounds_batch_{batch}"] >= LEAST_ROUNDS and not low < 1 < high
    return f"{report[key]:.2f}x ({low:.2f}-{high:.2f})" if is_clear else f"{low:.2f}-{high:.2f}x"


def model_rows(report: Report) -> Rows:
    """Return a row per model: sizes, scores, and times at each batch."""
    against = "vs teacher" if lower_is_better(report["metric_name"]) else "kept"
    whole, metrics = report.get(f"{TEACHER}.parameters"), shown_metrics(report)
    sizes = ["parameters", "non-embedding", "size MB", *(["smaller"] if whole else [])]
    times = [(f"ms (batch {batch})", "speed-up") for batch in report["batches"]]
    rows = [["", *sizes, *metrics, *([against] if whole else []), *sum(times, ())]]
    for model in report["models"]:
        start = f"{model}."
        of = {k.removeprefix(start): v for k, v in report.items() if k.startswith(start)}.get
        mine = of("parameters")
        row = [model, cell(mine, short_count), cell(of("encoder_parameters"), short_count)]
        row += [cell(of("bytes"), megabytes)]
        row += [f"{whole / mine:.1f}x" if mine else "-"] if whole else []
        row += [score(name, of(name)) for name in metrics]
        row += [against_teacher(report, model)] if whole else []
        for batch in report["batches"]:
            row += [cell(of(f"ms_batch_{batch}"), ".2f"), speed_up(report, model, batch)]
        rows.append(row)
    return rows


def notes(report: Report) -> list[str]:
    """Return the lines that explain the table of the models."""
    lower = [name for name in shown_metrics(report) if lower_is_better(name)]
    lines = [f"{', '.join(lower)}: lower is better"] if lower else []
    if "asked.what" in report:
        lines.append(f"the student was asked to have {_asked(report)}")
    agreement, trained = (report.get(f"{STUDENT}.{k}") for k in ("agreement", "trained_parameters"))
    if is_number(agreement):
        lines.append(f"student and teacher agree on {agreement:.1%} of the rows")
    errors = [(one, report.get(f"{one}.calibration_error")) for one in (STUDENT, TEACHER)]
    known = [f"{name} {value:.1%}" for name, value in errors if is_number(value)]
    if known:
        lines.append(f"expected calibration error: {', '.join(known)}")
    if report["batches"]:
        lines.append(
            f"ms: median of one forward, texts of {report['latency.tokens']} tokens on average, "
            f"{report['latency.dtype']}, on {report['latency.device']}; speed-up: median and range "
            "of the rounds; a range alone is within the noise"
        )
    if "vocabulary.type" in report:
        lines.append(
            f"student's vocabulary: {report['vocabulary.type']} of {report['vocabulary.size']:,} "
            f"pieces, {report['vocabulary.overlap']:.1%} of them also in the teacher's "
            f"{report['vocabulary.teacher_size']:,}"
        )
    if is_number(trained):
        lines.append(
            f"student: {short_count(trained)} parameters trained, as adapters (LoRA) of a model of "
            f"{short_count(report[f'{STUDENT}.parameters'])}"
        )
    return lines


def _asked(report: Report) -> str:
    """Return the size that the student was asked to have, and the size that it has."""
    what, value = report["asked.what"], report["asked.value"]
    if what == "parameters":
        size = short_count(report[f"{STUDENT}.parameters"])
        return f"{short_count(value)} weights, and has {size}"
    if what == "flops":
        mine, whole = (report[f"{one}.encoder_parameters"] for one in (STUDENT, TEACHER))
        return f"{value:.1%} of the operations in the teacher's layers, and has {mine / whole:.1%}"
    if not report["batches"]:
        return f"a speed-up of {value:g}x"
    size = speed_up(report, STUDENT, report["batches"][-1])
    return f"a speed-up of {value:g}x at batch {report['batches'][-1]}, and has {size}"


def confusions(report: Report) -> tuple[list[str], list[list[int]]]:
    """Return the labels, and by label and predicted label the number of the student's rows."""
    labels = [one["label"] for one in report.get(f"{STUDENT}.per_class", ())]
    pairs = report.get(f"{STUDENT}.confusion", ())
    counts = {(one["label"], one["predicted"]): one["rows"] for one in pairs}
    return labels, [[counts.get((a, b), 0) for b in labels] for a in labels]


def _set_rows(report: Report) -> Rows:
    rows = [["evaluation set", "model", "rows", *report["metrics"]]]
    for name in report["evaluation_sets"]:
        for model in report["models"]:
            values = [report.get(f"{model}.{name}.{metric}") for metric in report["metrics"]]
            if any(value is not None for value in values):
                scores = map(score, report["metrics"], values)
                rows.append([name, model, cell(report[f"{name}.rows"], ","), *scores])
    return rows


def _stage_rows(report: Report) -> Rows:
    # Of the scores, those of generated texts are in no other table.
    stages = report["stages"]
    texts = dict.fromkeys(
        key for row in stages for key in row if key == MATCH or key.startswith(TEXT_METRIC)
    )
    shares = (MATCH, f"{TEXT_METRIC}truncated")
    forms = {key: ".1%" if key in shares else ".4g" for key in texts}
    return _rows(
        [row if row["steps"] else {**row, "tokens_per_second": None} for row in stages],
        ("stage", "name", ""), ("steps", "steps", ","), ("time", "seconds", duration),
        ("tokens/s", "tokens_per_second", ",.0f"), ("peak memory", "peak_memory_bytes", gigabytes),
        *((key.removeprefix(TEXT_METRIC), key, form) for key, form in forms.items()),
    )  # fmt: skip


def _cost_lines(report: Report) -> list[str]:
    lines: list[str] = []
    if stages := report["stages"]:
        peak = gigabytes(max(stage["peak_memory_bytes"] for stage in stages))
        seconds = duration(sum(stage["seconds"] for stage in stages))
        lines = [f"training {seconds}, peak memory {peak} per rank"]
        start = "seconds."
        beside = {k.removeprefix(start): v for k, v in report.items() if k.startswith(start)}
        beside.pop("training", None)
        if beside:
            listed = ", ".join(f"{name} {duration(value)}" for name, value in beside.items())
            lines.append(f"beside training {duration(sum(beside.values()))}: {listed}")
    return lines
