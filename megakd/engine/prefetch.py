"""Prefetch of the shards of a frozen model from host memory, before the model's forward."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn


class Prefetch:
    """A prefetcher that copies this rank's shards to the device during other computation.

    DeepSpeed copies a shard when the forward reaches its layer, and the forward waits for the
    copy. DeepSpeed reads `ds_tensor` on any device, so this class replaces the storage of
    `ds_tensor`. Shards on the device, and models that are not sharded, are left unchanged.
    """

    def __init__(self, module: nn.Module) -> None:
        shards = (getattr(parameter, "ds_tensor", None) for parameter in module.parameters())
        self._away = [shard for shard in shards if shard is not None and is_away(shard)]
        self._host: list[Tensor] = []
        # CPUs have no streams.
        stream = _accelerator().Stream if self._away else None
        self._stream: Any = None if stream is None else stream()

    def start(self) -> None:
        """Begin to copy and return at once; do nothing if the copy has already begun."""
        if self._host:
            return
        accelerator = _accelerator()
        device = accelerator.current_device_name()
        if self._stream is not None:
            # A running forward may still read memory that the allocator is about to reuse.
            self._stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._stream):
            for shard in self._away:
                self._host.append(shard.data)
                shard.data = torch.empty_like(shard, device=device).copy_(shard, non_blocking=True)

    def wait(self) -> None:
        """Wait for the end of the copy, because DeepSpeed reads the shards on its own streams."""
        if self._host and self._stream is not None:
            self._stream.synchronize()

    def drop(self) -> None:
        """Point the shards to host memory again, and free the copies on the device."""
        for shard, host in zip(self._away, self._host, strict=False):
            shard.data = host
        self._host.clear()


def is_away(shard: Any) -> bool:
    """Return whether a shard is in host memory and the device is not the CPU."""
    return shard.device.type != _accelerator().device_name()


def _accelerator() -> Any:
    return get_accelerator()
