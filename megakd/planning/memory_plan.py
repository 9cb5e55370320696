"""The plan of a run: what each phase takes, where the peak is, and whether the run fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from megakd.config.run import RunConfig
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.ledger import PARTS, Part, Place, Share
from megakd.planning.timeline import PhasePlan

ROLES = ("teacher", "student")
SPARE = 0.05
"""Fraction of an accelerator's memory that its allocator cannot use because of fragmentation."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A tested change that makes a run fit: settings of the config or of the command."""

    settings: list[str]
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
    changes: Sequence[Change] = ()

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
    def rooms(self) -> list[float]:
        """Free bytes of the device, and of a rank's share of the host, where a size is known."""
        cluster, rooms = self.cluster, []
        if cluster.device == "cuda" and cluster.device_memory is not None:
            usable = cluster.device_memory * (1 - SPARE) - cluster.device_base
            rooms.append(usable - self.peak_bytes_per_rank)
        if cluster.host_memory is not None:
            taken = cluster.ranks_per_node * (self.host_base_bytes + self.host_bytes_per_rank)
            rooms.append((cluster.host_memory - taken) / cluster.ranks_per_node)
        return rooms

    @property
    def fits(self) -> bool | None:
        """True if device and host have enough memory; None if no memory size is known."""
        return all(room >= 0 for room in self.rooms) if self.rooms else None

    @property
    def overflow(self) -> float:
        """Missing bytes of the device, or of a rank's share of the host."""
        return max((-room for room in self.rooms), default=0.0)

    @property
    def last_training(self) -> PhasePlan | None:
        """The last phase that trains; its speed is the speed of the run."""
        return next((phase for phase in reversed(self.phases) if phase.flops), None)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step of the last training."""
        return self.last_training and self.seconds_of(self.last_training)

    def seconds_of(self, phase: PhasePlan) -> float | None:
        """Return the seconds of a step: operations, then network, without overlap.

        The result is None if the phase does not train, or if a rate is missing.
        """
        rates = self.cluster.rates
        if not phase.flops or rates.tflops is None or (rates.gbps is None and phase.sent):
            return None
        network = phase.sent / (rates.gbps * GIGA) if rates.gbps else 0.0
        return phase.flops / (rates.tflops * 1e12) + network

    def part(self, role: str, part: Part) -> int:
        """Return the most bytes of the device that a part needs in any required phase."""
        # A CPU has one memory.
        places: tuple[Place, ...] = get_args(Place) if self.cluster.device == "cpu" else ("device",)
        return sum(
            max(phase.ledger.most[Share(role, part, place)] for phase in self.required)
            for place in places
        )

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        last = self.last_training
        return {
            "ranks": self.cluster.ranks,
            "nodes": self.cluster.nodes,
            "device": self.cluster.device,
            "roles": {role: {part: self.part(role, part) for part in PARTS} for role in ROLES},
            "peak_bytes_per_rank": self.peak_bytes_per_rank,
            "peak_phase": self.highest.name,
            "peak_moment": self.highest.ledger.peaks["device"].when,
            "load_peak_bytes_per_rank": self.load_peak_bytes_per_rank,
            "host_base_bytes": self.host_base_bytes,
            "host_bytes_per_rank": self.host_bytes_per_rank,
            "device_memory_bytes": self.cluster.device_memory,
            "host_memory_bytes": self.cluster.host_memory,
            "network_bytes_per_step": round(last.sent) if last else 0,
            "seconds_per_step": self.seconds_per_step,
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "phases": [self._phase_json(phase) for phase in self.phases],
        }

    def _phase_json(self, phase: PhasePlan) -> dict[str, Any]:
        peak = phase.ledger.peaks["device"]
        return {
            "name": phase.name,
            "required": phase.required,
            "peak_bytes_per_rank": peak.total,
            "peak_moment": peak.when,
            "load_peak_bytes_per_rank": phase.load_peak,
            "host_bytes_per_rank": phase.ledger.peaks["host"].total,
            "network_bytes_per_step": round(phase.sent),
            "flops_per_step": phase.flops,
            "forwards": phase.forwards,
            "seconds_per_step": self.seconds_of(phase),
            "micro_batches_per_call": phase.per_call,
            "pruned_to": phase.pruned
            and {
                "parameters": phase.pruned.parameters,
                "width": phase.pruned.width,
            },
        }
