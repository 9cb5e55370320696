"""The machines that a run is planned for, and their rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megakd.errors import ConfigError

Device = Literal["cpu", "cuda"]
GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks on nodes.

    device_memory: bytes of a GPU; None: unknown.
    host_memory: bytes of a node; None: unknown and not checked.
    tflops: 1e12 operations per second of a rank in matrix products; None: no time is planned.
    gbps: 1e9 bytes per second that a rank sends within a node, and between nodes.
    """

    ranks: int = 1
    nodes: int = 1
    device: Device = "cpu"
    device_memory: int | None = None
    host_memory: int | None = None
    tflops: float | None = None
    gbps: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.ranks % self.nodes:
            raise ConfigError(
                f"{self.ranks} ranks cannot be divided equally between {self.nodes} nodes; --ranks "
                "is the number of all ranks and must be a multiple of --nodes"
            )
        for name, values in (("tflops", (self.tflops,)), ("gbps", self.gbps or ())):
            for value in values:
                if value is not None and not 0 < value < math.inf:
                    raise ConfigError(f"--{name} must be finite and above 0, got {value}")

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes
