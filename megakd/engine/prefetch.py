"""Shards of a frozen model that waits in the host's memory, fetched before they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import Tensor, nn


class Prefetch:
    """Copies this rank's shards to the device while something else computes, and lets them go.

    DeepSpeed moves a shard when its layer is reached, and the forward waits for it. It reads
    `ds_tensor` wherever that lies, so here the storage behind it is exchanged. Shards on the
    device, on a disk, or of a model that is not sharded stay as they are.

    Args:
        module: what the engine owns, initialised.
    """

    def __init__(self, module: nn.Module) -> None:
        shards = (getattr(parameter, "ds_tensor", None) for parameter in module.parameters())
        self._away = [shard for shard in shards if shard is not None and is_away(shard)]
        self._host: list[Tensor] = []
        # On a CPU there are no streams.
        stream = _accelerator().Stream if self._away else None
        self._stream: Any = None if stream is None else stream()

    def start(self) -> None:
        """Begins to copy; returns at once. Nothing if they are there, or on their way."""
        if self._host:
            return
        accelerator = _accelerator()
        device = accelerator.current_device_name()
        if self._stream is not None:
            # A forward in flight may still read what the allocator is about to give out again.
            self._stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._stream):
            for shard in self._away:
                self._host.append(shard.data)
                shard.data = torch.empty_like(shard, device=device).copy_(shard, non_blocking=True)

    def wait(self) -> None:
        """Until what was begun has arrived; DeepSpeed reads it from streams of its own."""
        if self._host and self._stream is not None:
            self._stream.synchronize()

    def drop(self) -> None:
        """The shards are the host's again; what the device held is free."""
        for shard, host in zip(self._away, self._host, strict=False):
            shard.data = host
        self._host.clear()


def is_away(shard: Any) -> bool:
    """Whether a shard lies in the host's memory, and the device is another place."""
    on_disk = shard.final_location == OffloadDeviceEnum.nvme
    return not on_disk and shard.device.type != _accelerator().device_name()


def _accelerator() -> Any:
    return get_accelerator()
