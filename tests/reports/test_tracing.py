"""A traced step holds what a real one holds, though nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from megakd.models.fused_layers import fused_forwards
from megakd.models.packing import VARLEN, register_packed_attention
from megakd.reports.plan_tracing import (
    VALUELESS,
    Trace,
    _operations,
    loss_workspace,
    one_kernel,
    repeat_alike,
    trace_call,
)
from megakd.training.meter import work_of

ROWS, LENGTH = 2, 16
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
LLAMA = {**SIZES, "num_key_value_heads": 2, "use_cache": False}


class Summed(nn.Module):
    """A model whose forward ends in a number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        self.total = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()
        return self


def llama(**keys: Any) -> Summed:
    return Summed(LlamaForCausalLM(LlamaConfig(**LLAMA, **keys))).train()


def bert() -> Summed:
    return Summed(BertForSequenceClassification(BertConfig(**SIZES))).train()  # with dropout


def saved_bytes(module: nn.Module) -> int:
    """Return the tensors that autograd keeps for the backward, without parameters."""
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


def held(trace: Trace) -> int:
    """The activations between forward and backward."""
    return trace.points[1].live


def traced(make: Callable[[], nn.Module], length: int = LENGTH) -> tuple[nn.Module, Trace]:
    """A model without memory and its traced step."""
    with VALUELESS:
        module, ids = make(), torch.ones(ROWS, length, dtype=torch.long)
    return module, trace_call(module, lambda: module(ids), backward=True, device="cpu")[0]


@pytest.fixture(scope="module")
def traced_llama() -> tuple[nn.Module, Trace]:
    return traced(llama)


@pytest.mark.parametrize("make", [llama, bert])
def test_a_trace_holds_what_autograd_saves(make: Any):
    real = saved_bytes(make())

    _, trace = traced(make)

    # The ids are the caller's; beside what is saved there are masks and the outputs themselves.
    ids = ROWS * LENGTH * torch.long.itemsize
    assert real - ids <= held(trace) <= 1.1 * real + 8192


def test_every_gradient_is_finished_once_and_activations_are_freed(traced_llama):
    module, trace = traced_llama

    assert trace.points[-1].done == sum(p.numel() for p in module.parameters())
    assert trace.points[-1].live < held(trace) / 2


def test_a_tied_weight_is_counted_once():
    tied, apart = (
        sum(traced(partial(llama, tie_word_embeddings=is_tied))[1].sizes)
        for is_tied in (True, False)
    )
    assert apart - tied == 64 * 32


@pytest.mark.parametrize("attention", ["sdpa", "eager", VARLEN])
@pytest.mark.parametrize("length", [LENGTH, 32768])
def test_a_trace_counts_the_operations_of_the_log_with_those_of_attention(length, attention):
    register_packed_attention()

    module, trace = traced(partial(llama, attn_implementation=attention), length)

    weights, columns = work_of(module.model, learns=True)
    expected = ROWS * length * (2 * weights + 4 * columns * length)
    assert trace.flops == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("needed", "products"), [((True,) * 3, 3), ((False,) * 3, 1)])
def test_losses_on_cached_ids_count_the_products_of_the_head(needed, products):
    args = (*ON_CACHED_IDS[:11], needed)

    count = _operations(torch.ops.megakd.topk_kd.default, args, {}, None)

    assert count == products * 2 * 8192 * 128256 * 64


def repeating() -> nn.Module:
    module = llama()
    repeat_alike(module.model, "cpu")
    return module


def test_gradient_checkpointing_holds_less_and_repeats_forwards(traced_llama):
    (_, plain), (_, checkpointed) = traced_llama, traced(repeating)

    assert held(checkpointed) < held(plain) / 2
    assert 1.2 * plain.flops < checkpointed.flops < 1.4 * plain.flops


def fuse(model: nn.Module, *fuse: Callable[..., Any]) -> None:
    for part, forward in fused_forwards(model, *fuse).items():
        part.forward = forward.__get__(part)


# torch looks at the gradient of every input of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_traced_to_hold_what_compiled_ones_save(monkeypatch, dtype):
    # The graphs of the default backend, without its code.
    compiling = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiling)
    model = llama().to(dtype)
    of_plain = saved_bytes(model)
    fuse(model)
    saved = of_plain - saved_bytes(model)

    def make() -> nn.Module:
        return llama().to(dtype)

    (_, plain), (module, _) = traced(make), traced(make)
    fuse(module, one_kernel)
    fused = traced(lambda: module)[1]

    assert held(plain) - held(fused) == saved > held(plain) / 5
    assert (fused.read, fused.flops) == (plain.read, plain.flops)
    assert fused.points[-1] == plain.points[-1]


HIDDEN = torch.empty(8192, 64, device="meta")
WEIGHT = torch.empty(128256, 64, device="meta")
# The chunk size is the last argument; 0 is the default of the device.
ON_BOTH_HEADS = (HIDDEN, WEIGHT, None, HIDDEN, WEIGHT, *(None,) * 12)
ON_CACHED_IDS = (HIDDEN, WEIGHT, *(None,) * 14)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (torch.ops.megakd.linear_kd.default, ON_BOTH_HEADS),
        (torch.ops.megakd.topk_kd.default, ON_CACHED_IDS),
    ],
    ids=["two heads", "cached answers"],
)
def test_the_buffers_of_the_head_have_the_budget_of_a_gpu_or_of_the_caller(operator, arguments):
    def buffers(chunk_mb):
        return loss_workspace(operator, (*arguments, chunk_mb), "cuda") / 2**20

    assert buffers(0.0) == pytest.approx(1024, rel=0.05)
    assert buffers(2048.0) == pytest.approx(2048, rel=0.05)
