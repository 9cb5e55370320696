"""The model card: the result table, metadata for the Hub, usage and licence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import entries, report_of
from tiny_runs import bert, config_tree, llama

from megakd.config.file import config_of
from megakd.models.architectures import OWN_MODELS
from megakd.reports.table import model_card, result_table
from megakd.training.record import Report

OWN, SINGLE = next(iter(OWN_MODELS)), {"name": "single"}


@pytest.fixture
def card_of(tmp_path):
    """The card of a student: `card_of(report, student=…, teacher=…, chats=…)`."""
    stage = tmp_path / "stage"
    stage.mkdir()

    def of(
        report: Report,
        *,
        student: Any = None,
        teacher: Any = None,
        chats: bool | None = None,
        model: str = "bert",
    ) -> str:
        (stage / "config.json").write_text(json.dumps({"model_type": model}))
        task: dict[str, Any] = {"type": "classification", "dataset": "glue/mrpc"}
        scratch = bert(1)
        if chats is not None:  # a decoder
            task, scratch = {"type": "causal_lm", "dataset": "a", "tokenizer": "gpt2"}, llama(1)
        if chats:
            (stage / "chat_template.jinja").touch()
        start, taught_by = {"model": student or scratch}, {"model": teacher or scratch}
        tree = config_tree(tmp_path / "out", task, student=start, teacher=taught_by, method=SINGLE)
        config = config_of(tree)
        return model_card(config, stage, report, "megakd train run.yaml")

    return of


def front_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_is_the_table_with_how_the_model_was_made_and_is_used(card_of):
    teacher, report = "textattack/bert-base-uncased-SST-2", report_of()

    card = card_of(report, teacher=teacher, model=OWN)

    assert front_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["megakd", "knowledge-distillation", "single"],
        "base_model": teacher,
        "license": "unknown",
        "metrics": ["accuracy", "f1", "mean_accuracy_f1"],
    }
    for text in (
        f"```text\n{result_table(report)}\n```",
        f"Trained by distilling `{teacher}` with `megakd train run.yaml`.",
        "AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`",
        ", which needs transformers >= 5.0.",
    ):
        assert text in card
    assert "from_pretrained(folder)`." in card_of(report)
    assert "\n\n\n" not in card


def test_a_model_with_a_chat_template_has_an_example_of_a_chat(card_of):
    assert "pipeline(" not in card_of(report_of(), chats=False)

    card = card_of(report_of(), model=OWN, chats=True)

    assert 'pipeline("text-generation", model=folder, trust_remote_code=True)' in card
    assert "\n\n\n" not in card


def test_a_graph_is_a_row_of_the_results(card_of):
    graph = {"parameters": 2_090_000, "bytes": 2_190_000, "accuracy": 0.74}
    models = ["teacher", "student", "student_onnx", "alone"]

    card = card_of(report_of(models=models, **entries("student_onnx", graph)))

    assert re.search(r"^student_onnx .* 2\.2 .* 74\.0%", card, re.MULTILINE)


def test_a_card_names_no_folder_of_a_machine(card_of):
    card = card_of(report_of(), student="/somewhere/base", teacher="/apart/my-teacher")

    assert "base_model" not in front_of(card)
    assert "/somewhere" not in card
    assert "/apart" not in card
    assert "distilling `my-teacher`" in card


def model_with_card(folder: Path, **metadata: str) -> str:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n# A model\n")
    return str(folder)


def test_a_card_has_the_base_and_the_licence_of_the_models(card_of, tmp_path):
    shared = {"license": "apache-2.0", "base_model": "org/base"}
    start, teacher = (model_with_card(tmp_path / name, **shared) for name in ("start", "teacher"))

    card = card_of(report_of(), student=start, teacher=teacher)

    assert (front_of(card)["base_model"], front_of(card)["license"]) == ("org/base", "apache-2.0")
    assert str(tmp_path) not in card


@pytest.mark.parametrize("card", ["---\nlicense: {\n---\n", "---\nlicense: llama3\n---\n"])
def test_a_licence_that_not_all_models_share_is_not_claimed(card_of, tmp_path, card):
    start, teacher = (model_with_card(tmp_path / name, license="mit") for name in ("a", "b"))
    (tmp_path / "b" / "README.md").write_text(card)

    front = front_of(card_of(report_of(), student=start, teacher=teacher))

    assert front["license"] == "unknown"
    assert "base_model" not in front
