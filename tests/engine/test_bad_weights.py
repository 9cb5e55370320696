"""Weights that are not finite, whole and in shards; runs with such are in tests/run."""

from __future__ import annotations

import pytest
import torch

from megakd.engine import sharding


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
