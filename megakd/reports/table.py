"""The tables of a report as rows of text, and the report as plain text.

The first row of a table has the titles; a table without further rows is left out. The templates of
the page call the public functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from megakd.contract.metric import lower_is_better
from megakd.contract.results import (
    AskedReport,
    CandidateReport,
    CostReport,
    GenerationReport,
    LatencyReport,
    ModelReport,
    PruningReport,
    Report,
    TextReport,
    headline_latency,
)
from megakd.contract.tasks import (
    MATCH,
    STUDENT,
    TEACHER,
    TEXT_METRIC,
    TEXTS,
    file_of_step,
    is_text_metric,
)
from megakd.process.terminal import aligned_rows
from megakd.reports.history import LAST_STEP, evenly, panels, read_history
from megakd.reports.quantities import (
    Ratio,
    duration,
    gigabytes,
    is_number,
    paired_ratio,
    short_count,
    step_time,
)
from megakd.reports.report_file import completed

Rows = list[list[str]]
FORWARD, ONE_LENGTH = "ms", "ms of "
SHARES = (MATCH, f"{TEXT_METRIC}truncated")
"""Metrics of generated texts that are shares; the other one is a number of tokens."""
FEW_LABELS = 6
"""Labels, or confusions of more labels, that the terminal shows."""
TEXTS_SHOWN = 8
"""Texts of an evaluation in the report."""


def result_table(report: Report, *, final: Path | None = None) -> str:
    """Return the report as aligned plain text, for the end of a run."""
    report = completed(report)
    tables = [
        class_rows(report, most=FEW_LABELS),
        confusion_rows(STUDENT, report["student"], most=FEW_LABELS),
        set_rows(report),
        asked_rows(report),
        candidate_rows(report["candidates"]),
        pool_rows(report),
        pruning_rows(report, most=6),
        generation_rows(report),
        stage_rows(report),
    ]
    lower = lower_metrics(report)
    notes = (
        f"{', '.join(lower)}: lower is better" if lower else "",
        class_note(report),
        latency_note(report),
        vocabulary_note(report),
        adapter_note(report["student"]),
    )
    blocks = [
        [f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}"],
        [*aligned_rows(beside(*model_parts(report))), *filter(None, notes)],
        *(aligned_rows(rows) for rows in tables if rows[1:]),
        [*_time_lines(report), *([f"the student is in {final}"] if final else [])],
        [f"warning: {one['message']}" for one in report["warnings"]],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def adapter_note(student: ModelReport) -> str:
    """Return a line about the weights of the adapters; empty if all weights were trained."""
    if "trained_parameters" not in student:
        return ""
    trained, whole = map(short_count, (student["trained_parameters"], student["parameters"]))
    return f"student: {trained} parameters trained, as adapters (LoRA) of a model of {whole}"


def vocabulary_note(report: Report) -> str:
    """Return a line about the student's own vocabulary; empty if all models share one."""
    vocabulary = report["vocabulary"]
    if vocabulary is None:
        return ""
    return (
        f"student's vocabulary: {vocabulary['type']} of {vocabulary['size']:,} pieces, "
        f"{vocabulary['overlap']:.1%} of them also in the teacher's {vocabulary['teacher_size']:,}"
    )


def _time_lines(report: Report) -> list[str]:
    lines: list[str] = []
    if stages := report["stages"]:
        peak = gigabytes(max(stage["peak_memory_bytes"] for stage in stages))
        seconds = duration(sum(stage["seconds"] for stage in stages))
        lines = [f"training {seconds}, peak memory {peak} per rank"]
        lines += elsewhere_lines(report["seconds"])
    return [*lines, cost_line(report["cost"])] if report["cost"] else lines


def elsewhere_lines(seconds: Mapping[str, float]) -> list[str]:
    """Return a line with the time outside training of the last start of a run, if known."""
    parts = {name: value for name, value in seconds.items() if name != "training"}
    listed = ", ".join(f"{name} {duration(value)}" for name, value in parts.items())
    return [f"beside training {duration(sum(parts.values()))}: {listed}"] if seconds else []


def cost_line(cost: CostReport) -> str:
    """Return a line with the cost of a method's choice and of the alternative method."""
    spent, whole = cost["seconds"], cost["alternative_seconds"]
    ratio = f"{whole / spent:.1f}x" if spent > 0 else ""
    times = {"": "", "1.0x": " (as long)"}.get(ratio, f" ({ratio})")
    mine, theirs = (
        f"{number} trial{'' if number == 1 else 's'}"
        for number in (cost["trials"], cost["alternative_trials"])
    )
    return (
        f"{mine}, {duration(spent)}; {cost['alternative_does']} ({cost['alternative']}): "
        f"{theirs}, about {duration(whole)}{times}"
    )


