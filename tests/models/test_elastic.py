"""Views of an elastic model against dense models that were masked or cut by other means."""

from __future__ import annotations

import copy

import pytest
import torch
from elastic_views import (
    EVERYTHING,
    FAMILIES,
    HEADS,
    LAYERS,
    NARROW,
    NEURONS,
    NOTHING,
    UNEVEN,
    WIDTH,
    WITHOUT,
    assert_same,
    cut,
    family_model,
    gradients_of,
    logits_of,
    loss_of,
    masked,
    view_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megakd.contract.views import Cut, View
from megakd.errors import ModelError
from megakd.models.axes import cut_part, weight_axes
from megakd.models.elastic import Elastic

CUT = {"head_counts": [2, 0, 3], "neuron_counts": [7, 0, 33], "head_width": 8}


def assert_like_the_masked(model, elastic, reference, view) -> None:
    """Logits and all gradients under a view, zeros outside it included."""
    model.zero_grad()
    with elastic.viewing(view):
        logits = logits_of(model)
        loss_of(model).backward()
    loss_of(reference).backward()

    torch.testing.assert_close(logits, logits_of(reference), atol=1e-5, rtol=0)
    assert_same(gradients_of(model), gradients_of(reference))
    assert_zero_outside(gradients_of(model), model, view)


def assert_zero_outside(gradients: dict, model, view: View) -> None:
    axes = weight_axes(model)
    for name, gradient in gradients.items():
        numbers = torch.arange(gradient.numel()).view(gradient.shape)
        outside = gradient.flatten().clone()
        outside[cut_part(numbers, axes.get(name, ()), Cut(None, view)).flatten()] = 0
        assert outside.count_nonzero() == 0, name


@pytest.mark.parametrize(
    ("family", "view", "changes"),
    [
        *((family, view, {}) for family in FAMILIES for view in (UNEVEN, WITHOUT)),
        *((f, NOTHING, {"attn_implementation": "eager"}) for f in ("bert", "llama", "enct5")),
        ("gpt2", WITHOUT, {"attn_implementation": "eager"}),
        ("t5_encoder", WITHOUT, {"feed_forward_proj": "gated-gelu"}),
        *((f, View((1, 0, 2), (7, 0, 5)), CUT) for f in ("cut_bert", "cut_llama", "cut_gpt2")),
    ],
    ids=str,
)
def test_a_view_is_the_masked_model(family, view, changes):
    model = family_model(family, **changes)
    view = view_for(model, view)
    reference = masked(model, view)
    assert_like_the_masked(model, Elastic(model), reference, view)


DENSE = {family: family_model(family) for family in ("bert", "llama")}
ELASTIC = {family: copy.deepcopy(model) for family, model in DENSE.items()}
VIEWING = {family: Elastic(model) for family, model in ELASTIC.items()}


@settings(max_examples=8, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", DENSE)
def test_any_view_is_the_masked_dense_model(family, data):
    heads = st.tuples(*[st.integers(0, HEADS)] * LAYERS)
    neurons = st.tuples(*[st.integers(0, NEURONS)] * LAYERS)
    view = View(data.draw(heads), data.draw(neurons))
    assert_like_the_masked(ELASTIC[family], VIEWING[family], masked(DENSE[family], view), view)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_residual_width_is_a_model_cut_to_it(family):
    model = family_model(family, tie_word_embeddings=False)
    view = view_for(model, NARROW)
    dense, axes, elastic = cut(model, view), weight_axes(model), Elastic(model)

    with elastic.viewing(view):
        logits = logits_of(model)
        loss_of(model).backward()
    loss_of(dense).backward()

    torch.testing.assert_close(logits, logits_of(dense), atol=1e-5, rtol=0)
    result = gradients_of(model)
    assert_zero_outside(result, model, view)
    assert_same(
        {n: cut_part(g, axes.get(n, ()), Cut(None, view)) for n, g in result.items()},
        gradients_of(dense),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_of_everything_is_the_model_itself(family):
    model = family_model(family)
    before, names = logits_of(model), list(model.state_dict())
    elastic = Elastic(model)

    whole = view_for(model, EVERYTHING)
    for view in (None, whole, whole._replace(width=None)):
        with elastic.viewing(view):
            assert torch.equal(logits_of(model), before)
    assert list(model.state_dict()) == names


def test_views_nest_and_the_former_one_comes_back():
    model = family_model("bert")
    elastic, whole = Elastic(model), logits_of(model)

    with elastic.viewing(UNEVEN):
        uneven = logits_of(model)
        with elastic.viewing(WITHOUT):
            without = logits_of(model)
            with elastic.viewing(None):
                assert torch.equal(logits_of(model), whole)
        assert torch.equal(logits_of(model), uneven)
        with pytest.raises(RuntimeError, match="in the middle"), elastic.viewing(WITHOUT):
            raise RuntimeError("in the middle")
        assert torch.equal(logits_of(model), uneven)
    assert torch.equal(logits_of(model), whole)
    assert not torch.allclose(uneven, without)
    assert not torch.allclose(uneven, whole)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_a_view_works_in_bf16(precision):
    model = family_model("bert").to(torch.bfloat16 if precision == "bf16" else torch.float32)
    reference, elastic = masked(model, WITHOUT), Elastic(model)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        with elastic.viewing(WITHOUT):
            loss = loss_of(model)
        expected = loss_of(reference)
    loss.backward()
    expected.backward()

    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {model.dtype}
    assert_same(gradients_of(model), gradients_of(reference), tolerance=0.05)


def test_a_view_of_another_model_is_an_error():
    model = family_model("bert")
    elastic, view = Elastic(model), View((3, 3, 4), (1, 1, 1))

    message = "keeps 4 heads of layer 3, which has 3"
    with pytest.raises(ModelError, match=message), elastic.viewing(view):
        pass
    with pytest.raises(ModelError, match="already elastic"):
        Elastic(model)


def test_a_module_of_unknown_kind_keeps_the_width_and_leaves_the_rest_elastic():
    model = family_model("bert")
    model.bert.pooler.register_parameter("gate", nn.Parameter(torch.ones(WIDTH)))
    elastic = Elastic(model)

    with elastic.viewing(UNEVEN):
        logits_of(model)
    with pytest.raises(ModelError, match=r"bert\.pooler\.gate"), elastic.viewing(NARROW):
        pass
