"""Gates: their gradients are the sums of weight times gradient, and they change nothing."""

from __future__ import annotations

import math

import pytest
import torch
from elastic_views import FAMILIES, HEADS, NEURONS, TOKENS, family_model
from torch import nn

from megakd.errors import TeacherError
from megakd.models.cutting import cut_config
from megakd.models.small_copy import new_model
from megakd.models.structure import architecture_of
from megakd.models.views import View
from megakd.training.importance import Gate, Gates

CPU = torch.device("cpu")


def loss_of(model):
    return model(input_ids=TOKENS).logits.square().mean()


def by_weights(model) -> list[torch.Tensor]:
    """Per attention and feed-forward: weight times gradient, summed over each unit's columns."""
    loss_of(model).backward()
    found = architecture_of(model.config).found_units(model.config)
    collected = []
    for _, owner, units in (*found.parts_with("heads"), *found.parts_with("neurons")):
        module, count = model.get_submodule(f"{owner}.{units.output}"), units.total
        products = module.weight.detach() * module.weight.grad
        columns = products.sum(0 if isinstance(module, nn.Linear) else 1)
        collected.append(columns.reshape(count, -1).sum(1))
    model.zero_grad()
    return collected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gates_gradient_is_the_sum_of_its_weights_times_their_gradients(family):
    model = family_model(family)
    expected = by_weights(model)
    gates = Gates(model.requires_grad_(requires_grad=False), CPU)

    with gates.in_place():
        actual = gates.gradients(loss_of(model))

    assert actual.dtype == torch.float32
    for mine, sums in zip(actual.split([len(e) for e in expected]), expected, strict=True):
        torch.testing.assert_close(mine.double(), sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "enct5"])
def test_gates_change_no_output_and_are_gone_afterwards(family):
    model = family_model(family)
    before, gates = loss_of(model), Gates(model, CPU)

    with gates.in_place():
        inside = loss_of(model)
    with pytest.raises(RuntimeError, match="not have been used"):
        gates.gradients(loss_of(model))

    assert inside == before == loss_of(model)


# EncT5's decoder has two attentions and a feed-forward more.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("family", "view"),
    [
        ("bert", View((3, 0, 2), (7, 0, 33))),
        ("llama", View((0, 1, 2), (0, 1, 40))),
        ("gpt2", View((0, 0, 0), (0, 0, 0))),
        ("enct5", View((3, 0, 2, 0, 1), (7, 0, 33, 0))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cut_model_has_gates_for_what_is_left(family, view):
    config = cut_config(family_model(family).config, view)
    model = new_model(config, architecture_of(config).tasks[0]).eval()
    gates = Gates(model, CPU)

    with gates.in_place():
        scores = gates.scores(gates.gradients(loss_of(model)).abs())

    assert tuple(map(len, scores.heads)) == view.heads
    assert tuple(map(len, scores.neurons)) == view.neurons


def test_a_gate_sums_over_positions_in_fp32():
    gate = torch.ones(1, requires_grad=True)

    out = Gate.apply(torch.ones(257, 1, dtype=torch.bfloat16), gate, 1)
    out.float().sum().backward()

    assert out.dtype == torch.bfloat16
    assert gate.grad.tolist() == [257.0]  # bf16 has no such number


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        (HEADS, "heads of attention 2"),
        (-1, "neurons of feed-forward 3"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_importance_that_is_not_finite_is_refused_naming_the_layer(place, layer, value):
    gates = Gates(family_model("bert"), CPU)
    totals = torch.ones(3 * HEADS + 3 * NEURONS)
    totals[place] = value

    with pytest.raises(TeacherError, match=rf"{layer} is not finite: .*teacher\.dtype"):
        gates.scores(totals)
