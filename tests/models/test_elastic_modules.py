"""Several views before one backward, recomputation, shared embeddings."""

from __future__ import annotations

import pytest
import torch
from elastic_views import (
    EVERYTHING,
    FAMILIES,
    NARROW,
    TOKENS,
    UNEVEN,
    WITHOUT,
    assert_same,
    family_model,
    gradients_of,
    loss_of,
    view_for,
    without_dropout,
)
from torch import nn

from megakd.models.architectures import architecture_of
from megakd.models.elastic import Elastic
from megakd.models.elastic_modules import Kept, NarrowLinear

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
    paths = architecture_of(recomputed.config).feed_forwards(recomputed.config)[0]
    calls = count_calls(recomputed.get_submodule(paths.inputs[0]))

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
        sizes = ((5, Kept(inputs)), (4 * parts, Kept(outputs, parts)))
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
