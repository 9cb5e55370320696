"""Experts of a mixture that go: a cut model computes what the whole one does without them."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_families import TYPES, small_configs
from tiny_mixtures import FAMILIES, keys_of
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.errors import ModelError
from megakd.models.cutting import cut_config, cut_state
from megakd.models.elastic import weight_axes
from megakd.models.experts import FoundExperts, contributions_taken, experts_of
from megakd.models.structure import for_task
from megakd.models.units import as_double, outputs_of
from megakd.models.views import UnitOrder, View

ALL = View((), ())


def config_of(family, **changes):
    config = AutoConfig.for_model(**keys_of(family, vocab_size=512, **changes))
    for_task(config, "causal_lm")
    return config


def model_of(config):
    torch.manual_seed(0)
    return as_double(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def cut(model, view, order):
    """The model of a cut, opened by its class from its config and its weights."""
    state = cut_state(model.state_dict().items(), weight_axes(model), view, order)
    other = model_of(cut_config(model.config, view, order))
    other.load_state_dict(dict(state))
    return other


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def without_experts(monkeypatch, model, gone):
    """Let routers give these experts, by layer, the lowest score."""
    axes = weight_axes(model)
    routers = {
        id(weight): gone[axis.number]
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and ".experts." not in name
        for axis in axes.get(name, (None,))[:1]
        if axis is not None and axis.kind == "experts"
    }
    linear = functional.linear

    def masked(hidden, weight, bias=None):
        scores = linear(hidden, weight, bias)
        lost = routers.get(id(weight), ())
        return scores.index_fill(-1, torch.tensor(lost, dtype=torch.long), -1e9)

    # A router in fp32 multiplies with a copy of its weights, which in fp64 is the weight itself.
    monkeypatch.setattr(functional, "linear", masked)
    try:
        return outputs_of(model)
    finally:
        monkeypatch.undo()


def orders(found, seed=0):
    """Random scores of each layer's experts, and the order by them."""
    rng = random.Random(seed)
    return {number: [rng.random() for _ in range(found.total)] for number in found.blocks}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_another_order_with_their_routers_change_nothing(family):
    config = config_of(family)
    model, found = model_of(config), experts_of(config)
    size = found.total // found.groups
    # The experts of each group backwards.
    mixed = tuple(n // size * size + size - 1 - n % size for n in range(found.total))
    layers = tuple(mixed if number in found.blocks else () for number in range(2))

    result = cut(model, ALL, UnitOrder((), (), experts=layers))

    assert_equal(outputs_of(result), outputs_of(model))
    assert not any(
        torch.equal(weight, other)
        for (name, weight), other in zip(model.named_parameters(), result.parameters(), strict=True)
        if name in found.axes and weight.dim() == 3  # biases are 0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_computes_what_the_whole_one_does_without_the_experts(monkeypatch, family):
    config = config_of(family)
    model, found = model_of(config), experts_of(config)
    kept, rng = found.counts[-2], random.Random(0)
    scores = {number: [rng.random() for _ in range(found.total)] for number in found.blocks}
    order = found.order(scores, kept)

    result = cut(model, ALL._replace(experts=kept), order)

    gone = {number: order.experts[number][kept:] for number in found.blocks}
    expected = without_experts(monkeypatch, model, gone)
    assert_equal(outputs_of(result), expected)
    assert (expected - outputs_of(model)).abs().max() > 1e-3  # some token had chosen them
    assert type(result) is type(model)
    assert getattr(result.config, found.key) == kept


# Families that weigh the chosen experts by their own scores alone.
NORMED = {
    "mixtral": {"num_local_experts": 32},
    "gpt_oss": {"num_local_experts": 32},
    "qwen3_moe": {"num_experts": 32, "norm_topk_prob": True},
    "deepseek_v3": {"n_routed_experts": 64, "n_group": 1},
}


@pytest.mark.parametrize("family", NORMED)
def test_experts_that_are_never_chosen_go_without_a_trace(family):
    config = config_of(family, **NORMED[family])
    model, found = model_of(config), experts_of(config)
    with contributions_taken(model, found) as taken:
        expected = outputs_of(model)
    scores = {number: sums.tolist() for number, sums in taken.sums.items()}
    used = max(sum(score > 0 for score in of_layer) for of_layer in scores.values())

    result = cut(model, ALL._replace(experts=used), found.order(scores, used))

    assert used < found.total
    assert_equal(outputs_of(result), expected)


def test_importance_is_the_norm_of_what_an_expert_gives_summed_over_valid_tokens():
    config = config_of("mixtral")
    model, found = model_of(config), experts_of(config)
    block, given = model.model.layers[1].mlp, []
    hook = block.experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    expected, plain = torch.zeros(found.total, dtype=torch.float64), outputs_of(model)
    hook.remove()
    ((hidden, chosen, weights),) = given
    valid = torch.arange(len(hidden)) % 3 > 0
    for token in valid.nonzero().flatten():
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            up, down = (getattr(block.experts, f"{n}_proj")[expert] for n in ("gate_up", "down"))
            gate, value = (up @ hidden[token]).chunk(2)
            expected[expert] += weight * (down @ (functional.silu(gate) * value)).norm()

    with contributions_taken(model, found) as taken:
        taken.valid = valid
        outputs = outputs_of(model)

    torch.testing.assert_close(taken.sums[1], expected)
    assert_equal(outputs, plain)
    assert taken.chosen == 2
    assert torch.equal(outputs_of(model), plain)  # as before


def test_each_group_keeps_as_many_of_its_experts_in_their_order():
    found = FoundExperts(total=8, groups=2, least=4, chosen=2, why_fixed=None)

    order = found.order({1: [0, 9, 8, 7, 1, 2, 4, 3]}, 4)

    assert order.experts == ((), (1, 2, 6, 7, 0, 3, 4, 5))
    assert found.counts == (4, 6, 8)


@pytest.mark.parametrize(
    ("family", "count", "message"),
    [
        ("mixtral", 1, "cannot keep 1 of its 4 experts: .* at least 2, because a token .* to 2"),
        ("deepseek_v3", 5, "cannot keep 5 of its 8 experts: .* a multiple of 2"),
        (
            "jetmoe",
            4,
            "of a jetmoe model cannot go: not each layer has a module of experts",
        ),
        ("llama", 4, "experts of a llama model cannot go: it is a dense model"),
    ],
)
def test_a_number_of_experts_that_no_layer_can_keep_is_refused(family, count, message):
    if family in FAMILIES:
        config = config_of(family)
    else:
        config = next(small_configs(family, "causal_lm"))
        for_task(config, "causal_lm")

    with pytest.raises(ModelError, match=message):
        cut_config(config, ALL._replace(experts=count))


# Two routers in a layer, experts without weights of the router, tables of experts by token.
UNCUT = {"jetmoe", "llama4_text", "deepseek_v4", "dbrx", "hunyuan_v1_moe", "inkling_text", "zaya"}


@pytest.mark.slow
def test_nearly_all_mixtures_of_transformers_can_lose_experts():
    cut, why_fixed = set(), set()
    for family in sorted(TYPES["causal_lm"]):
        for config in small_configs(family, "causal_lm"):
            try:
                architecture = for_task(config, "causal_lm")
            except ModelError:
                continue
            if architecture.experts is not None:
                (why_fixed if experts_of(config).why_fixed else cut).add(family)
            break

    assert why_fixed <= UNCUT
    assert len(cut) >= 40
