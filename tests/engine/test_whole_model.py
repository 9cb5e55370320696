"""The copy of a module with whole weights, without ranks; tests/distributed shards its models."""

from __future__ import annotations

import functools

import pytest
import torch
from elastic_views import UNEVEN, family_model, logits_of
from torch import nn

from megakd.contract.views import Cut
from megakd.engine import sharding as room
from megakd.engine.sharding import evaluating, whole_model
from megakd.models.elastic import Elastic


def test_a_model_that_is_not_sharded_is_given_itself_in_evaluation_mode():
    model = family_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [part.training for part in model.modules()]

    with whole_model(model) as whole:
        assert whole is model
        assert not any(part.training for part in model.modules())

    assert [part.training for part in model.modules()] == modes


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[0].eval()

    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError

    assert [part.training for part in model.modules()] == [True, False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "cut_llama"])
def test_a_copy_computes_the_same_with_weights_of_its_own(family):
    counts = {"head_counts": [2, 0, 3], "neuron_counts": [7, 0, 33], "head_width": 8}
    model = family_model(family, **counts if family == "cut_llama" else {}).train()
    expected = logits_of(model.eval())

    copied = room._unsharded_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(logits_of(copied), expected)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not any(part.training for part in copied.modules())


def test_tied_weights_are_tied_in_a_copy():
    model = family_model("llama", tie_word_embeddings=True)

    copied = room._unsharded_copy(model)

    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert len([*copied.parameters()]) == len([*model.parameters()])


def test_a_copy_runs_as_the_cut_that_the_model_runs_as():
    model = family_model("llama")
    elastic = Elastic(model)
    elastic.keep(Cut(None, UNEVEN))
    expected = logits_of(model)

    copied = room._unsharded_copy(model)
    elastic.keep(None)

    assert torch.equal(logits_of(copied), expected)
    assert not torch.equal(logits_of(model), expected)


def test_a_copy_has_no_hooks_and_what_refers_to_a_module_refers_to_its_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    called = []
    for part in model.modules():
        part.register_forward_pre_hook(lambda *_: called.append("before"))
        part.register_forward_hook(lambda *_: called.append("after"))
    model.handle = model[0].register_full_backward_hook(lambda *_: called.append("backward"))
    model[0].forward = functools.partial(nn.Linear.forward, model[0])
    inputs = torch.randn(3, 2, requires_grad=True)

    copied = room._unsharded_copy(model)
    copied(inputs).sum().backward()

    assert called == []
    assert copied[0].forward.args == (copied[0],)
    model(inputs)
    assert called


def test_buffers_are_copied_and_stay_out_of_the_state_if_they_were():
    model = nn.BatchNorm1d(2)
    model.register_buffer("table", torch.ones(2), persistent=False)

    copied = room._unsharded_copy(model)
    copied.running_mean.fill_(7)

    assert torch.equal(model.running_mean, torch.zeros(2))
    assert torch.equal(copied.table, torch.ones(2))
    assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("limit", [1, 10, 25, 10**6])
def test_groups_hold_every_parameter_once_and_few_elements(limit, monkeypatch):
    monkeypatch.setattr(room, "GROUP_ELEMENTS", limit)
    parameters = [torch.empty(size) for size in (5, 30, 10, 10, 5, 1, 20)]

    groups = [*room._groups(parameters)]

    assert [id(p) for group in groups for p in group] == [id(p) for p in parameters]
    assert all(len(g) == 1 or sum(len(p) for p in g) <= limit for g in groups)
    assert limit < 10**6 or len(groups) == 1
