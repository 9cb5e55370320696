"""Views of an elastic model against dense models, and several views before one backward."""

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
    TOKENS,
    UNEVEN,
    WITHOUT,
    assert_same,
    cut,
    family_model,
    gradients_of,
    logits_of,
    loss_of,
    masked,
    view_for,
    without_dropout,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_families import build, small_config
from torch import nn

from megakd.errors import ModelError
from megakd.models.elastic import Elastic, Kept, NarrowLinear, weight_axes
from megakd.models.proposed_units import cut_part
from megakd.models.structure import architecture_of
from megakd.models.views import Cut, View

CUT = {"kept": View((2, 0, 3), (7, 0, 33))}


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
        *((f, View((1, 0, 2), (7, 0, 5)), CUT) for f in ("bert", "llama", "gpt2")),
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

    message = r"cannot be cut to View\(heads=\(3, 3, 4\).* it has View\(heads=\(3, 3, 3\)"
    with pytest.raises(ModelError, match=message), elastic.viewing(view):
        pass
    with pytest.raises(ModelError, match="already elastic"):
        Elastic(model)


SEVERAL = (UNEVEN, WITHOUT, None, NARROW)
# An encoder, narrower embeddings, a decoder, transposed weights, a decoder beside an encoder.
EACH_KIND = ("bert", "electra", "llama", "gpt2", "enct5")


def several(model, elastic) -> None:
    """One backward for four views, the whole model among them."""
    model.zero_grad()
    losses = []
    for view in SEVERAL:
        with elastic.viewing(view_for(model, view)):
            losses.append(loss_of(model))
    torch.stack(losses).sum().backward()


def count_calls(module: nn.Module) -> list[int]:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_one_backward_for_several_views_gives_the_sum_of_their_gradients(family):
    model = family_model(family)
    elastic = Elastic(model)
    expected = dict.fromkeys(gradients_of(model), 0)
    for view in SEVERAL:
        model.zero_grad()
        with elastic.viewing(view_for(model, view)):
            loss_of(model).backward()
        expected = {name: expected[name] + g for name, g in gradients_of(model).items()}

    several(model, elastic)

    assert_same(gradients_of(model), expected)


@pytest.mark.parametrize(
    ("family", "is_enabled_first", "use_reentrant"),
    [
        *((family, False, False) for family in EACH_KIND),
        ("bert", True, False),
        ("bert", True, True),
        ("gpt2", False, True),
    ],
)
def test_recomputed_activations_are_of_the_view_they_were_computed_for(
    family, is_enabled_first, use_reentrant
):
    kept, recomputed = (without_dropout(family_model(family)) for _ in range(2))
    if is_enabled_first:
        recomputed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    elastic = Elastic(recomputed)
    if not is_enabled_first:
        recomputed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    found = architecture_of(recomputed.config).found_units(recomputed.config)
    _, owner, units = next(found.parts_with("neurons"))
    calls = count_calls(recomputed.get_submodule(f"{owner}.{units.makers[0]}"))

    several(recomputed, elastic)
    several(kept, Elastic(kept))

    assert_same(gradients_of(recomputed), gradients_of(kept))
    assert len(calls) == 2 * len(SEVERAL)


@pytest.mark.parametrize("family", EACH_KIND)
def test_shared_embeddings_are_computed_once_per_width_and_learn_from_all_views(family):
    model = without_dropout(family_model(family))
    elastic = Elastic(model)
    several(model, elastic)
    expected = gradients_of(model)
    calls = count_calls(model.get_input_embeddings())

    with elastic.sharing_embeddings():
        several(model, elastic)

    assert_same(gradients_of(model), expected)
    assert len(calls) == 2
    several(model, elastic)
    assert_same(gradients_of(model), expected)
    assert len(calls) == 2 + len(SEVERAL)


def test_views_of_a_decoder_inside_a_base_model_share_its_embeddings_and_none_of_its_layers():
    config = small_config("opt", "classification")
    config.architectures = ["OPTForSequenceClassification"]
    model = build(config, "classification")
    elastic = Elastic(model)
    half = elastic.units._replace(neurons=tuple(count // 2 for count in elastic.units.neurons))

    def logits(view):
        with torch.no_grad(), elastic.viewing(view):
            return model(TOKENS).logits

    with elastic.sharing_embeddings():
        shared = [logits(view) for view in (None, half)]

    assert not torch.equal(*shared)
    torch.testing.assert_close(shared[1], logits(half))


def test_views_that_share_embeddings_share_their_dropout():
    model = family_model("bert").train()
    elastic = Elastic(model)

    def embedded(view, tokens=TOKENS):
        with elastic.viewing(view):
            return model(tokens, output_hidden_states=True).hidden_states[0]

    assert not torch.equal(embedded(UNEVEN), embedded(WITHOUT))
    with elastic.sharing_embeddings():
        first = embedded(UNEVEN)
        assert embedded(WITHOUT) is first
        assert embedded(EVERYTHING) is first
        assert not torch.equal(embedded(WITHOUT, TOKENS.clone()), first)
    assert not torch.equal(embedded(WITHOUT), first)


def test_shared_embeddings_follow_tokens_and_mode():
    model, tokens = family_model("llama"), TOKENS.clone()
    elastic, embeddings = Elastic(model), model.get_input_embeddings()

    with elastic.sharing_embeddings():
        with torch.no_grad():
            assert not embeddings(tokens).requires_grad
        first = embeddings(tokens)
        assert first.requires_grad
        assert embeddings(tokens.view(tokens.shape)) is first
        tokens += 1
        assert torch.equal(embeddings(tokens), embeddings.weight[tokens])
        with elastic.sharing_embeddings():
            assert embeddings(tokens) is not first


@pytest.mark.parametrize("is_linear", [True, False], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    ("leading", "inputs", "outputs"),
    [((), 3, 2), ((2, 3), 3, 2), ((2,), 0, 2), ((2,), 3, 0), ((2, 3), 5, 4), ((0, 3), 3, 2)],
    ids=str,
)
def test_gradients_of_a_prefix_are_those_of_finite_differences(inputs, outputs, leading, is_linear):
    generator = torch.Generator().manual_seed(1)
    parts = 1 if is_linear else 3
    sizes = ((4, Kept(outputs)), (5, Kept(inputs)))
    if not is_linear:
        rows = [4 * part + row for part in range(parts) for row in range(outputs)]
        several = Kept(len(rows), torch.tensor(rows, dtype=torch.long))
        sizes = ((5, Kept(inputs)), (4 * parts, several))
    shape, prefixes = (tuple(part) for part in zip(*sizes, strict=True))

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    given = drawn(*leading, inputs), drawn(*shape), drawn(4 * parts)
    side = 0 if is_linear else 1

    assert NarrowLinear.apply(*given, prefixes, side).shape == (*leading, outputs * parts)
    for bias in (given[2], None):
        assert torch.autograd.gradcheck(
            lambda x, w, b=bias: NarrowLinear.apply(x, w, b, prefixes, side), given[:2]
        )
    assert torch.autograd.gradcheck(
        lambda b: NarrowLinear.apply(*given[:2], b, prefixes, side), given[2:]
    )