def scored_models(report: Report) -> list[tuple[str, ModelReport, Mapping[str, float]]]:
    """Return name, size and metrics of all models from the teachers to the baselines.

    A baseline has the student's size.
    """
    assistants = {entry["name"]: entry for entry in report["assistants"]}
    sizes = {entry["name"]: entry for entry in report["sizes"]}
    sized = {**teachers_of(report), **assistants, **sizes, STUDENT: report["student"]}
    baselines = report["baselines"].items()
    return [(name, model, model["metrics"]) for name, model in sized.items()] + [
        (name, report["student"], metrics) for name, metrics in baselines
    ]


def teachers_of(report: Report) -> dict[str, ModelReport]:
    """Return the teachers of the config by name."""
    pool: dict[str, ModelReport] = {entry["name"]: entry for entry in report["teachers"]}
    return pool or ({} if report["teacher"] is None else {TEACHER: report["teacher"]})


def largest(teachers: Mapping[str, ModelReport]) -> str | None:
    """Return the name of the largest teacher, the reference of comparisons; None without one."""
    return max(teachers, key=lambda name: teachers[name]["parameters"], default=None)


class Timing(NamedTuple):
    """One kind of work at one batch size: values by model, and milliseconds round by round."""

    kind: str
    batch: int
    values: dict[str, float]
    rounds: dict[str, Sequence[float]]

    def speed_up(self, name: str, reference: str) -> Ratio | None:
        """Return how many times as fast as the reference a model is; None if not timed."""
        timed = {name, reference} <= self.rounds.keys()
        return paired_ratio(self.rounds[reference], self.rounds[name]) if timed else None


def timings(report: Report, *, of_one_length: bool = False) -> list[Timing]:
    """Return the times of forwards and the rates of generation by batch size, smallest first.

    `of_one_length`: also those on texts of one length, if there are others.
    """
    entries: list[LatencyReport] = []
    headline, speedup = headline_latency(report["latency"]), report["speedup"]
    if speedup is not None:  # reports of early versions have no other times
        teacher = largest(teachers_of(report)) or TEACHER
        for name, ms in ((teacher, speedup["teacher_ms"]), (STUDENT, speedup["student_ms"])):
            entries.append({"model": name, "batch": speedup["batch"], "ms": ms})
    timings: dict[tuple[int, str], Timing] = {}
    for entry in (*entries, *report["latency"]):
        batch, kind = entry["batch"], "tokens/s" if "generated" in entry else FORWARD
        if kind == FORWARD and entry not in (*entries, *headline):
            kind = f"{ONE_LENGTH}{entry.get('length')} tokens"
        is_wanted = of_one_length or not kind.startswith(ONE_LENGTH)
        if is_wanted and is_number(entry["ms"]) and entry["ms"] > 0:
            timing = timings.setdefault((batch, kind), Timing(kind, batch, {}, {}))
            name = entry["model"] + (" (onnx)" if "runtime" in entry else "")
            timing.values[name] = entry.get("tokens_per_second", entry["ms"])
            timing.rounds[name] = entry.get("rounds_ms", [entry["ms"]])
    return [timings[key] for key in sorted(timings)]


def model_parts(report: Report, *, of_one_length: bool = False) -> tuple[Rows, Rows, Rows, Rows]:
    """Return the models' names, sizes, scores and times, for `beside`; see `timings`."""
    timed = timings(report, of_one_length=of_one_length)
    metrics, teacher = _metric_names(report), report["teacher"]
    reference = largest(teachers_of(report)) or TEACHER
    against = "vs teacher" if lower_is_better(report["metric_name"]) else "kept"
    names, sizes = [[""]], [["parameters", "non-embedding", "size MB"]]
    scores = [[*metrics]]
    speeds = [[title for one in timed for title in (f"{one.kind} (batch {one.batch})", "speed-up")]]
    if teacher:
        sizes[0].append("smaller")
        scores[0].append(against)
    for name, model, values in _with_graph(report):
        names.append([name])
        counts = map(short_count, (model["parameters"], model["encoder_parameters"]))
        sizes.append([*counts, megabytes(model.get("bytes"))])
        scores.append([score(metric, values.get(metric)) for metric in metrics])
        speeds.append([cell for one in timed for cell in _speed(one, name, reference)])
        if teacher:
            sizes[-1].append(times_smaller(report, model))
            scores[-1].append(against_teacher(report, values))
    return names, sizes, scores, speeds


def _with_graph(report: Report) -> list[tuple[str, ModelReport, Mapping[str, float]]]:
    models, student = scored_models(report), report["student"]
    if "onnx" in student:
        place = [name for name, _, _ in models].index(STUDENT) + 1
        graph = student["onnx"]
        as_graph: ModelReport = {**student, "bytes": graph["bytes"]}
        models.insert(place, (f"{STUDENT} (onnx)", as_graph, graph["metrics"]))
    return models


def times_smaller(report: Report, model: ModelReport) -> str:
    """Return the largest teacher's parameters divided by the model's, such as 12.3x, or "-"."""
    teacher = report["teacher"]
    if teacher is None or not model["parameters"]:
        return "-"
    return f"{teacher['parameters'] / model['parameters']:.1f}x"


def megabytes(size: float | None) -> str:
    """Return a size in bytes as a number of decimal megabytes, or "-" if the size is unknown."""
    return f"{size / 1e6:,.1f}" if is_number(size) else "-"


def beside(*parts: Rows) -> Rows:
    """Return the columns of several tables of the same rows as one table."""
    return [list(chain(*cells)) for cells in zip(*parts, strict=True)]


def timed_rows(report: Report) -> Rows:
    """Return a row per model that was timed."""
    names, _, _, times = model_parts(report, of_one_length=True)
    return [row for row in beside(names, times) if set(row[1:]) - {"-"}]


def latency_note(report: Report) -> str:
    """Return a line with length, dtype and device of the timing, if the report has them."""
    timed = [entry for entry in report["latency"] if "length" in entry]
    headline = headline_latency(timed)
    if not timed:
        return ""
    lengths, dtypes, devices = (
        ", ".join(dict.fromkeys(str(entry.get(key, "")) for entry in entries))
        for key, entries in (("length", headline), ("dtype", timed), ("device", timed))
    )
    texts = f"{lengths} tokens per text"
    if any("lengths" in entry for entry in headline):
        texts = f"texts as long as the held-out ones ({lengths} tokens on average)"
    note = f"ms: median of one forward, {texts}, {dtypes}, on {devices}"
    if generated := {e["generated"] for e in timed if "generated" in e}:
        note += f"; tokens/s: of the last {max(generated)}, which are generated"
    if any("rounds_ms" in entry for entry in timed):
        note += "; speed-up: median and range of the rounds; a range alone is within the noise"
    return note


def _metric_names(report: Report) -> list[str]:
    # `loss` only if lower is better for the main metric.
    says_more = lower_is_better(report["metric_name"])
    return [name for name in report["student"]["metrics"] if name != "loss" or says_more]


def lower_metrics(report: Report) -> list[str]:
    """Return the metrics of the table for which lower is better."""
    return [name for name in _metric_names(report) if lower_is_better(name)]


def score(name: str, value: float | None) -> str:
    """Return a metric as a percentage, or as a plain number if lower is better."""
    if not is_number(value):
        return "-"
    return f"{value:.3f}" if lower_is_better(name) else f"{value:.1%}"


def against_teacher(report: Report, metrics: Mapping[str, float]) -> str:
    """Return a comparison of a model's main metric with the teacher's.

    If higher is better, the comparison is the percentage of the teacher's score. For perplexity,
    it is the ratio to the teacher's perplexity (x1.20). For other metrics for which lower is
    better, it is the difference (+0.18).
    """
    name, teacher = report["metric_name"], report["teacher"]
    mine = metrics.get(name)
    theirs = None if teacher is None else teacher["metrics"].get(name)
    if not (is_number(mine) and is_number(theirs)):
        return "-"
    if lower_is_better(name) and name != "perplexity":
        return f"{mine - theirs:+.3f}"
    if mine <= 0 or theirs <= 0:
        return "-"
    return f"x{mine / theirs:.2f}" if name == "perplexity" else f"{mine / theirs:.1%}"


def _speed(timing: Timing, name: str, reference: str) -> tuple[str, str]:
    value = timing.values.get(name)
    shown = "-" if value is None else f"{value:.2f}"
    return shown, str(timing.speed_up(name, reference) or "-")


def candidate_rows(candidates: Sequence[CandidateReport]) -> Rows:
    """Return a row per candidate; metric and trade-off are fractions."""
    what = "shape" if any("shape" in one for one in candidates) else "sparsity"
    rows = [["iteration", what, "parameters", "metric", "trade-off", "chosen"]]
    for one in candidates:
        weighed = (f"{v:.4f}" if is_number(v) else "-" for v in (one["metric"], one["tradeoff"]))
        size = [one.get("shape", f"{one['sparsity']:g}"), short_count(one["parameters"])]
        rows.append([str(one["iteration"]), *size, *weighed, "yes" if one["chosen"] else "-"])
    return rows


def asked_rows(report: Report) -> Rows:
    """Return a row per student that was cut to a size, with the size that it has."""
    rows = [["size", "asked", "measured"]]
    for name, model, _ in scored_models(report):
        asked = None if name in report["baselines"] else model.get("asked")
        if asked is not None:
            rows.append([name, *_asked(report, name, model, asked)])
    return rows


def _asked(report: Report, name: str, model: ModelReport, asked: AskedReport) -> tuple[str, str]:
    value, teacher = asked["value"], report["teacher"]
    if asked["what"] == "parameters":
        return f"{short_count(value)} weights", short_count(model["parameters"])
    if asked["what"] == "flops":
        whole = 0 if teacher is None else teacher["encoder_parameters"]
        share = f"{model['encoder_parameters'] / whole:.1%}" if whole else "-"
        return f"{value:.1%} of the layers", share
    place = " (onnx)" if asked.get("runtime") == "onnx" else ""
    reference, length = largest(teachers_of(report)) or TEACHER, asked.get("tokens")
    forward = (asked.get("batch", 1), FORWARD if length is None else f"{ONE_LENGTH}{length} tokens")
    timed = {(one.batch, one.kind): one for one in timings(report, of_one_length=True)}
    ratio = forward in timed and timed[forward].speed_up(name + place, reference + place)
    return f"{value:g}x at batch {forward[0]}{place}", str(ratio or "-")


def class_rows(report: Report, *, most: int) -> Rows:
    """Return the student's scores by label; no rows if there are more than `most` labels."""
    classes = report["student"].get("per_class", ())
    rows = [["student, by label", "precision", "recall", "f1", "rows"]]
    for one in classes if len(classes) <= most else ():
        scores = (one["precision"], one["recall"], one["f1"])
        rows.append([one["label"], *(f"{value:.1%}" for value in scores), f"{one['rows']:,}"])
    return rows


def confusion_rows(name: str, model: ModelReport | None, *, most: int) -> Rows:
    """Return a row per label with the counts of the predicted labels, or the `most` confusions."""
    counts = model.get("confusion", {}) if model else {}
    if len(counts) <= most:
        rows = ([label, *(f"{row.get(n, 0):,}" for n in counts)] for label, row in counts.items())
        return [[f"{name}, by label", *(f"as {label}" for label in counts)], *rows]
    pairs = [(n, a, b) for a, row in counts.items() for b, n in row.items() if a != b]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:most]
    return [[f"{name}, label", "predicted", "rows"], *([a, b, f"{n:,}"] for n, a, b in pairs)]


def class_note(report: Report) -> str:
    """Return a line with agreement and calibration of a classifier; empty for other models."""
    student, teacher = report["student"], report["teacher"]
    parts: list[str] = []
    if "agreement" in student:
        parts.append(f"student and teacher agree on {student['agreement']:.1%} of the rows")
    models = {STUDENT: student, **({} if teacher is None else {TEACHER: teacher})}
    errors = [
        f"{name} {model['calibration_error']:.1%}"
        for name, model in models.items()
        if "calibration_error" in model
    ]
    if errors:
        parts.append(f"expected calibration error: {', '.join(errors)}")
    return "; ".join(parts)


def set_rows(report: Report) -> Rows:
    """Return a row per evaluation set and model."""
    metrics = list(report["student"]["metrics"])
    rows = [["evaluation set", "model", "rows", *metrics]]
    for name, entry in report["evaluation_sets"].items():
        for model, values in entry["metrics"].items():
            scores = (score(metric, values.get(metric)) for metric in metrics)
            rows.append([name, model, f"{entry['rows']:,}", *scores])
    return rows


