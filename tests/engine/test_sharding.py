"""Models on one rank: read out, opened, copied, and their shards fetched.

`tests/distributed/test_sharded_models.py` and others shard models on several.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from elastic_views import UNEVEN, family_model, logits_of
from torch import nn

from megakd.engine import sharding
from megakd.engine.sharding import (
    Prefetch,
    gathered_state,
    is_away,
    is_sharded,
    whole_model,
)
from megakd.models.elastic import Elastic
from megakd.models.views import Cut, View


def test_plain_models_are_read_out_with_ties_once_and_copied():
    model = family_model("llama", tie_word_embeddings=True)

    state = dict(gathered_state(model))

    assert not is_sharded(model)
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(state[name], parameter)
    assert state[name].data_ptr() != parameter.data_ptr()


# The copy of a module with whole weights, without ranks; tests/distributed shards its models.


def test_a_model_that_is_not_sharded_is_given_itself_in_evaluation_mode():
    model = family_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [part.training for part in model.modules()]

    with suppress(ZeroDivisionError), whole_model(model) as whole:
        assert whole is model
        assert not any(part.training for part in model.modules())
        raise ZeroDivisionError

    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize(
    ("family", "kept"), [("llama", None), ("gpt2", None), ("llama", View((2, 0, 3), (7, 0, 33)))]
)
def test_a_copy_computes_the_same_with_weights_and_buffers_of_its_own(family, kept):
    model = family_model(family, kept=kept).train()
    expected = logits_of(model.eval())

    copied = sharding._unsharded_copy(model)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()

    assert torch.equal(logits_of(copied), expected)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not any(part.training for part in copied.modules())


def test_a_copy_runs_as_the_cut_that_the_model_runs_as():
    model = family_model("llama")
    elastic = Elastic(model)
    elastic.keep(Cut(None, UNEVEN))
    expected = logits_of(model)

    copied = sharding._unsharded_copy(model)
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

    copied = sharding._unsharded_copy(model)
    copied(inputs).sum().backward()

    assert called == []
    assert copied[0].forward.args == (copied[0],)
    model(inputs)
    assert called


# Shards that wait in the host's memory are on the device when they are asked for.


def sharded() -> nn.Module:
    """Two parameters with shards as DeepSpeed hangs them on, and one that is whole."""
    module = nn.ParameterDict({name: nn.Parameter(torch.empty(0)) for name in ("a", "b", "whole")})
    for index, name in enumerate(("a", "b")):
        shard: Any = torch.arange(3.0) + index
        shard.final_location = OffloadDeviceEnum.cpu
        module[name].ds_tensor = shard
    return module


def places(module: nn.Module) -> list[int]:
    return [p.ds_tensor.data_ptr() for p in module.parameters() if hasattr(p, "ds_tensor")]


def values(module: nn.Module) -> list[list[float]]:
    return [p.ds_tensor.tolist() for p in module.parameters() if hasattr(p, "ds_tensor")]


@pytest.fixture
def away(monkeypatch) -> nn.Module:
    """A module whose shards count as lying elsewhere, though the device is a CPU."""
    monkeypatch.setattr(sharding, "is_away", lambda shard: True)
    return sharded()


def test_shards_are_copied_once_and_come_back_where_they_were(away):
    host, before = places(away), values(away)
    fetched = Prefetch(away)

    fetched.start()
    there = places(away)
    fetched.start()
    fetched.wait()

    assert set(there).isdisjoint(host)
    assert places(away) == there
    assert values(away) == before
    # What DeepSpeed has hung on a shard stays.
    assert away["a"].ds_tensor.final_location == OffloadDeviceEnum.cpu
    fetched.drop()
    fetched.drop()
    assert places(away) == host
    assert values(away) == before


def test_shards_are_away_only_in_the_memory_of_the_host_beside_another_device(monkeypatch):
    module = sharded()
    before = places(module)

    Prefetch(module).start()

    assert places(module) == before
    elsewhere = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr(sharding, "get_accelerator", lambda: elsewhere)
    assert is_away(module["a"].ds_tensor)


# Weights that are not finite, whole and in shards; runs with such are in tests/run.


@pytest.mark.parametrize(
    ("bad", "dtype"), [(torch.nan, torch.bfloat16), (-torch.inf, torch.float32)]
)
def test_one_bad_number_is_found_whatever_the_dtype(bad, dtype, monkeypatch):
    monkeypatch.setattr(sharding, "gather", lambda value: [value])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)

    assert sharding.names_of_bad_weights(model) == []
    with torch.no_grad():
        model[1].weight[1, 2] = bad
    assert sharding.names_of_bad_weights(model) == ["1.weight"]


def test_the_padding_of_a_shard_does_not_count(monkeypatch):
    shard = torch.tensor([1.0, 2.0, torch.nan])
    shard.status = type("Status", (), {"name": "AVAILABLE"})
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = shard, 5, None
    monkeypatch.setattr(sharding, "is_zero_param", lambda _: True)

    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 1)
    assert sharding._own_part(parameter).tolist() == [1.0, 2.0]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 2)
    assert sharding._own_part(parameter).tolist() == []
