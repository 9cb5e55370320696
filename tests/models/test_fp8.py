"""Linear layers of 8 bits: their products, the gradient of their inputs, and their refusals."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MambaConfig, T5Config
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from megakd.errors import ConfigError, ModelError
from megakd.models import fused_layers
from megakd.models.quantized import Fp8Linear, check_fp8, check_fp8_device, scaled_rows
from megakd.models.structure import architecture_of

INPUTS, OUTPUTS = 64, 48


def pair() -> tuple[nn.Linear, Fp8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    return linear, packed_of(linear)


def packed_of(linear: nn.Linear) -> Fp8Linear:
    flat = linear.weight.detach().flatten()
    packed = Fp8Linear(linear)
    packed.fill(lambda start, stop: flat[start:stop])
    return packed


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return ((actual - exact).float().norm() / exact.float().norm()).item()


def test_outputs_and_gradients_are_those_of_the_layer_up_to_rounding():
    linear, packed = pair()
    inputs = torch.randn(2, 5, INPUTS, dtype=torch.bfloat16, requires_grad=True)

    exact, outputs = linear(inputs), packed(inputs)
    (wanted,) = torch.autograd.grad(exact.square().sum(), inputs)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)

    assert (outputs.shape, outputs.dtype) == (exact.shape, exact.dtype)
    assert relative(outputs, exact) < 0.05
    assert relative(gradient, wanted) < 0.06


def test_a_feed_forward_of_t5_does_not_cast_hidden_states_to_bytes():
    sizes = {"d_model": INPUTS, "d_ff": INPUTS, "feed_forward_proj": "gated-gelu"}
    part = T5DenseGatedActDense(T5Config(**sizes)).bfloat16().eval()
    inputs = torch.randn(2, 5, INPUTS, dtype=torch.bfloat16)
    exact = part(inputs)

    for name, linear in list(part.named_children()):
        if isinstance(linear, nn.Linear):
            setattr(part, name, packed_of(linear))

    assert relative(part(inputs), exact) < 0.1


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=1, time_step_rank=16), True),
        (MambaConfig(hidden_size=32, num_hidden_layers=1, time_step_rank=8), False),
        (LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2), False),
    ],
    ids=["multiplies by dt_proj", "leaves dt_proj plain", "llama"],
)
def test_a_family_whose_code_reads_weights_of_linear_layers_is_refused(config, is_refused):
    known = {"architecture": architecture_of(config), "quantization": None, "folder": Path("x")}
    source: Any = SimpleNamespace(config=config, where="teacher.model", name="x", **known)
    refused = pytest.raises(ModelError, match=r"^teacher.dtype: fp8 .* for x: its code reads weig")

    with refused if is_refused else nullcontext():
        check_fp8(source, "causal_lm", is_trained=False)


def test_a_part_of_a_row_is_scaled_by_the_whole_row():
    linear, packed = pair()
    flat = linear.weight.detach().flatten()
    numbers, scales = scaled_rows(linear.weight.detach())
    seen: list[tuple[int, int]] = []

    def set_part(tensor: torch.Tensor, read) -> None:
        expected = numbers if tensor is packed.weight else scales
        flat_expected = expected.view(tensor.dtype).flatten()
        for start, stop in ((0, 7), (5, INPUTS + 3), (90, 90), (130, 192)):
            assert torch.equal(read(start, stop), flat_expected[start:stop])

    def read(start: int, stop: int) -> torch.Tensor:
        seen.append((start % INPUTS, stop % INPUTS))
        return flat[start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megakd.models.quantized.set_values", set_part)
        packed.fill(read)
    assert {*seen} == {(0, 0)}  # whole rows


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_scaling_of_rows_is_compiled_with_fused_layers(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _, packed = pair()
    inputs = torch.randn(3, INPUTS, dtype=torch.bfloat16)
    plain = packed(inputs)

    for part, forward in fused_layers.fused_forwards(nn.Sequential(packed)).items():
        part.forward = forward.__get__(part)

    assert "forward" in vars(packed)
    assert torch.equal(packed(inputs), plain)


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False)])
def test_a_card_without_products_of_8_bits_is_refused(monkeypatch, capability, is_refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    check_fp8_device(torch.device("cpu"), "teacher.dtype")
    if not is_refused:
        check_fp8_device(torch.device("cuda"), "teacher.dtype")
        return
    with pytest.raises(ConfigError, match=r"^teacher.dtype: fp8 needs .* 8.9 .* A100 has 8.0; use"):
        check_fp8_device(torch.device("cuda"), "teacher.dtype")
