"""The model card's words on the size of the student and on its graph."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import FACTS, report_of

from megakd.reports.card import model_card

GRAPH: Any = {"bytes": 2_190_000, "metrics": {"accuracy": 0.74, "mean_accuracy_f1": 0.79}}


def report_with(**of_student: Any) -> Any:
    report = report_of()
    return {**report, "student": {**report["student"], **of_student}}


def test_a_student_is_compared_with_the_largest_teacher_that_is_larger() -> None:
    report = report_of()
    teacher = report["teacher"]
    assert teacher is not None
    pool = [{"name": name, **teacher} for name in ("small", "large")]
    alone = model_card(dataclasses.replace(FACTS, teachers=()), report_of(teacher=None))
    alike = model_card(FACTS, report_of(teacher=report["student"]))

    line = "The student has 2.09M parameters in 8.4 MB of weights"
    one = f"\n\n{line}; it is 10.9x smaller than its teacher.\n\n"
    assert one in model_card(FACTS, report_of())
    assert "smaller than its largest teacher." in model_card(FACTS, report_of(teachers=pool))
    for card in (alone, alike):
        assert f"\n\n{line}.\n\n" in card


def test_a_graph_is_in_the_size_and_the_results() -> None:
    card = model_card(FACTS, report_with(onnx=GRAPH))

    assert "in 8.4 MB of weights (2.2 MB as onnx); it is 10.9x smaller" in card
    assert re.search(r"^student \(onnx\) .* 74\.0%", card, re.MULTILINE)
    assert "\n\n\n" not in card
    assert "onnx" not in model_card(FACTS, report_of())


def test_the_card_of_adapters_says_how_many_weights_were_trained_and_how_to_load_both() -> None:
    card = model_card(
        dataclasses.replace(FACTS, student="org/base"), report_with(trained_parameters=40_000)
    )

    assert "2.09M parameters (40.00k of them trained, as adapters) in 8.4 MB of weights;" in card
    assert 'base = AutoModelForSequenceClassification.from_pretrained("org/base")' in card
    assert 'PeftModel.from_pretrained(base, "path/to/this/folder/adapter")' in card
    assert "student: 40.00k parameters trained, as adapters (LoRA) of a model of 2.09M" in card
    assert "\n\n\n" not in card


def test_the_card_says_how_the_model_was_made() -> None:
    teacher, objective = "textattack/bert-base-uncased-SST-2", ("soft_target_kl, weight 1.0",)
    facts = dataclasses.replace(FACTS, teachers=(teacher,), objective=objective, brings_code=True)
    facts = dataclasses.replace(facts, needs_5=True)

    card = model_card(facts, report_of(environment={"versions": {"torch": "2.13.0"}}))

    assert front_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["megakd", "knowledge-distillation", "single"],
        "base_model": teacher,
        "license": "unknown",
        "metrics": ["accuracy", "f1", "mean_accuracy_f1"],
    }
    for text in (
        "method `single` on `glue/mrpc` by distilling `textattack/",
        "starting from random weights",
        "85.0%",
        "soft_target_kl, weight 1.0",
        "```\n\nThe model needs transformers >= 5.0; earlier versions cannot read it.\n\n## How",
        "megakd train run.yaml",
        "torch 2.13.0",
        "No licence is claimed",
        "AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)",
    ):
        assert text in card
    assert "from_pretrained(folder)" in model_card(FACTS, report_of())


def test_a_card_names_no_folder_of_a_machine() -> None:
    facts = dataclasses.replace(FACTS, student="/somewhere/base", teachers=("/apart/my-teacher",))

    card = model_card(facts, report_with(trained_parameters=40_000))

    assert "base_model" not in front_of(card)
    assert "/somewhere" not in card
    assert "/apart" not in card
    assert "distilling `my-teacher`" in card
    assert 'from_pretrained("path/to/the/base/model")' in card


def front_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def model_with_card(folder: Path, **metadata: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")
    return str(folder)


def test_a_card_has_the_base_the_licence_and_the_metrics_of_the_student(tmp_path: Path) -> None:
    given = {"license": "apache-2.0", "base_model": "org/base"}
    start, teacher = (model_with_card(tmp_path / name, **given) for name in ("start", "teacher"))
    facts = dataclasses.replace(FACTS, student=start, teachers=(teacher,))

    card = model_card(facts, report_of())

    front = front_of(card)
    assert (front["base_model"], front["license"]) == ("org/base", "apache-2.0")
    assert front["metrics"] == ["accuracy", "f1", "mean_accuracy_f1"]
    assert "The models above are under the licence `apache-2.0`." in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("other", ["{", "llama3"], ids=["no card", "another licence"])
def test_a_licence_that_not_all_models_share_is_not_claimed(tmp_path: Path, other: str) -> None:
    models = [model_with_card(tmp_path / str(n), license=x) for n, x in enumerate(("mit", other))]
    if other == "{":
        (tmp_path / "1" / "README.md").write_text("---\nlicense: {\n---\n")
    facts = dataclasses.replace(FACTS, student=models[0], teachers=(models[1],))

    card = model_card(facts, report_of())

    assert front_of(card)["license"] == "unknown"
    assert "base_model" not in front_of(card)
    assert "No licence is claimed here." in card
