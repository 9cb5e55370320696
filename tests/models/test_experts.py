"""Experts: one tensor of many stored ones, and one expert in the place of all in a memory plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megakd.errors import ModelError
from megakd.models.fitting import valueless_model, with_joint_experts
from megakd.models.weights import StoredExperts, StoredTensor, WeightReader
from megakd.planning.phase_traces import send_tokens_to_one_expert

PATH = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tiny) -> Path:
    return tiny.save("qwen3_moe")


@pytest.mark.parametrize("missing", ["1.up_proj", "0.down_proj", "2.gate_proj"])
def test_an_expert_that_lacks_a_part_is_a_missing_weight(tiny, folder, missing):
    tiny.rewrite(lambda t: {name: t[name] for name in t if name != f"{PATH}.{missing}.weight"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of a qwen3_moe model \(model.layers.0"):
        tiny.load(folder, tiny.task("causal_lm"))


def test_fewer_experts_than_the_config_says_are_an_error_with_both_numbers(tiny, folder):
    tiny.rewrite(lambda t: {name: t[name] for name in t if f"{PATH}.3." not in name})

    with pytest.raises(ModelError, match=r"of shape \[3, .*config.json requires \[4, "):
        tiny.load(folder, tiny.task("causal_lm"))


def test_experts_are_read_from_several_files(tmp_path):
    matrices, parts = torch.arange(12.0).reshape(2, 2, 3), []
    for number, matrix in enumerate(matrices):
        file = tmp_path / f"{number}.safetensors"
        save_file({"w": matrix}, file)
        facts = {"dtype": torch.float32, "offset": file.stat().st_size - 24}
        parts.append(StoredTensor(file=file, key="w", shape=(2, 3), **facts))
    stored = {f"{PATH}.{n}.down_proj.weight": part for n, part in enumerate(parts)}

    joint = with_joint_experts(stored, {f"{PATH}.down_proj"})[f"{PATH}.down_proj"]

    assert isinstance(joint, StoredExperts)
    assert torch.equal(WeightReader("teacher.model").read(joint), matrices)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_one_expert_computes_what_equal_experts_do(tiny, family):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.copy_(weight[:1].expand_as(weight))
        expected = model(tiny.input_ids).logits

        send_tokens_to_one_expert(model)

        torch.testing.assert_close(model(tiny.input_ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_mixture_runs_without_values(tiny, family, dtype):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.scratch(family), task)
    model = valueless_model(source, task, source.config).to(dtype)
    send_tokens_to_one_expert(model)
    assert model(tiny.input_ids.to("meta")).logits.shape == (2, 12, 300)
