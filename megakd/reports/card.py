"""The model card, the README.md of `final/`: front matter for the Hub and the result table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from megakd.contract.results import Report
from megakd.contract.tasks import STUDENT, TEACHER, TaskType
from megakd.models.model_folder import hub_id
from megakd.process.folders import CARD
from megakd.process.terminal import in_home
from megakd.reports.table import result_table

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


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Content of a model card in addition to the numbers of the report.

    student: Hub id or folder that the student started from; None for random weights.
    teachers: Hub ids or folders of the teachers; None for random weights.
    brings_code: whether the model's class is stored with the weights, see `brings_code`.
    needs_5: whether transformers 4 cannot read the model.
    chats: whether the tokenizer has a chat template.
    """

    title: str
    task_type: TaskType
    student: str | None
    teachers: tuple[str | None, ...]
    command: str
    brings_code: bool = False
    needs_5: bool = False
    chats: bool = False


def model_card(facts: CardFacts, report: Report) -> str:
    """Return the content of README.md: metadata, command, result table and remarks."""
    auto_class, pipeline = AUTO_CLASSES[facts.task_type]
    specs = [spec for spec in (facts.student, *facts.teachers) if spec]
    cards = [_metadata(spec) for spec in specs]
    # A folder is not a base model that users of the card could look up, but its own base is.
    bases = (hub_id(s) or card.get("base_model") for s, card in zip(specs, cards, strict=True))
    licences = {str(card.get("license") or "unknown") for card in cards}
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
    named = [f"`{hub_id(s) or Path(s).name}`" if s else "a random teacher" for s in facts.teachers]
    trust = ", trust_remote_code=True" * facts.brings_code
    return PAGE.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=facts.title,
        teachers=f" by distilling {' and '.join(named)}" * (f"{TEACHER}.parameters" in report),
        command=facts.command,
        results=result_table(report),
        auto_class=auto_class,
        trust=trust,
        chat=CHAT.format(trust=trust) * (facts.chats and facts.task_type == "causal_lm"),
        needs=", which needs transformers >= 5.0" * facts.needs_5,
        adapter=ADAPTER * (f"{STUDENT}.trained_parameters" in report),
    )


def _metadata(spec: str) -> Mapping[str, Any]:
    cached = try_to_load_from_cache(spec, CARD) if hub_id(spec) else in_home(spec) / CARD
    try:
        return metadata_load(cached) or {} if isinstance(cached, str | Path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
