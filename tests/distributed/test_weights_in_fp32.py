"""A frozen teacher computes as transformers does where its family keeps weights in fp32."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from equal_runs import ZERO3
from slow_cases import slow
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.config.task import TaskConfig
from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import destroy
from megakd.engine.sharding import gathered_state
from megakd.models.loading import load_model, resolve_model

LABELS = torch.arange(3, 23)[None]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
ROUTED = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
FAMILIES = {
    "deepseek_v3": {  # a buffer
        **ROUTED,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
    },
    "ernie4_5_moe": {  # parameters of every dtype of 16 bits
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
        "moe_layer_interval": 1,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},  # of fp16 alone
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def losses(folder: str, dtype: str, stage: int) -> tuple[float, float, list[str]]:
    """The loss of an engine's model, that of transformers, and the weights with other dtypes."""
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    task = TaskConfig(type="causal_lm", dataset="d", max_length=32)
    source, ds = resolve_model(folder, task, where="teacher.model"), ZERO3 if stage == 3 else {}
    facts = {"label_names": (), "tokenizer_size": 64, "seed": 0, "need_head": True}
    model = load_model(source, task=task, ds=ds, dtype=DTYPES[dtype], **facts)
    with patch.object(get_accelerator(), "is_fp16_supported", return_value=True):  # on a CPU too
        engine = frozen_engine(model, ds=ds, dtype=dtype, rows=1)
    with torch.no_grad():
        got, wanted = (
            one(input_ids=LABELS, labels=LABELS, use_cache=False).loss.item()
            for one in (engine, exact)
        )
    state, plain = dict(gathered_state(engine.module)), exact.state_dict()
    destroy(engine)
    return got, wanted, [n for n, t in state.items() if t.dtype != plain[n].dtype]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp32")
    for family, keys in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **keys))
        for name, tensor in model.state_dict().items():
            if "inv_freq" not in name:
                tensor.normal_(0, 0.3)
        model.save_pretrained(folder / family)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("ranks", "stage", "dtype"),
    [(1, 0, "bf16"), (2, 3, "fp16"), *slow((2, 3, "bf16"), (1, 3, "bf16"), (1, 0, "fp16"))],
)
def test_a_teacher_in_16_bits_keeps_in_fp32_what_transformers_keeps(
    workers, folders, ranks, stage, dtype, family
):
    case = "test_weights_in_fp32.losses", str(folders / family), dtype, stage
    results = workers(ranks).run(*case)

    for got, wanted, _ in results:
        assert got == pytest.approx(wanted, rel=1e-6)
    assert results[0][2] == []
