"""The plan of a run: what each phase takes, where the peak is, and whether the run fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megakd.config.run import RunConfig
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.ledger import PARTS, Place, Share
from megakd.planning.timeline import PhasePlan

ROLES = ("teacher", "student")
SPARE = 0.05
"""Fraction of an accelerator's memory that its allocator cannot use because of fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tested change that makes a run fit: settings of the config or of the command."""

    settings: tuple[str, ...]
    peak_bytes_per_rank: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources that a run needs.

    phases: in the order of the run.
    host_base_bytes: bytes of a rank's process before its models, libraries included.
    """

    config: RunConfig
    cluster: Cluster
    phases: Sequence[PhasePlan]
    host_base_bytes: int
    changes: Sequence[Change] = field(default_factory=tuple)

    @property
    def required(self) -> list[PhasePlan]:
        """The phases that are required for the run."""
        return [phase for phase in self.phases if phase.required]

    @property
    def highest(self) -> PhasePlan:
        """The required phase with the highest device memory of a rank."""
        return max(self.required, key=lambda phase: phase.ledger.peaks["device"].total)

    @property
    def peak_bytes_per_rank(self) -> int:
        """Peak bytes of the device, without the base."""
        return self.highest.ledger.peaks["device"].total

    @property
    def host_bytes_per_rank(self) -> int:
        """Peak bytes of the host without the base, with offloaded parts and loading."""
        return max(phase.ledger.peaks["host"].total for phase in self.required)

    @property
    def load_peak_bytes_per_rank(self) -> int:
        """Peak bytes of the host without the base, while models are built and loaded."""
        return max(phase.load_peak for phase in self.required)

    @property
    def fits(self) -> bool | None:
        """True if device and host have enough memory; None if no memory size is known."""
        rooms = [room for room in (self._device_room(), self._host_room()) if room is not None]
        return all(room >= 0 for room in rooms) if rooms else None

    @property
    def overflow(self) -> float:
        """Missing bytes of the device, or of a rank's share of the host."""
        host = self._host_room()
        rooms = [self._device_room(), None if host is None else host / self.cluster.ranks_per_node]
        return max((-room for room in rooms if room is not None), default=0.0)

    def _device_room(self) -> float | None:
        cluster = self.cluster
        if cluster.device_memory is None or cluster.device == "cpu":
            return None
        usable = cluster.device_memory * (1 - SPARE) - cluster.device_base
        return usable - self.peak_bytes_per_rank

    def _host_room(self) -> float | None:
        cluster = self.cluster
        if cluster.host_memory is None:
            return None
        per_rank = self.host_base_bytes + self.host_bytes_per_rank
        return cluster.host_memory - cluster.ranks_per_node * per_rank

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step of the last training: operations, then network, without overlap."""
        seconds = [self.seconds_of(phase) for phase in self.phases if phase.flops]
        return seconds[-1] if seconds else None

    def seconds_of(self, phase: PhasePlan) -> float | None:
        """Return the seconds of one step, or None if a rate is missing."""
        rates = self.cluster.rates
        sent = sum(phase.network.values())
        if rates.tflops is None or (rates.gbps is None and sent):
            return None
        network = sent / (rates.gbps * GIGA) if rates.gbps else 0.0
        return phase.flops / (rates.tflops * 1e12) + network

    def part(self, role: str, part: str, place: Place) -> int:
        """Return the most bytes that a part needs in any required phase."""
        share = Share(role, part, place)  # type: ignore[arg-type]
        return max(phase.ledger.most.get(share, 0) for phase in self.required)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        places: tuple[Place, ...] = ("device",)
        if self.cluster.device == "cpu":
            places = ("device", "host")
        roles = {
            role: {part: sum(self.part(role, part, p) for p in places) for part in PARTS}
            for role in ROLES
        }
        return {
            "ranks": self.cluster.ranks,
            "nodes": self.cluster.nodes,
            "device": self.cluster.device,
            "roles": roles,
            "peak_bytes_per_rank": self.peak_bytes_per_rank,
            "peak_phase": self.highest.name,
            "peak_moment": self.highest.ledger.peaks["device"].when,
            "load_peak_bytes_per_rank": self.load_peak_bytes_per_rank,
            "host_base_bytes": self.host_base_bytes,
            "host_bytes_per_rank": self.host_bytes_per_rank,
            "device_memory_bytes": self.cluster.device_memory,
            "host_memory_bytes": self.cluster.host_memory,
            "network_bytes_per_step": round(sum(self._last_network().values())),
            "seconds_per_step": self.seconds_per_step,
            "fits": self.fits,
            "changes": [_change_json(change) for change in self.changes],
            "phases": [self._phase_json(phase) for phase in self.phases],
        }

    def _last_network(self) -> Mapping[str, float]:
        trained = [phase.network for phase in self.phases if phase.flops]
        return trained[-1] if trained else {}

    def _phase_json(self, phase: PhasePlan) -> dict[str, Any]:
        peak = phase.ledger.peaks["device"]
        return {
            "name": phase.name,
            "required": phase.required,
            "peak_bytes_per_rank": peak.total,
            "peak_moment": peak.when,
            "load_peak_bytes_per_rank": phase.load_peak,
            "host_bytes_per_rank": phase.ledger.peaks["host"].total,
            "network_bytes_per_step": round(sum(phase.network.values())),
            "flops_per_step": phase.flops,
            "seconds_per_step": self.seconds_of(phase) if phase.flops else None,
        }


def _change_json(change: Change) -> dict[str, Any]:
    settings = list(change.settings)
    return {"settings": settings, "peak_bytes_per_rank": change.peak_bytes_per_rank}
