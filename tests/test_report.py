"""The report, its table, and the counts and versions in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from megakd.report import (
    Report,
    environment,
    named_shapes,
    parameter_counts,
    peak_memory_bytes,
    result_table,
    write_report,
)


def report_of(**changes) -> Report:
    report: Report = {
        "method": "single",
        "task": "glue/mrpc",
        "metric_name": "mean_accuracy_f1",
        "evaluated_on": "validation",
        "teacher": {
            "parameters": 22_713_984,
            "encoder_parameters": 10_645_632,
            "metrics": {"accuracy": 0.8, "f1": 0.9, "mean_accuracy_f1": 0.85},
            "bytes": 90_855_936,
        },
        "student": {
            "parameters": 2_090_000,
            "encoder_parameters": 99_968,
            "metrics": {"accuracy": 0.75, "f1": 0.85, "mean_accuracy_f1": 0.8},
            "bytes": 8_360_000,
        },
        "baselines": {"alone": {"accuracy": 0.7, "f1": 0.8, "mean_accuracy_f1": 0.75}},
        "candidates": [],
        "stages": [
            {
                "name": "teacher",
                "steps": 200,
                "seconds": 78.4,
                "tokens_per_second": 1960.2,
                "peak_memory_bytes": 1_500_000_000,
                "metrics": {"accuracy": 0.8},
            },
            {
                "name": "student",
                "steps": 1200,
                "seconds": 3725.0,
                "tokens_per_second": 12_345.0,
                "peak_memory_bytes": 900_000_000,
                "metrics": {"accuracy": 0.75},
            },
        ],
        "speedup": {"batch": 32, "teacher_ms": 50.0, "student_ms": 5.0},
        "environment": {},
    }
    report.update(changes)
    return report


def cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(row))
    return re.split(r"\s{2,}", line.strip())


def test_the_table_has_sizes_scores_and_speed_of_each_model() -> None:
    table = result_table(report_of())

    assert cells(table, "teacher") == [
        *("teacher", "22.71M", "10.65M", "90.9", "80.0%", "90.0%", "85.0%"),
        *("100.0%", "50.00", "1.00x"),
    ]
    assert cells(table, "student") == [
        *("student", "2.09M", "99.97k", "8.4", "75.0%", "85.0%", "80.0%"),
        *("94.1%", "5.00", "10.00x"),
    ]
    assert cells(table, "alone") == [
        *("alone", "2.09M", "99.97k", "8.4", "70.0%", "80.0%", "75.0%"),
        *("88.2%", "-", "-"),
    ]


def test_the_table_is_aligned() -> None:
    lines = result_table(report_of()).splitlines()

    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[2].split()[:2] == ["parameters", "encoder"]
    assert "ms (batch 32)" in lines[2]


def test_the_table_says_what_was_scored_and_what_it_cost() -> None:
    table = result_table(report_of(), final=Path("runs/quickstart/final"))

    assert table.startswith("single on glue/mrpc, scored on validation")
    assert "1m 18s" in table
    assert "1h 02m" in table
    assert "12,345" in table
    assert "training 1h 03m, peak memory 1.50 GB per rank" in table
    assert "the student is in runs/quickstart/final" in table


def test_a_perplexity_is_no_percentage_and_kept_in_inverse_proportion() -> None:
    report = report_of(metric_name="perplexity", baselines={}, speedup=None)
    report["teacher"] = {"parameters": 2, "encoder_parameters": 1, "metrics": {"perplexity": 8.0}}
    report["student"]["metrics"] = {"perplexity": 10.0}

    table = result_table(report)

    assert cells(table, "student") == [
        *("student", "2.09M", "99.97k", "8.4", "10.000", "80.0%", "-", "-"),
    ]
    assert cells(table, "teacher")[3:6] == ["-", "8.000", "100.0%"]


def test_a_run_without_teacher_or_stages_has_a_table() -> None:
    table = result_table(report_of(teacher=None, speedup=None, stages=[], baselines={}))

    assert cells(table, "student")[-3:] == ["-", "-", "-"]
    assert "teacher" not in table


def test_a_score_that_is_null_in_the_file_is_a_dash() -> None:
    report = report_of()
    report["student"]["metrics"] = {"perplexity": None}  # type: ignore[dict-item]

    assert "-" in cells(result_table(report), "student")


def test_the_report_file_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", report_of())

    tree = json.loads((tmp_path / "report.json").read_text())

    assert list(tree) == [
        *("method", "task", "metric_name", "evaluated_on", "teacher", "student", "baselines"),
        *("candidates", "stages", "speedup", "environment"),
    ]
    assert tree == report_of()


BERT = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}
# Per layer: 4 attention maps of 8·8+8, two norms of 16, 8·16+16 and 16·8+8 of the feed-forward.
BERT_LAYERS = 2 * (4 * 72 + 2 * 16 + 144 + 136)
DISTILBERT = DistilBertConfig(
    vocab_size=50, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=16
)
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
# Per layer: 4 maps of 8·8, 3 of 8·16, two norms of 8; and the last norm.
LLAMA_LAYERS = 2 * (4 * 64 + 3 * 128 + 16) + 8


@pytest.mark.parametrize(
    ("model", "inside"),
    [
        (BertForSequenceClassification(BertConfig(**BERT)), BERT_LAYERS),
        (RobertaForSequenceClassification(RobertaConfig(**BERT)), BERT_LAYERS),
        (DistilBertForSequenceClassification(DISTILBERT), BERT_LAYERS),
        (LlamaForCausalLM(LlamaConfig(**LLAMA)), LLAMA_LAYERS),
        (LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), LLAMA_LAYERS),
    ],
    ids=["bert", "roberta", "distilbert", "llama", "tied llama"],
)
def test_encoder_parameters_leave_out_embeddings_pooler_and_head(
    model: PreTrainedModel, inside: int
) -> None:
    counts = parameter_counts(named_shapes(model))

    assert counts == (model.num_parameters(), inside)


def test_a_sharded_parameter_counts_in_full() -> None:
    model = torch.nn.Linear(4, 3)
    model.weight.ds_shape = torch.Size((4, 3))  # type: ignore[attr-defined]
    model.weight.data = torch.empty(0)

    assert parameter_counts(named_shapes(model)).parameters == 15


def test_the_environment_names_versions_ranks_and_data() -> None:
    found = environment(ranks=2, device=torch.device("cpu"), corpus_content_hash="abc")

    assert found["versions"]["torch"] == torch.__version__
    assert (found["ranks"], found["device"]) == (2, "cpu")
    assert found["corpus_content_hash"] == "abc"
    json.dumps(found)


def test_peak_memory_of_this_process_is_plausible() -> None:
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 1e12
