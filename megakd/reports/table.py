"""The result table, as text and on the page, and the model card around it.

The first row of a table has the titles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.task import (
    STANDARD_ERROR,
    STUDENT,
    TEACHER,
    TEXT_METRIC,
    TaskType,
    is_text_metric,
)
from megakd.models.model_folder import brings_code, hub_id, needs_5
from megakd.models.thresholds import threshold_lines
from megakd.process.seals import CARD
from megakd.process.terminal import aligned_rows
from megakd.stage import lower_is_better
from megakd.training.record import Report

Rows = list[list[str]]

TABLES = {
    f"{STUDENT}.per_class": "Scores by label",
    "evaluation_sets": "Evaluation sets",
    "candidates": "Candidates",
    "pool": "Who taught",
    "pruning": "Pruning",
    "stages": "Stages",
}
"""Titles of the lists of report.json that are tables, whose columns are the keys of their rows."""

OF_STAGE = ("name", "steps", "seconds", "tokens_per_second", "peak_memory_bytes")
"""Keys of a stage; its table has them and scores of generated texts, which no other table has."""

FEW_LABELS, MOST_STEPS = 6, 12
"""Labels of which the terminal shows scores, and rows of a table over steps."""

_MOST_KEPT = 1.05

LEAST_ROUNDS = 5
"""Of five rounds, the range has the true median with a probability of 93 %."""


def result_table(report: Report, *, final: Path | None = None) -> str:
    """Return the report as aligned plain text, for the end of a run."""
    below = tables(report, most_labels=FEW_LABELS)
    blocks = [
        [
            f"{report['method']} on {report['task']}, scored on {report['evaluated_on']}"
            + "; the log has the validation rows" * (report["evaluated_on"] == "test"),
            *([report["data"]] if "data" in report else []),
        ],
        [*aligned_rows(model_rows(report)), *notes(report)],
        *([title, *aligned_rows(rows)] for title, rows in below.items()),
        [*_time_lines(report), *([f"the student is in {final}"] if final else [])],
        [f"warning: {message}" for message in report["warnings"]],
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def tables(report: Report, *, most_labels: int) -> dict[str, Rows]:
    """Return the tables below that of the models by title, without empty ones."""
    shown: dict[str, Rows] = {}
    for name, title in TABLES.items():
        items: Sequence[Mapping[str, Any]] = report.get(name, ())
        if not items or (name.endswith("per_class") and len(items) > most_labels):
            continue
        every = dict.fromkeys(key for one in items for key in one)
        values = {key: [one.get(key) for one in items] for key in every}
        keys = [key for key in every if any(isinstance(v, str | int | float) for v in values[key])]
        keys = [key for key in keys if not key.endswith(STANDARD_ERROR)]
        if name == "stages":
            keys = [key for key in keys if key in OF_STAGE or is_text_metric(key)]
        if name.endswith("per_class") and "f1" in keys:  # the worst first
            items = sorted(items, key=lambda one: one["f1"] if is_number(one["f1"]) else -1)
        if "step" in keys:  # evenly spaced, with both ends
            last = len(items) - 1
            most = min(len(items), MOST_STEPS)
            items = [items[number * last // max(1, most - 1)] for number in range(most)]
        titles = [key.removeprefix(TEXT_METRIC).replace("_", " ") for key in keys]
        texts = ([_with_error(one, key, partial(cell, key)) for key in keys] for one in items)
        shown[title] = [titles, *texts]
    return shown


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value of report.json is a finite number; NaN is stored as null."""
    is_bool = isinstance(value, bool)
    return not is_bool and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def cell(key: str, value: object) -> str:
    """Return a value as text, as the ending of its key says; "-" if it is missing or not finite."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "-"
    form = next((form for ending, form in FORMS.items() if key.endswith(ending)), None)
    if form is not None:
        return form(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def short_count(number: float, form: str = ".2f") -> str:
    """Return a number with a unit from a thousand on, such as 22.71M."""
    if abs(number) < 1000:
        return f"{number:.4g}" if abs(number) > 1e-12 else "0"
    shown = {unit: f"{number / size:{form}}" for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9))}
    # 999,999 is 1.00M, not 1000.00k.
    unit = next((unit for unit, text in shown.items() if abs(float(text)) < 1000), "B")
    return shown[unit] + unit


def duration(seconds: float) -> str:
    """Return hours and minutes, minutes and seconds, seconds, or milliseconds."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m {rest:02d}s"
    return f"{seconds:.1f}s" if seconds >= 1 or not seconds else f"{1000 * seconds:.0f} ms"


FORMS: Mapping[str, Callable[[float], str]] = {
    "parameters": short_count,
    "memory_bytes": lambda size: f"{size / 1e9:.2f} GB",
    "bytes": lambda size: f"{size / 1e6:,.1f}",
    "per_second": "{:,.0f}".format,
    "seconds": duration,
    "sparsity": "{:g}".format,
    "ms": "{:.2f}".format,
}
"""How a number is shown, by the ending of its key; the first one counts."""


