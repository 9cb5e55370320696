"""Mixtures without values, as memory plans run them."""

from __future__ import annotations

import pytest
import torch

from megakd.models.fitting import send_tokens_to_one_expert, valueless_model

FAMILIES = ("gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
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
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_runs_without_values(tiny, family, dtype):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.scratch(family), task)
    model = valueless_model(source, task, source.config).to(dtype)
    send_tokens_to_one_expert(model)
    assert model(tiny.input_ids.to("meta")).logits.shape == (2, 12, 300)
