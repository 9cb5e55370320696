"""The model card: the README.md of `final/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megakd.contract.results import Report
from megakd.contract.tasks import TaskType
from megakd.models.export import hub_id
from megakd.reports.table import result_table

AUTO_CLASSES: Mapping[TaskType, tuple[str, str]] = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "regression": ("AutoModelForSequenceClassification", "text-classification"),
    "mlm": ("AutoModelForMaskedLM", "fill-mask"),
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Content of a model card in addition to the numbers of the report.

    student: Hub id or folder that the student started from; None for random weights.
    teachers: Hub ids or folders of the teachers; None for random weights.
    objective: one readable line per loss term.
    command: the command that trained the model.
    brings_code: whether the model's class is stored with the weights, see `brings_code`.
    """

    title: str
    task_type: TaskType
    student: str | None
    teachers: tuple[str | None, ...]
    objective: tuple[str, ...]
    command: str
    brings_code: bool = False


def model_card(facts: CardFacts, report: Report) -> str:
    """Return the content of README.md: description of the model, command, scores and usage."""
    auto_class, _ = AUTO_CLASSES[facts.task_type]
    front = yaml.safe_dump(_front_matter(facts, report), sort_keys=False, allow_unicode=True)
    versions = report["environment"].get("versions", {})
    sections = [
        f"---\n{front}---\n",
        f"# {facts.title}\n",
        f"{_origin(facts, report)}\n",
        _bullets("Losses", facts.objective),
        f"## Results\n\n```text\n{result_table(report)}\n```\n",
        f"## Use\n\n```python\n{_usage(auto_class, brings_code=facts.brings_code)}\n```\n",
        f"## How it was made\n\n```\n{facts.command}\n```\n",
        _bullets("Versions", [f"{name} {version}" for name, version in versions.items()]),
        "## Licence\n\nNo licence is claimed here. The weights derive from the models and the "
        "data named above;\ntheir licences say what may be done with this model.\n",
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(facts: CardFacts, report: Report) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "transformers"}
    front["pipeline_tag"] = AUTO_CLASSES[facts.task_type][1]
    front["tags"] = ["megakd", "knowledge-distillation", report["method"]]
    specs = (facts.student, *facts.teachers)
    # A local folder is not a base model that users of the card could look up.
    base = next((name for spec in specs if spec and (name := hub_id(spec))), None)
    return front if base is None else {**front, "base_model": base}


def _origin(facts: CardFacts, report: Report) -> str:
    start = f"`{_shown(facts.student)}`" if facts.student else "random weights"
    shown = [f"`{_shown(t)}`" if t else "a teacher from random weights" for t in facts.teachers]
    taught = f" by distilling {' and '.join(shown)}" if report["teacher"] is not None else ""
    return (
        f"Trained by megakd with the method `{report['method']}` on `{report['task']}`{taught}, "
        f"starting from {start}."
    )


def _shown(spec: str) -> str:
    return hub_id(spec) or Path(spec).name


def _usage(auto_class: str, *, brings_code: bool) -> str:
    trust = ", trust_remote_code=True" if brings_code else ""
    return (
        f"from transformers import {auto_class}, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        f"model = {auto_class}.from_pretrained(folder{trust})"
    )


def _bullets(title: str, lines: Iterable[str]) -> str:
    items = "".join(f"- {line}\n" for line in lines)
    return f"## {title}\n\n{items}" if items else ""
