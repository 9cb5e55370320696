"""Linear layers of 8 bits: their products, the gradient of their inputs, and their refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from megakd.errors import ConfigError
from megakd.models import fused_layers
from megakd.models.quantized import Fp8Linear, check_fp8_device, scaled_rows

INPUTS, OUTPUTS = 64, 48


def pair() -> tuple[nn.Linear, Fp8Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    flat = linear.weight.detach().flatten()
    packed = Fp8Linear(linear)
    packed.fill(lambda start, stop: flat[start:stop])
    return linear, packed


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


def test_a_part_of_a_row_is_scaled_by_the_whole_row():
    linear, packed = pair()
    flat = linear.weight.detach().flatten()
    numbers, scales = scaled_rows(linear.weight.detach())
    seen: list[tuple[int, int]] = []

    def set_part(tensor: torch.Tensor, read) -> None:
        expected = numbers if tensor is packed.weight else scales
        flat_expected = expected.view(torch.uint8).flatten()
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
