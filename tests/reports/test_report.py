"""report.json, and the counts and versions in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reports import report_of
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

from megakd.engine.memory import peak_memory_bytes
from megakd.models.counting import named_shapes, parameter_counts
from megakd.reports.report import environment, write_report


def test_the_report_file_has_exactly_the_documented_keys(tmp_path: Path) -> None:
    write_report(tmp_path / "report.json", report_of())

    tree = json.loads((tmp_path / "report.json").read_text())

    assert list(tree) == [
        *("method", "task", "metric_name", "evaluated_on", "teacher", "assistants"),
        *("student", "baselines", "candidates", "stages", "speedup", "latency", "cost"),
        *("samples", "evaluation_sets", "seconds", "environment"),
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

    # Only some builds have their tag in both versions.
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (found["ranks"], found["device"]) == (2, "cpu")
    assert found["corpus_content_hash"] == "abc"
    json.dumps(found)


def test_peak_memory_of_this_process_is_plausible() -> None:
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 1e12