def score(name: str, value: object) -> str:
    """Return a metric as a percentage, or as a plain number if lower is better."""
    if not is_number(value):
        return "-"
    return f"{value:.3f}" if lower_is_better(name) else f"{value:.1%}"


def _with_error(values: Mapping[str, object], key: str, shown: Callable[[object], str]) -> str:
    """Return a value as text, with the standard error if there is one."""
    error = values.get(key + STANDARD_ERROR)
    return shown(values.get(key)) + (f" ±{shown(error)}" if is_number(error) else "")


def model_rows(report: Report) -> Rows:
    """Return a row per model: sizes, scores, and times at each batch."""
    metrics, whole = shown_metrics(report), report.get(f"{TEACHER}.parameters")
    against = "vs teacher" if lower_is_better(report["metric_name"]) else "kept"
    rows: Rows = []
    titles = {"parameters": "parameters", "encoder_parameters": "non-embedding", "bytes": "size MB"}
    for model in report["models"]:
        row = [("", model)]
        row += [(title, cell(key, report.get(f"{model}.{key}"))) for key, title in titles.items()]
        if whole:
            mine = report.get(f"{model}.parameters")
            row.append(("smaller", f"{whole / mine:.1f}x" if mine else "-"))
        row += [
            (name, _with_error(report, f"{model}.{name}", partial(score, name))) for name in metrics
        ]
        if whole:
            row.append((against, against_teacher(report, model)))
        for batch in report["batches"]:
            row.append((f"ms (batch {batch})", cell("ms", report.get(f"{model}.ms_batch_{batch}"))))
            row.append(("speed-up", speed_up(report, model, batch)))
        rows = rows or [[title for title, _ in row]]
        rows.append([text for _, text in row])
    return rows


def result_sentence(report: Report) -> str:
    """Return the result in a sentence, with the teacher in the same form; "" without a student.

    The form is the smallest that both have: int8, a graph, or the model itself.
    """
    metric, forms = report["metric_name"], ("_int8", "_onnx", "")
    has = report["models"]
    both = (form for form in forms if {f"{STUDENT}{form}", f"{TEACHER}{form}"} <= {*has})
    form = next(both, "")
    mine, theirs = f"{STUDENT}{form}", f"{TEACHER}{form}"
    if not is_number(report.get(f"{mine}.{metric}")):
        return ""
    name = metric.replace("_", " ")
    parts = [f"{name} {_with_error(report, f'{mine}.{metric}', partial(score, metric))}"]
    if is_number(size := report.get(f"{mine}.bytes")):
        parts.append(f"{size / 1e6:,.1f} MB")
    against = list[str]()
    if report["batches"] and is_number(time := report.get(f"{mine}.ms_batch_1")):
        parts.append(f"{time:.1f} ms a text")
        if is_number(slow := report.get(f"{theirs}.ms_batch_1")) and time:
            against.append(f"{slow / time:.1f} times as fast as")
    if is_number(whole := report.get(f"{theirs}.bytes")) and is_number(size) and size:
        against.append(f"{whole / size:.1f} times smaller than")
    words = {"_int8": ", both in int8", "_onnx": ", both as graphs", "": ""}[form]
    end = f": {' and '.join(against)} its teacher{words}" if against else ""
    return f"The student: {', '.join(parts)}{end}."


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
    if name == "perplexity":
        return f"x{mine / theirs:.2f}"
    # More than all is not kept: the teacher has learnt too little.
    return f"{mine / theirs:.1%}" if mine <= theirs * _MOST_KEPT else "above"


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


def notes(report: Report) -> list[str]:
    """Return the lines that explain the table of the models."""
    get, lines = report.get, list[str]()
    if lower := [name for name in shown_metrics(report) if lower_is_better(name)]:
        lines.append(f"{', '.join(lower)}: lower is better")
    if any(key.endswith(STANDARD_ERROR) for key in report):
        lines.append(f"±: standard error of a share of the {report['rows']:,} scored rows")
    if parts := get(f"{STUDENT}.parts"):
        weights = cell("parameters", get(f"{STUDENT}.parameters"))
        lines.append(f"student: {parts} of its teacher · {weights} weights")
    if "asked.what" in report:
        form = {
            "parameters": "{:,.0f} weights",
            "flops": "{:.1%} of the operations in the teacher's layers",
            "speedup": "a speed-up of {:g}x at the largest batch",
        }[report["asked.what"]]
        lines.append(f"the student was asked to have {form.format(report['asked.value'])}")
    if is_number(agreement := get(f"{STUDENT}.agreement")):
        lines.append(f"student and teacher agree on {agreement:.1%} of the rows")
    errors = {name: get(f"{name}.calibration_error") for name in (STUDENT, TEACHER)}
    if known := [f"{name} {value:.1%}" for name, value in errors.items() if is_number(value)]:
        lines.append(f"expected calibration error: {', '.join(known)}")
    lines += threshold_lines(report)
    if report["batches"]:
        lines.append(
            f"ms: median of one forward, texts of {report['latency.tokens']} tokens on average, "
            f"{report['latency.dtype']}, on {report['latency.device']}; speed-up: median and range "
            "of the rounds; a range alone is within the noise"
        )
    alone, name = f"{TEACHER}_int8", report["metric_name"]
    if report["batches"] and is_number(gain := get(f"{alone}.speedup_batch_1")):
        lines.append(
            f"the teacher alone as an int8 graph: {gain:.1f} times as fast at batch 1, "
            f"{score(name, get(f'{alone}.{name}'))} {name}"
        )
    if is_number(trained := get(f"{STUDENT}.trained_parameters")):
        whole = short_count(report[f"{STUDENT}.parameters"])
        lines.append(
            f"student: {short_count(trained)} parameters trained, as adapters (LoRA) of a model of "
            f"{whole}"
        )
    return lines


