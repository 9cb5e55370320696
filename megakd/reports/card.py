"""The model card: the README.md of `final/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from megakd.contract.results import Report
from megakd.contract.tasks import TaskType
from megakd.models.model_folder import hub_id
from megakd.process.terminal import in_home
from megakd.reports.html import TEMPLATES
from megakd.reports.quantities import short_count
from megakd.reports.report_file import completed
from megakd.reports.table import megabytes, result_table, times_smaller
from megakd.storage.folders import CARD

AUTO_CLASSES: Mapping[TaskType, tuple[str, str]] = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "regression": ("AutoModelForSequenceClassification", "text-classification"),
    "mlm": ("AutoModelForMaskedLM", "fill-mask"),
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
}
UNKNOWN = "unknown"
"""The Hub's name for a licence that is not known."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Content of a model card in addition to the numbers of the report.

    student: Hub id or folder that the student started from; None for random weights.
    teachers: Hub ids or folders of the teachers; None for random weights.
    objective: one readable line per loss term.
    brings_code: whether the model's class is stored with the weights, see `brings_code`.
    needs_5: whether transformers 4 cannot read the model.
    """

    title: str
    task_type: TaskType
    student: str | None
    teachers: tuple[str | None, ...]
    objective: tuple[str, ...]
    command: str
    brings_code: bool = False
    needs_5: bool = False


def model_card(facts: CardFacts, report: Report) -> str:
    """Return the content of README.md: description of the model, command, scores and usage."""
    report = completed(report)
    auto_class, pipeline = AUTO_CLASSES[facts.task_type]
    specs = [spec for spec in (facts.student, *facts.teachers) if spec]
    cards = [_metadata(spec) for spec in specs]
    # A folder is not a base model that users of the card could look up, but its own base is.
    bases = (hub_id(s) or card.get("base_model") for s, card in zip(specs, cards, strict=True))
    licences = {str(card.get("license") or UNKNOWN) for card in cards}
    front = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "base_model": next(filter(None, bases), None),
        # Of several licences, none is known to cover what was made from all models.
        "license": licences.pop() if len(licences) == 1 else UNKNOWN,
        "metrics": list(report["student"]["metrics"]),
        "tags": ["megakd", "knowledge-distillation", report["method"]],
    }
    front = {key: value for key, value in front.items() if value}
    return TEMPLATES.get_template("card.md.jinja").render(
        facts=facts,
        report=report,
        results=result_table(report),
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        start=_shown(facts.student) or "random weights",
        teachers=[_shown(spec) or "a teacher from random weights" for spec in facts.teachers],
        auto_class=auto_class,
        base=hub_id(facts.student or ""),
        pruned=_pruned(report),
        size=_size(report),
        licence=front["license"],
    )


def _metadata(spec: str) -> Mapping[str, Any]:
    cached = try_to_load_from_cache(spec, CARD) if hub_id(spec) else in_home(spec) / CARD
    try:
        return metadata_load(cached) or {} if isinstance(cached, str | Path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _pruned(report: Report) -> str:
    if not report["pruning"]:
        return ""
    whole = report["teacher"] or report["pruning"][0]
    first, last = (short_count(size["parameters"]) for size in (whole, report["student"]))
    sizes = f"from {first} to {last} parameters"
    return f"The student was pruned from its teacher during distillation, {sizes}."


def _size(report: Report) -> str:
    student = report["student"]
    sentence = f"The student has {short_count(student['parameters'])} parameters"
    if "trained_parameters" in student:
        sentence += f" ({short_count(student['trained_parameters'])} of them trained, as adapters)"
    if (weights := student.get("bytes")) is not None:
        sentence += f" in {megabytes(weights)} MB of weights"
    if "onnx" in student:
        sentence += f" ({megabytes(student['onnx']['bytes'])} MB as onnx)"
    times = times_smaller(report, student)
    if times not in ("-", "1.0x"):
        teacher = "largest teacher" if len(report["teachers"]) > 1 else "teacher"
        sentence += f"; it is {times} smaller than its {teacher}"
    return f"{sentence}."


def _shown(spec: str | None) -> str:
    return f"`{hub_id(spec) or Path(spec).name}`" if spec else ""