def pool_rows(report: Report) -> Rows:
    """Return a row per teacher of a pool, with the score if teachers were ranked."""
    pool, metric = report["pool"], report["metric_name"]
    if pool is None:
        return []
    teachers = pool["teachers"]
    columns = [
        ["taught by", *(one["name"] for one in teachers)],
        [pool["distribution"], *(f"{one['weight']:.3f}" for one in teachers)],
        ["steps", *(f"{one['steps']:,}" for one in teachers)],
    ]
    if any(one["score"] is not None for one in teachers):
        # A teacher is ranked by its metric, negated if lower is better.
        sign = -1 if lower_is_better(metric) else 1
        worth = [None if one["score"] is None else sign * one["score"] for one in teachers]
        columns.append([f"{metric} (validation)", *(score(metric, value) for value in worth)])
    counts = [one.get("rows") for one in teachers]
    if None not in counts:
        columns.append(["rows", *(f"{count:,}" for count in counts)])
    return [list(row) for row in zip(*columns, strict=True)]


def pruning_course(report: Report) -> list[PruningReport]:
    """Return the rows of `pruning` by rising step; the last row counts if a step has several."""
    rows = {row["step"]: row for row in report["pruning"] if abs(row["step"]) <= LAST_STEP}
    return [rows[step] for step in sorted(rows)]


def pruning_rows(report: Report, *, most: int) -> Rows:
    """Return size, divergence and step time of a pruned student at up to `most` (>= 2) steps."""
    rows = [["pruned, step", "width", "parameters", "KL (nats)", "step time"]]
    for row in evenly(pruning_course(report), most):
        divergence = f"{row['teacher_kl']:.4f}" if is_number(row["teacher_kl"]) else "-"
        size = [f"{row['width']:,}", short_count(row["parameters"])]
        rows.append([f"{row['step']:,}", *size, divergence, step_time(row["step_seconds"])])
    return rows


def stage_rows(report: Report) -> Rows:
    """Return a row per stage with its time and memory."""
    rows = [["stage", "steps", "time", "tokens/s", "peak memory"]]
    for stage in report["stages"]:
        trained = stage["steps"] > 0 and is_number(stage["tokens_per_second"])
        speed = f"{stage['tokens_per_second']:,.0f}" if trained else "-"
        used = [duration(stage["seconds"]), speed, gigabytes(stage["peak_memory_bytes"])]
        rows.append([stage["name"], f"{stage['steps']:,}", *used])
    return rows


def stage_scores(report: Report) -> Rows:
    """Return a row per stage with the scores of the model that the stage keeps."""
    stages = report["stages"]
    known = dict.fromkeys(name for stage in stages for name in stage["metrics"])
    names = [name for name in known if not name.startswith(TEXT_METRIC)]
    scores = ([score(name, stage["metrics"].get(name)) for name in names] for stage in stages)
    return [names, *scores]


def generation_reports(output_dir: Path, stages: Sequence[str]) -> list[GenerationReport]:
    """Return the last evaluation on generated texts of each stage that has one."""
    history = panels(read_history(output_dir / "metrics.jsonl"))
    entries: list[GenerationReport] = []
    for stage in stages:
        curves = {n: c[""] for n, c in history.get(stage, {}).get("eval", {}).items() if "" in c}
        last = {n: c.points[-1] for n, c in curves.items() if c.points and is_text_metric(n)}
        if (length := f"{TEXT_METRIC}tokens") in last:
            step = last[length][0]
            metrics = {name: value for name, (at, value) in last.items() if at == step}
            texts = _texts(file_of_step(output_dir / TEXTS / stage, step))
            entries.append({"stage": stage, "step": step, "metrics": metrics, "texts": texts})
    return entries


def _texts(path: Path) -> list[TextReport]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, TEXTS_SHOWN)]
    except (OSError, ValueError):
        return []


def generation_rows(report: Report) -> Rows:
    """Return a row per evaluation on generated texts, with `match` first."""
    entries = report["generation"]
    known = dict.fromkeys(name for entry in entries for name in entry["metrics"])
    names = sorted(known, key=lambda name: name != MATCH)
    rows = [["generated texts", "step", *(name.removeprefix(TEXT_METRIC) for name in names)]]
    for entry in entries:
        cells = (_text_value(name, entry["metrics"].get(name)) for name in names)
        rows.append([entry["stage"], f"{entry['step']:,}", *cells])
    return rows


def _text_value(name: str, value: Any) -> str:
    if not is_number(value):
        return "-"
    return f"{value:.1%}" if name in SHARES else f"{value:.4g}"
