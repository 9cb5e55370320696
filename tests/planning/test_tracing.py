"""A traced step holds what a real one holds, though nothing is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from megakd.planning.tracing import VALUELESS, inventory, repeat_alike, trace_call

ROWS, LENGTH = 2, 16
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Summed(nn.Module):
    """A model whose forward ends in a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        self.total = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()
        return self


def llama() -> Summed:
    return Summed(LlamaForCausalLM(LlamaConfig(**LLAMA, use_cache=False))).train()


def bert(dropout: float) -> Summed:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return Summed(BertForSequenceClassification(BertConfig(**sizes, **heads, **drop))).train()


def saved_bytes(module: nn.Module) -> int:
    """What autograd of a real forward keeps for the backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(ids)
    return sum(kept.values())


@pytest.mark.parametrize("make", [llama, lambda: bert(0.0), lambda: bert(0.1)])
def test_a_trace_holds_what_autograd_saves(make: Any) -> None:
    real = saved_bytes(make())
    with VALUELESS:
        module, ids = make(), torch.ones(ROWS, LENGTH, dtype=torch.long)

    traced = trace_call(module, lambda: module(ids), backward=True, device="cpu").trace

    # The ids are the caller's; beside what is saved there are masks and the outputs themselves.
    assert real - ids.nbytes <= traced.held.total <= 1.1 * real + 8192


def test_every_gradient_is_finished_once_and_activations_are_freed() -> None:
    with VALUELESS:
        module, ids = llama(), torch.ones(ROWS, LENGTH, dtype=torch.long)

    traced = trace_call(module, lambda: module(ids), backward=True, device="cpu").trace

    finished = [number for moment in traced.moments for number in moment.finished]
    assert sorted(finished) == list(range(len(inventory(module).parameters)))
    assert traced.moments[-1].live.total < traced.held.total / 2


def test_a_tied_weight_is_counted_once() -> None:
    with VALUELESS:
        tied = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))

    names = [parameter.name for parameter in inventory(tied).parameters]

    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_the_modules_come_in_the_order_of_forward_and_backward() -> None:
    with VALUELESS:
        module, ids = llama(), torch.ones(ROWS, LENGTH, dtype=torch.long)

    traced = trace_call(module, lambda: module(ids), backward=True, device="cpu").trace

    order = [m.module for m in traced.moments if m.own]
    forward, backward = order[: len(order) // 2], order[len(order) // 2 :]
    assert forward[0] == "model.model.embed_tokens"
    assert backward[-1] == "model.model.embed_tokens"
    assert set(forward) == set(backward)


def test_gradient_checkpointing_holds_less_and_repeats_forwards() -> None:
    held = {}
    for checkpoints in (False, True):
        with VALUELESS:
            module, ids = llama(), torch.ones(ROWS, LENGTH, dtype=torch.long)
        if checkpoints:
            module.model.activation_checkpointing_enable({"use_reentrant": False})
            repeat_alike(module, "cpu")
        run = trace_call(module, lambda m=module, i=ids: m(i), backward=True, device="cpu")
        repeated = [m for m in run.trace.moments[run.trace.turn :] if m.forward]
        held[checkpoints] = (run.trace.held.total, bool(repeated))

    assert held[True][0] < held[False][0] / 2
    assert (held[False][1], held[True][1]) == (False, True)


def test_matrix_products_are_counted() -> None:
    with VALUELESS:
        module = Linear()
        ids = torch.ones(4, 8)

    traced = trace_call(module, lambda: module(ids), backward=True, device="cpu").trace

    forward = 2 * 4 * 8 * 16
    assert traced.flops == 2 * forward  # and the weight's gradient; the inputs need none


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, inputs: Tensor) -> Any:
        self.total = self.linear(inputs).sum()
        return self