def _time_lines(report: Report) -> list[str]:
    lines: list[str] = []
    if stages := report["stages"]:
        peak = cell("memory_bytes", max(stage["peak_memory_bytes"] for stage in stages))
        seconds = duration(sum(stage["seconds"] for stage in stages))
        of = f" in {len(stages)} stages" * (len(stages) > 1)
        lines.append(f"training {seconds}{of}, peak memory {peak} per rank")
    start = "seconds."
    beside = {k.removeprefix(start): v for k, v in report.items() if k.startswith(start)}
    beside.pop("training", None)
    if beside:
        listed = ", ".join(f"{name} {duration(value)}" for name, value in beside.items())
        lines.append(f"beside training {duration(sum(beside.values()))}: {listed}")
    return lines


AUTO_CLASSES: Mapping[TaskType, tuple[str, str]] = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "regression": ("AutoModelForSequenceClassification", "text-classification"),
    "mlm": ("AutoModelForMaskedLM", "fill-mask"),
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
}

PAGE = """\
---
{front}---

# {title}

Trained{teachers} with `{command}`.
Load it with `{auto_class}.from_pretrained(folder{trust})`{needs}.

{chat}```text
{results}
```

{adapter}The weights derive from the models and the data named above; their licences say what may be
done with this model.
"""

CHAT = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", model=folder{trust})
messages = [{{"role": "user", "content": "What is a distilled model?"}}]
print(chat(messages, max_new_tokens=200)[0]["generated_text"][-1]["content"])
```

"""

ADAPTER = """\
The trained adapters are merged into these weights; `adapter` holds them alone, for
`PeftModel.from_pretrained(base, folder + "/adapter")`.

"""


def model_card(config: RunConfig, stage: Path, report: Report, command: str) -> str:
    """Return README.md of the model of a stage: metadata, `command`, result table and remarks."""
    task, trust = config.task.type, ", trust_remote_code=True" * brings_code(stage)
    auto_class, pipeline = AUTO_CLASSES[task]
    teachers: dict[str, Any] = {name: spec.model for name, spec in config.teacher_specs.items()}
    teachers |= dict.fromkeys(config.base_teachers, config.student.model)
    start = {**teachers, STUDENT: config.student.model}[config.start_role]
    # Hub ids and folders; models from scratch have none.
    specs = [model for model in (start, *teachers.values()) if isinstance(model, str)]
    cards = [_metadata(spec) for spec in specs]
    # A folder is not a base model that users of the card could look up, but its own base is.
    bases = (hub_id(s) or card.get("base_model") for s, card in zip(specs, cards, strict=True))
    licences = {str(card.get("license") or "unknown") for card in cards}
    named = [
        f"`{hub_id(model) or Path(model).name}`" if isinstance(model, str) else "a random teacher"
        for model in teachers.values()
    ]
    chats = task == "causal_lm" and (stage / CHAT_TEMPLATE_FILE).is_file()
    front = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "base_model": next(filter(None, bases), None),
        # Of several licences, none is known to cover what was made from all models.
        "license": licences.pop() if len(licences) == 1 else "unknown",
        "metrics": report["metrics"],
        "tags": ["megakd", "knowledge-distillation", report["method"]],
    }
    front = {key: value for key, value in front.items() if value}
    return PAGE.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=f"{config.output_dir.absolute().name}: a student distilled by megakd",
        teachers=f" by distilling {' and '.join(named)}" * (f"{TEACHER}.parameters" in report),
        command=command,
        results=result_table(report),
        auto_class=auto_class,
        trust=trust,
        chat=CHAT.format(trust=trust) * chats,
        needs=", which needs transformers >= 5.0" * needs_5(stage),
        adapter=ADAPTER * (f"{STUDENT}.trained_parameters" in report),
    )


def _metadata(spec: str) -> Mapping[str, Any]:
    cached = try_to_load_from_cache(spec, CARD) if hub_id(spec) else expand_path(spec) / CARD
    try:
        return metadata_load(cached) or {} if isinstance(cached, str | Path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
