"""Cut models, and models that run as a cut of themselves, compute what is left of the whole."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from elastic_views import masked, without_dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cuts import (
    AUTO,
    CUTTABLE,
    DECODERS,
    FAMILIES,
    LABELS,
    MASKED,
    VOCABULARY,
    build,
    cut,
    full_view,
    loaded,
    logits,
    order_of,
    randomised,
    reshaped,
    saved,
    source_of,
    task_of,
    view_of,
    written,
)
from transformers import AutoModel

from megakd.errors import ModelError
from megakd.models.cutting import cut_config, is_stock
from megakd.models.elastic import Elastic, weight_axes
from megakd.models.proposed_units import cut_part
from megakd.models.small_copy import no_cache
from megakd.models.structure import architecture_of
from megakd.models.views import Cut, UnitOrder, View

LANGUAGE = [*((name, "causal_lm") for name in DECODERS), *((name, "mlm") for name in MASKED)]


def language_model(family, kind, **changes):
    model = build(family, kind, attention_dropout=0.0, **changes)
    return model.eval()


def pruned(model, *, seed=0, width=17, neurons=(7, 20, 1), head_width=None, heads=None) -> Cut:
    """A cut whose kept units lie anywhere in the model, in their stored order."""
    rng, full = random.Random(seed), full_view(model)
    architecture = architecture_of(model.config)
    columns = architecture.heads(model.config).width

    def picked(count, kept):
        chosen = sorted(rng.sample(range(count), kept))
        return (*chosen, *(unit for unit in range(count) if unit not in chosen))

    heads = heads or full.heads
    inside = [
        tuple(tuple(picked(columns, head_width or columns) for _ in range(n)) for n in full.heads)
        for _ in range(2)
    ]
    order = UnitOrder(
        heads=tuple(map(picked, full.heads, heads)),
        neurons=tuple(map(picked, full.neurons, neurons)),
        width=picked(full.width, width),
        queries=inside[0] if head_width else None,
        values=inside[1] if head_width else None,
    )
    return Cut(order, View(tuple(heads), tuple(neurons), width, head_width))


def cuts_of(model):
    if architecture_of(model.config).found_units(model.config).heads.can_lose_columns:
        return pruned(model, head_width=3)
    return pruned(model, heads=tuple(1 + (number % 2) for number in range(3)))


def cut_model(model, units, *, kind, learns=False):
    return cut(model, kind, units.view, units.order, learns=learns)


def run(model):
    ids = torch.arange(2, 26).reshape(2, 12) % VOCABULARY
    return model(input_ids=ids, output_hidden_states=True, **no_cache(model))


@pytest.mark.parametrize(
    ("family", "kind", "learns"),
    [*((*case, False) for case in LANGUAGE), ("bert", "mlm", True), ("llama", "causal_lm", True)],
)
def test_a_model_that_keeps_a_cut_computes_what_the_cut_model_computes(family, kind, learns):
    model = language_model(family, kind)
    cut = cuts_of(model)
    small = cut_model(model, cut, kind=kind, learns=learns)
    elastic = Elastic(model)

    elastic.keep(cut)

    masked, dense = run(model), run(small)
    torch.testing.assert_close(masked.logits, dense.logits, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(masked.hidden_states, dense.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "kind"), LANGUAGE)
def test_gradients_are_those_of_the_cut_model_and_zero_elsewhere(family, kind):
    model = language_model(family, kind)
    cut, axes = cuts_of(model), weight_axes(model)
    small = cut_model(model, cut, kind=kind, learns=True)
    Elastic(model).keep(cut)

    run(model).logits.square().sum().backward()
    run(small).logits.square().sum().backward()

    theirs = dict(small.named_parameters())
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        of_weight = axes.get(name, (None,) * weight.dim())
        kept = cut_part(weight.grad, of_weight, cut)
        torch.testing.assert_close(kept, theirs[name].grad, atol=2e-3, rtol=1e-4, msg=name)
        total = weight.grad.abs().sum()
        torch.testing.assert_close(total, kept.abs().sum(), rtol=1e-5, atol=1e-5, msg=name)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 24),
    neurons=st.tuples(*[st.integers(0, 20)] * 3),
    head_width=st.integers(1, 4),
)
def test_any_choice_of_units_runs_as_the_cut_model(bert, seed, width, neurons, head_width):
    model, elastic = bert
    cut = pruned(model, seed=seed, width=width, neurons=neurons, head_width=head_width)
    small = cut_model(model, cut, kind="mlm", learns=True)
    elastic.keep(cut)
    torch.testing.assert_close(run(model).logits, run(small).logits, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def bert():
    model = language_model("bert", "mlm")
    return model, Elastic(model)


@pytest.mark.parametrize("is_whole", [False, True], ids=["no cut", "a whole cut"])
def test_keeping_nothing_special_runs_the_whole_model_again(is_whole):
    model = language_model("bert", "mlm")
    before = run(model).logits
    elastic = Elastic(model)
    elastic.keep(cuts_of(model))
    kept = run(model).logits
    assert not torch.allclose(kept, before)
    with elastic.viewing(View((2, 2, 2), (5, 5, 5))):
        assert not torch.allclose(run(model).logits, kept)
    assert torch.equal(run(model).logits, kept)

    elastic.keep(Cut(None, full_view(model)) if is_whole else None)

    assert torch.equal(run(model).logits, before)


def test_a_model_that_learns_on_states_its_scale_also_where_a_stock_config_has_the_shape():
    model = language_model("bert", "mlm")
    units = pruned(model, width=12, head_width=2, neurons=(5, 5, 5))

    config = cut_config(model.config, units.view, units.order, learns=True)

    assert config.narrow["score_width"] == 4


@pytest.mark.parametrize("is_narrowed", [False, True], ids=["heads left alone", "heads cut again"])
def test_the_scale_survives_a_second_cut(is_narrowed):
    model = language_model("bert", "mlm")
    first = pruned(model, width=18, head_width=3, neurons=(9, 9, 9))
    halfway = cut_model(model, first, kind="mlm", learns=True)
    second = Cut(None, full_view(halfway))
    if is_narrowed:
        second = pruned(halfway, width=12, head_width=2, neurons=(5, 5, 5), seed=3)

    exported = cut_model(halfway, second, kind="mlm")

    # 6 heads of 3 (or 2) columns make 18 (or 12): the stock class can say the shape once the
    # queries are scaled.
    assert is_stock(exported.config)
    Elastic(halfway).keep(second)
    torch.testing.assert_close(run(halfway).logits, run(exported).logits, atol=1e-5, rtol=1e-5)


def test_columns_inside_heads_are_refused_where_positions_pair_them():
    model = language_model("llama", "causal_lm")
    view = full_view(model)._replace(head_width=2)

    with pytest.raises(ModelError, match=r"columns of hidden states \(width\) or of heads"):
        cut_config(model.config, view)
    with pytest.raises(ModelError, match=r"columns of hidden states \(width\) or of heads"):
        Elastic(model).keep(Cut(None, view))


@pytest.mark.parametrize(("family", "kind"), [("bert", "mlm"), ("llama", "causal_lm")])
def test_layers_without_heads_or_neurons_run_as_cuts_too(family, kind):
    stock = build(family, kind)
    counts = View((2, 0, 3), (9, 0, 20))
    model = cut_model(stock, Cut(None, counts), kind=kind, learns=True).eval()
    head_width = 3 if family == "bert" else None
    cut = pruned(model, neurons=(4, 0, 7), head_width=head_width)
    small = cut_model(model, cut, kind=kind, learns=True)

    Elastic(model).keep(cut)

    torch.testing.assert_close(run(model).logits, run(small).logits, atol=1e-5, rtol=1e-5)


def test_sorting_a_model_in_flight_leaves_its_outputs_as_they_were(tmp_path):
    model = language_model("bert", "mlm")
    halfway = cut_model(model, pruned(model, width=18, head_width=3), kind="mlm", learns=True)
    folder = saved(halfway, tmp_path / "halfway")

    source = source_of(folder, "mlm")
    result = reshaped(source, tmp_path / "sorted", "mlm", order=order_of(halfway))

    sorted_model = loaded(result, "mlm")
    torch.testing.assert_close(run(sorted_model).logits, run(halfway).logits, atol=1e-5, rtol=1e-5)


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
BIASED = {"attention_bias": True, "mlp_bias": True}
KINDS = [
    *((family, task_of(family), {}) for family in FAMILIES),
    *((family, "mlm", {}) for family in MASKED),
    ("llama", "causal_lm", BIASED),
]


@pytest.mark.parametrize(("view", "attention"), [("ragged", "eager"), ("empty", "sdpa")])
@pytest.mark.parametrize(("family", "kind", "changes"), KINDS, ids=str)
def test_a_cut_model_computes_what_is_left_of_the_whole_one(family, kind, changes, attention, view):
    whole = build(family, kind, **changes)
    kept = view_of(whole, view)

    smaller = cut(whole, kind, kept)
    attention = "eager" if family == "gemma2" else attention  # sdpa has no cap on scores

    whole.set_attn_implementation(attention)
    smaller.set_attn_implementation(attention)
    assert smaller.num_parameters() < whole.num_parameters()
    assert torch.allclose(logits(smaller), logits(masked(whole, kept)), atol=3e-5)


SAVED = [
    *((family, task_of(family)) for family in CUTTABLE),
    *((family, "classification") for family in ("llama", "gemma3_text")),
]


@pytest.mark.parametrize(("family", "kind"), SAVED)
def test_a_saved_model_comes_back_whole_and_bare(family, kind, tmp_path):
    whole = build(family, kind, pad_token_id=1)
    smaller = cut(whole, kind, view_of(whole, "empty"))

    written(smaller, tmp_path)
    again, info = AUTO[kind].from_pretrained(
        tmp_path, output_loading_info=True, trust_remote_code=True
    )

    assert not any(info.values()), info
    assert again.config.narrow == smaller.config.narrow
    assert torch.equal(logits(again.eval()), logits(smaller))
    # What has no elements is no parameter, and yet has a name.
    assert all(parameter.numel() for parameter in smaller.parameters())
    assert set(smaller.state_dict()) == set(whole.state_dict())
    bare = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(bare).__name__.startswith("Narrow")
    actual, expected = (model(input_ids=IDS)[0] for model in (bare, smaller.base_model))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", DECODERS)
def test_text_is_continued_with_and_without_a_cache_alike(family):
    whole = build(family)
    kept = view_of(whole, "empty")
    smaller = cut(whole, "causal_lm", kept)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    options |= {"attention_mask": torch.ones_like(IDS)}

    cached = smaller.generate(IDS, **options)

    assert cached.equal(smaller.generate(IDS, use_cache=False, **options))
    assert cached.equal(masked(whole, kept).generate(IDS, **options))


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen3", "gpt2"])
def test_attentions_are_told_of_every_layer(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))
    smaller.set_attn_implementation("eager")

    attentions = smaller(input_ids=IDS, output_attentions=True).attentions

    shared = 2 if "num_key_value_heads" in FAMILIES[family] else 1
    heads = [count * shared for count in (0, 2, 1)]
    assert [tuple(weights.shape) for weights in attentions] == [(2, n, 4, 4) for n in heads]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_and_recomputing_changes_none(family):
    whole = build(family)
    smaller = cut(whole, task_of(family), view_of(whole, "empty"))
    plain = gradients(smaller)

    recomputed = without_dropout(copy.deepcopy(smaller))
    recomputed.config.use_cache = False
    recomputed.activation_checkpointing_enable()

    result = gradients(recomputed)
    assert all(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(result[name], gradient, atol=1e-6), name


def gradients(model) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    output = model(input_ids=IDS).logits
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_new_weights_are_drawn_as_those_of_the_stock_model(recwarn):
    whole = build("bert")
    smaller = cut(whole, "classification", view_of(whole, "empty"))

    new = type(smaller)(smaller.config)

    parameters = dict(new.named_parameters())
    assert not recwarn.list
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    assert not parameters["bert.encoder.layer.0.attention.output.dense.bias"].any()
    assert 0.01 < parameters["bert.encoder.layer.1.attention.self.query.weight"].std() < 0.03
    assert new.config.num_labels == len(LABELS)
    assert not torch.equal(logits(new.eval()), logits(randomised(new)))
