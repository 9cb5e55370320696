"""The machines that a run is planned for, and their rates."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megakd.errors import ConfigError

Device = Literal["cpu", "cuda"]
GIGA = 10**9


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured or given rates; None if unknown. Without a needed rate no time is planned.

    tflops: rate of a rank in matrix products, 1e12 operations per second.
    gbps: rate at which a rank sends and receives simultaneously, 1e9 bytes per second.
    """

    tflops: float | None = None
    gbps: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("tflops", self.tflops), ("gbps", self.gbps)):
            if value is not None and not (type(value) in {int, float} and 0 < value < math.inf):
                raise ConfigError(f"the rate {name} must be a finite number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Ranks on nodes.

    device_memory: bytes of a rank's accelerator; on a CPU the rank's share of the node's memory.
    host_memory: bytes of a node; None: unknown and not checked.
    device_base: bytes of an accelerator that are in use before the first tensor.
    """

    ranks: int = 1
    nodes: int = 1
    device: Device = "cpu"
    device_memory: int | None = None
    host_memory: int | None = None
    device_base: int = 0
    rates: Rates = Rates()

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("nodes", self.nodes)):
            if value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        if self.ranks % self.nodes:
            raise ConfigError(
                f"{self.ranks} ranks cannot be divided equally between {self.nodes} nodes; --ranks "
                "is the number of all ranks and must be a multiple of --nodes"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


def rates_of(path: Path) -> Rates:
    """Load rates from a JSON file such as {"tflops": 400, "gbps": 45}."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the rates in {path} cannot be read: {error}") from error
    if not isinstance(tree, dict) or not set(tree) <= {"tflops", "gbps"}:
        raise ConfigError(
            f'{path}: must hold a mapping such as {{"tflops": 400, "gbps": 45}}, got {tree!r}'
        )
    return Rates(**tree)
