"""Shards that wait in the host's memory are on the device when they are asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import nn

from megakd.engine import sharding
from megakd.engine.sharding import Prefetch, is_away


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
