"""Sharded models on two ranks, and what of it holds on one rank: copies, reading out, fetching."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from elastic_views import UNEVEN, family_model, logits_of
from forked_ranks import start_rank
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from megakd.contract.views import Cut
from megakd.engine import sharding
from megakd.engine.distributed import free_port
from megakd.engine.sharding import (
    Prefetch,
    evaluating,
    gathered,
    gathered_state,
    is_away,
    is_sharded,
    sharded_construction,
    whole_model,
    writes_here,
)
from megakd.models.elastic import Elastic

PROGRAM = Path(__file__).with_name("sharding_ranks.py")
# A start takes seconds; many times that on a busy machine.
TIMEOUT_S = 240
SIZES = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 32}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
BERT = {"model_type": "bert", **SIZES}


def tiny_llama():
    return LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(tiny_llama()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(llama_folder, tmp_path_factory):
    """The results of both ranks, from one start."""
    output = tmp_path_factory.mktemp("ranks")
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    logs = [output / f"log{rank}.txt" for rank in range(2)]
    started = [
        start_rank(
            [str(PROGRAM), str(llama_folder), json.dumps(BERT), str(output)],
            variables={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=log,
        )
        for rank, log in enumerate(logs)
    ]
    for rank in started:
        rank.join(TIMEOUT_S)
    codes = [rank.exitcode for rank in started]
    for rank in started:
        rank.kill()
        rank.join()
    assert codes == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(output / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("how", ["sharded", "offloaded", "plain"])
def test_loaded_weights_read_out_whole_are_those_of_the_file(ranks, llama_folder, how):
    state = ranks[0][f"loaded/{how}"]

    stored = load_file(llama_folder / "model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert ranks[0][f"is_sharded/{how}"] == (how != "plain")


def test_the_other_rank_reads_nothing_out_but_takes_part(ranks):
    state = ranks[1]["loaded/sharded"]

    assert state.keys() == ranks[0]["loaded/sharded"].keys()
    assert all(value.numel() == 0 for value in state.values())


def test_each_rank_holds_half_and_a_tied_head_once(ranks, llama_folder):
    total = sum(value.numel() for value in load_file(llama_folder / "model.safetensors").values())

    assert [rank["shards"] for rank in ranks] == [(total // 2, total)] * 2
    assert ranks[0]["tied"]


def test_a_sharded_bf16_model_keeps_its_rotary_tables_in_fp32(ranks, llama_folder):
    reference = AutoModelForCausalLM.from_pretrained(llama_folder).model.rotary_emb.inv_freq

    assert ranks[0]["dtypes"] == {torch.bfloat16}
    assert torch.equal(ranks[0]["rotary"], reference)


def test_loading_one_model_never_changes_how_the_next_loads(ranks):
    expected = {
        "plain after sharded": False,
        "plain under the switch": False,
        "switch still set": True,
        "sharded after plain": True,
        "switch unset": True,
    }

    assert [{key: rank[key] for key in expected} for rank in ranks] == [expected, expected]


def test_a_sharded_teacher_answers_as_transformers_loads_it(ranks, llama_folder):
    reference = AutoModelForCausalLM.from_pretrained(llama_folder)
    expected = reference(torch.arange(2, 26).reshape(2, 12)).logits

    torch.testing.assert_close(ranks[0]["logits"], expected, rtol=0, atol=1e-6)
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])


def test_opening_leaves_what_is_open_to_its_owner(ranks):
    result = ranks[1]

    assert result["closed"] == 0
    assert result["open"] == (300, 16)
    assert result["inner"] == (300 * 16, 16)
    assert result["after inner"] == ((300, 16), 0)
    assert torch.equal(result["plain"], torch.ones(3))


def test_what_rank_0_writes_goes_to_all_ranks_and_each_rank_sets_its_part_of_values(ranks):
    for rank in ranks:
        assert torch.equal(rank["modified"], torch.full((16,), 10.0))
        assert torch.equal(rank["set closed"], torch.arange(16.0))


def test_weights_are_loaded_and_drawn_without_sending_any(ranks):
    assert [rank["sent"] for rank in ranks] == [0, 0]


def test_ranks_that_would_read_other_weights_are_told(ranks):
    for rank in ranks:
        assert re.match(
            r"teacher.model: \S+ holds other weights for rank 1 on \S+ than for rank 0 on ",
            rank["other files"],
        )


# One process, nothing sharded: everything is a formality that must not get in the way.


def test_plain_models_are_read_out_with_ties_once_and_copied():
    model = AutoModelForCausalLM.from_config(tiny_llama())

    state = dict(gathered_state(model))

    assert not is_sharded(model)
    assert state.keys() == model.state_dict().keys() - {"lm_head.weight"}
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(state[name], parameter)
    assert state[name].data_ptr() != parameter.data_ptr()


@pytest.mark.parametrize("modify", [False, True])
def test_opening_plain_parameters_does_nothing(modify):
    parameter = torch.nn.Parameter(torch.zeros(2))

    with gathered([parameter], modify=modify), torch.no_grad():
        parameter.add_(1.0)

    assert torch.equal(parameter, torch.ones(2))
    assert writes_here(parameter)


@pytest.mark.parametrize("ds", [None, {}, {"zero_optimization": {"stage": 2}}])
def test_modules_built_for_other_stages_are_plain(ds):
    with sharded_construction(ds, torch.float32):
        module = torch.nn.Linear(2, 2)

    assert not is_sharded(module)


# The copy of a module with whole weights, without ranks; tests/distributed shards its models.


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

    copied = sharding._unsharded_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()

    assert torch.equal(logits_of(copied), expected)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not any(part.training for part in copied.modules())


def test_tied_weights_are_tied_in_a_copy():
    model = family_model("llama", tie_word_embeddings=True)

    copied = sharding._unsharded_copy(model)

    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert len([*copied.parameters()]) == len([*model.parameters()])


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


def test_buffers_are_copied_and_stay_out_of_the_state_if_they_were():
    model = nn.BatchNorm1d(2)
    model.register_buffer("table", torch.ones(2), persistent=False)

    copied = sharding._unsharded_copy(model)
    copied.running_mean.fill_(7)

    assert torch.equal(model.running_mean, torch.zeros(2))
    assert torch.equal(copied.table, torch.ones(2))
    assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("limit", [1, 10, 25, 10**6])
def test_groups_hold_every_parameter_once_and_few_elements(limit, monkeypatch):
    monkeypatch.setattr(sharding, "GROUP_ELEMENTS", limit)
    parameters = [torch.empty(size) for size in (5, 30, 10, 10, 5, 1, 20)]

    groups = [*sharding._groups(parameters)]

    assert [id(p) for group in groups for p in group] == [id(p) for p in parameters]
    assert all(len(g) == 1 or sum(len(p) for p in g) <= limit for g in groups)
    assert limit < 10**6 or len(groups) == 1


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
    fetched.drop()
    fetched.drop()
    assert places(away) == host
    assert values(away) == before


def test_what_deepspeed_has_hung_on_a_shard_stays(away):
    Prefetch(away).start()

    assert away["a"].ds_tensor.final_location == OffloadDeviceEnum.cpu


def test_shards_on_the_device_stay_where_they_are():
    module = sharded()
    before = places(module)

    Prefetch(module).start()

    assert places(module) == before


def test_a_shard_in_the_hosts_memory_is_away_from_another_device(monkeypatch):
    class Elsewhere:
        def device_name(self) -> str:
            return "cuda"

    monkeypatch.setattr(sharding, "get_accelerator", Elsewhere)

    assert is_away(next(sharded().parameters()).ds_tensor)
