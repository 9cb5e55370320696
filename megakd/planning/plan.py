"""`megakd plan`: memory, network and time of a run, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from megakd.config.run import RunConfig
from megakd.planning.advice import Case, find_changes
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.ledger import PARTS, Place, Share
from megakd.planning.rehearsals import Rehearsals
from megakd.planning.sources import planned_sources
from megakd.planning.stages import phases_of
from megakd.planning.timeline import PhasePlan, Timeline

ROLES = ("teacher", "student")
SPARE = 0.05
"""Of an accelerator's memory, kept for what its allocator cannot use between blocks."""
MISCELLANY = 60_000_000
"""Beside its imports: process group, data and tokenizer, and what DeepSpeed loads at first use.

Measured on CPU ranks: 15 MB before the first model, 45 MB by the end of the first step.
"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What would make a run fit: settings of the config or of the command, tried out."""

    settings: tuple[str, ...]
    peak_bytes_per_rank: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes.

    phases: in the order of the run.
    host_base_bytes: of a rank's process before its models, libraries included.
    """

    config: RunConfig
    cluster: Cluster
    phases: Sequence[PhasePlan]
    host_base_bytes: int
    changes: Sequence[Change] = field(default_factory=tuple)

    @property
    def required(self) -> list[PhasePlan]:
        """The phases that a run cannot do without."""
        return [phase for phase in self.phases if phase.required]

    @property
    def highest(self) -> PhasePlan:
        """The phase that needs the most of a rank's device."""
        return max(self.required, key=lambda phase: phase.ledger.peaks["device"].total)

    @property
    def peak_bytes_per_rank(self) -> int:
        """Of the device, base not included."""
        return self.highest.ledger.peaks["device"].total

    @property
    def host_bytes_per_rank(self) -> int:
        """Of the host beside the base, offloaded parts and loading included."""
        return max(phase.ledger.peaks["host"].total for phase in self.required)

    @property
    def load_peak_bytes_per_rank(self) -> int:
        """Of the host beside the base, while models are built and filled."""
        return max(phase.load_peak for phase in self.required)

    @property
    def fits(self) -> bool | None:
        """Whether device and host have room; None where no memory is known."""
        rooms = [room for room in (self._device_room(), self._host_room()) if room is not None]
        return all(room >= 0 for room in rooms) if rooms else None

    @property
    def overflow(self) -> float:
        """Bytes that are missing, of the device or of a rank's share of the host."""
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
        """Of the last training: operations and network, one after the other."""
        seconds = [self.seconds_of(phase) for phase in self.phases if phase.flops]
        return seconds[-1] if seconds else None

    def seconds_of(self, phase: PhasePlan) -> float | None:
        """Of one step; None where a rate is missing."""
        rates = self.cluster.rates
        sent = sum(phase.network.values())
        if rates.tflops is None or (rates.gbps is None and sent):
            return None
        network = sent / (rates.gbps * GIGA) if rates.gbps else 0.0
        return phase.flops / (rates.tflops * 1e12) + network

    def part(self, role: str, part: str, place: Place) -> int:
        """The most that a part took in any phase."""
        share = Share(role, part, place)  # type: ignore[arg-type]
        return max(phase.ledger.most.get(share, 0) for phase in self.required)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values."""
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


def plan_run(
    config: RunConfig,
    cluster: Cluster,
    *,
    advise: bool = True,
    rehearsals: Rehearsals | None = None,
) -> Plan:
    """Plans a run; reads configs alone, and says what to change where it does not fit.

    Args:
        config: the run.
        cluster: where it is to run.
        advise: whether changes are looked for.
        rehearsals: of earlier plans, which take most of the time; None: none.

    Raises:
        MegakdError: a model's config cannot be read, or the run cannot work.
    """
    base, known = host_base_bytes(), rehearsals or Rehearsals()

    def planned(case: Case) -> Plan:
        phases = [
            Timeline(phase, case.config, case.cluster, known).play()
            for phase in phases_of(case.config, planned_sources(case.config))
        ]
        return Plan(config=case.config, cluster=case.cluster, phases=phases, host_base_bytes=base)

    case = Case(config, cluster)
    plan = planned(case)
    if plan.fits is not False or not advise:
        return plan
    changes = [
        Change(settings=other.settings, peak_bytes_per_rank=found.peak_bytes_per_rank)
        for other, found in find_changes(case, planned)
    ]
    return replace(plan, changes=changes)


def host_base_bytes() -> int:
    """What a rank's process takes before its models.

    That of this process, which has imported what a run imports, and what a run adds.
    """
    from megakd.reports import html, latency
    from megakd.training import progress, stage_run

    del html, latency, progress, stage_run
    return psutil.Process().memory_info().rss + MISCELLANY
