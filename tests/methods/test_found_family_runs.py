"""Methods that cut models run on families that are found by structure."""

from __future__ import annotations

import pytest
from tiny_runs import run_in, write_text
from transformers import AutoModelForCausalLM
from whole_run import finish, read, weights

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


KEYS = {name: {"num_key_value_heads": 2} for name in ("smollm3", "olmo2")}


def run_of(one_rank, folder, model_type, **method):
    """Run a method with a teacher from scratch, and return the folder of the run."""
    text = write_text(folder / "text.txt")
    run = run_in(
        folder,
        {
            "type": "causal_lm",
            "dataset": str(text),
            "tokenizer": {"type": "bpe", "vocab_size": 320},
        },
        student={"model": "from_teacher"},
        teacher={
            "model": {"config": {"model_type": model_type, **SIZES, **KEYS.get(model_type, {})}},
            "finetune": {"max_steps": 4},
        },
        method=method,
    )
    finish(one_rank, run)
    return folder / "out"


@pytest.mark.parametrize(("model_type", "heads", "neurons"), [("smollm3", 2, 32), ("olmo2", 4, 32)])
def test_minidisc_cuts_what_a_family_can_lose(one_rank, tmp_path, model_type, heads, neurons):
    out = run_of(
        one_rank,
        tmp_path,
        model_type,
        name="minidisc",
        metric="accuracy",
        sparsities=[0.25, 0.5],
        target_sparsity=0.5,
        allocation="uniform",
        round_to=1,
    )

    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert model.config.model_type == model_type
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (heads, neurons)
    assert (
        sum(p.numel() for p in weights(out / "final").values()) == read(out)["student.parameters"]
    )


def test_minidisc_cuts_layers_to_different_sizes_where_no_config_states_them(one_rank, tmp_path):
    out = run_of(
        one_rank,
        tmp_path,
        "gpt_neox",
        name="minidisc",
        metric="accuracy",
        sparsities=[0.25, 0.5],
        target_sparsity=0.5,
        round_to=1,
    )

    model = AutoModelForCausalLM.from_pretrained(out / "final", trust_remote_code=True)
    maps = [layer.attention.dense.in_features for layer in model.gpt_neox.layers]
    assert sum(maps) == 32, "half of the heads of both layers"
    assert sum(layer.mlp.dense_4h_to_h.in_features for layer in model.gpt_neox.layers) == 64
    assert model.num_parameters() == read(out)["student.parameters"]
