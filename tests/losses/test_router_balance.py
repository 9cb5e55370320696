"""The loss that balances the experts of a mixture is the one of its family, over all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab_scene import pretend_one_rank
from loss_scene import term_of
from tiny_mixtures import FAMILIES, keys_of
from transformers import AutoConfig, AutoModelForCausalLM

from megakd.config.terms import Shape
from megakd.data.batch import IGNORE, Batch, LossInputs, Pass, count_units
from megakd.losses.bundle import StudentBundle, unit_scales
from megakd.losses.objective import build_objective
from megakd.losses.router_balance import RouterBalance
from megakd.models.outputs import Needs, read_outputs
from megakd.models.routing import has_balance

BALANCED = [name for name, keys in FAMILIES.items() if "router_aux_loss_coef" in keys]
CE, ONE_PASS = term_of("hard_cross_entropy"), (Pass(),)


def model_of(family, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**keys_of(family, vocab_size=300, **changes))
    return AutoModelForCausalLM.from_config(config).train()


def batch_of(*lengths):
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.arange(2, 2 + valid.numel()).reshape(valid.shape)
    labels = ids.roll(-1, 1).masked_fill(~valid, IGNORE)
    return Batch({"input_ids": ids, "attention_mask": valid.long()}, labels, valid)


def loss_of(model, batches, *, balances=True, plan=ONE_PASS):
    objective = build_objective((CE,), "causal_lm", Shape(2, 16, 300), None, balances=balances)
    bundle = StudentBundle({"student": model}, objective, world_size=1)
    counts = count_units(batches, bundle.counters)
    return [bundle(batch, plan=plan, counts=counts) for batch in batches]


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    pretend_one_rank(monkeypatch)


@pytest.mark.parametrize("family", BALANCED)
def test_the_loss_and_its_gradient_are_those_of_transformers(family):
    model, batch = model_of(family), batch_of(9, 5)
    own = model(**batch.inputs, use_cache=False, output_router_logits=True).aux_loss

    ours, plain = (loss_of(model, [batch], balances=one)[0] for one in (True, False))

    torch.testing.assert_close(ours.parts["router_balance"], own.detach())
    (ours.total - plain.total).backward()
    weights = {n: w for n, w in model.named_parameters() if w.grad is not None}
    expected = torch.autograd.grad(0.5 * own, [*weights.values()], allow_unused=True)
    for (name, weight), of_weight in zip(weights.items(), expected, strict=True):
        gradient = torch.zeros_like(weight) if of_weight is None else of_weight
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_micro_batches_are_averaged_by_their_tokens():
    model, parts = model_of("mixtral"), [batch_of(9, 5), batch_of(2)]
    alone = [loss_of(model, [part])[0].parts["router_balance"] for part in parts]

    together = [losses.parts["router_balance"] for losses in loss_of(model, parts)]

    torch.testing.assert_close(sum(together), (14 * alone[0] + 2 * alone[1]) / 16)


def test_padding_is_not_routed_even_if_it_is_not_a_number():
    model, batch = model_of("mixtral"), batch_of(9, 5)
    inputs = loss_inputs(model, batch)
    expected = RouterBalance()(inputs)
    routing = inputs.student.routing
    spoilt = tuple(
        one.detach().masked_fill(~batch.valid.flatten()[:, None], torch.nan).requires_grad_()
        for one in routing.logits
    )

    student = inputs.student._replace(routing=routing._replace(logits=spoilt))
    result = RouterBalance()(replace(inputs, student=student))

    torch.testing.assert_close(result.total, expected.total)
    result.total.backward()
    assert all(one.grad.isfinite().all() and one.grad.any() for one in spoilt)


def loss_inputs(model, batch):
    units = unit_scales(count_units([batch]), 1).per_unit
    read = read_outputs(model, batch, Needs())
    return LossInputs(read, None, batch, {"router_balance": 1.0}, units)


@pytest.mark.parametrize("balanced", [True, False])
def test_a_pass_without_a_loss_balances_nothing(balanced):
    plan = (Pass(weights={} if balanced else {"hard_cross_entropy": 0.0}),)

    (losses,) = loss_of(model_of("mixtral"), [batch_of(9)], plan=plan)

    assert ("router_balance" in losses.parts) == balanced
    assert (losses.total.item() != 0) == balanced


@pytest.mark.parametrize(
    ("family", "changes", "learns"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.0}, True),
        ("mixtral", {}, False),
        ("deepseek_v3", {}, True),
    ],
    ids=["coefficient", "evaluated", "family"],
)
def test_no_router_logits_are_kept_where_nothing_is_balanced(family, changes, learns):
    model = model_of(family, **changes).train(learns)

    assert read_outputs(model, batch_of(9), Needs()).routing is None
    assert has_balance(model.config) == (family == "mixtral")


def test_a_model_whose_layers_are_all_dense_balances_nothing():
    model = model_of("qwen3_moe", mlp_only_layers=[0, 1])

    (losses,) = loss_of(model, [batch_of(9)])

    assert model.model.layers[0].mlp.__class__.__name__ == "Qwen3MoeMLP"
    assert "router_balance" not in losses.parts
