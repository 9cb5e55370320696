"""The plan of a run: what each phase takes, and whether the run fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import psutil

from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.engine_memory import PARTS, Part, Peak, Place, Share
from megakd.planning.planning_lab import PlanningLab, planned_sources
from megakd.planning.timeline import PhasePlan, Timeline
from megakd.process.terminal import aligned_rows

ROLES = ("teacher", "student")
_SPARE = 0.05
"""Fraction of an accelerator's memory that its allocator cannot use because of fragmentation."""
_CONTEXT = 1_500_000_000
"""Bytes of a GPU for its context and the NCCL buffers; assumed, not measured."""
_DATA, _WORK = 65_000_000, 100_000_000
"""Bytes of a process beside its imports: data, tokenizer and process group; then what steps,
scoring and the report add. Measured in two small runs on two CPU ranks.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources that a run needs.

    process_bytes: bytes of a rank's process without models, which count in the host's peaks.
    """

    config: RunConfig
    cluster: Cluster
    phases: Sequence[PhasePlan]
    process_bytes: int

    @property
    def highest(self) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.ledger.peaks["device"].total)

    @property
    def peak(self) -> Peak:
        """The peak of the device: of a GPU what its allocator holds, as in the report."""
        return self.highest.ledger.peaks["device"]

    @property
    def peak_bytes_per_rank(self) -> int:
        return self.peak.total

    @property
    def host_bytes_per_rank(self) -> int:
        """Peak bytes of the host, with offloaded parts and loading."""
        return max(phase.ledger.peaks["host"].total for phase in self.phases)

    @property
    def rooms(self) -> list[float]:
        """Free bytes of the device, and of a rank's share of the host, where a size is known."""
        cluster, rooms = self.cluster, []
        if cluster.device == "cuda" and cluster.device_memory is not None:
            usable = cluster.device_memory * (1 - _SPARE) - _CONTEXT
            rooms.append(usable - self.peak.total)
        if cluster.host_memory is not None:
            rooms.append(cluster.host_memory / cluster.ranks_per_node - self.host_bytes_per_rank)
        return rooms

    @property
    def fits(self) -> bool | None:
        """True if device and host have enough memory; None if no memory size is known."""
        return all(room >= 0 for room in self.rooms) if self.rooms else None

    @property
    def last_training(self) -> PhasePlan | None:
        """The phase whose speed is the speed of the run."""
        phases = (p for p in reversed(self.phases) if p.flops and not p.forwards)
        return next(phases, None)

    def part(self, role: str, part: Part) -> int:
        """Return the most bytes of the device that a part needs in any phase."""
        # A CPU has one memory.
        places: tuple[Place, ...] = get_args(Place) if self.cluster.device == "cpu" else ("device",)
        return sum(
            max(phase.ledger.most[Share(role, part, place)] for phase in self.phases)
            for place in places
        )

    def as_json(self) -> dict[str, Any]:
        last, cluster = self.last_training, self.cluster
        return {
            "ranks": cluster.ranks,
            "nodes": cluster.nodes,
            "device": cluster.device,
            "roles": {role: {part: self.part(role, part) for part in PARTS} for role in ROLES},
            "process_bytes": self.process_bytes,
            "peak_bytes_per_rank": self.peak_bytes_per_rank,
            "peak_phase": self.highest.name,
            "peak_moment": self.peak.when,
            "load_peak_bytes_per_rank": max(phase.load_peak for phase in self.phases),
            "host_bytes_per_rank": self.host_bytes_per_rank,
            "network_bytes_per_step": round(last.network) if last else 0,
            "seconds_per_step": last and last.seconds(cluster),
            "fits": self.fits,
            "phases": [
                {
                    "name": phase.name,
                    "peak_bytes_per_rank": phase.ledger.peaks["device"].total,
                    "peak_moment": phase.ledger.peaks["device"].when,
                    "load_peak_bytes_per_rank": phase.load_peak,
                    "host_bytes_per_rank": phase.ledger.peaks["host"].total,
                    "network_bytes_per_step": round(phase.network),
                    "flops_per_step": phase.flops,
                    "forwards": phase.forwards,
                    "forwards_per_rows": phase.per_rows,
                    "seconds_per_step": phase.seconds(cluster),
                    "micro_batches_per_call": phase.per_call,
                }
                for phase in self.phases
            ],
        }


def plan_run(config: RunConfig, cluster: Cluster, *, process: int | None = None) -> Plan:
    """Plan a run from configs only; `process`: its bytes before models, if they are known."""
    if config.task.max_length is None:
        raise ConfigError(
            "task.max_length: missing, and a plan reads no data; set it to the tokens of the "
            "longest row to plan for (a run takes the length of 99 % of the training rows)"
        )
    process = process_bytes() if process is None else process
    ranks, device = cluster.ranks, cluster.device
    lab = PlanningLab(config, planned_sources(config), ranks=ranks, device=device)
    phases = [Timeline(phase, config, cluster, process).play() for phase in lab.play()]
    return Plan(config=config, cluster=cluster, phases=phases, process_bytes=process)


def process_bytes(*, has_data: bool = False) -> int:
    """Return the bytes of a run's process without models, from this process with its imports."""
    from megakd.reports import html
    from megakd.training import progress, stage_run

    del html, progress, stage_run
    return psutil.Process().memory_info().rss + _WORK + (0 if has_data else _DATA)


def page(plan: Plan) -> str:
    """Return the text that `megakd plan` prints."""
    cluster, peak = plan.cluster, plan.peak
    kind, memory, of = "CPU", cluster.host_memory, " a node"
    if cluster.device == "cuda":
        kind, memory, of = "GPU", cluster.device_memory, ""
    size = f" of {memory / GIGA:,.0f} GB{of}" if memory else ""
    head = f"{plan.config.method.name}: {cluster.ranks} ranks ({kind}{size}), {cluster.nodes} nodes"
    roles = sorted({share.role for share in peak.shares}, reverse=True)
    parts = [[f"{plan.highest.name}: {peak.when}", *roles]]
    for part in PARTS:
        cells = [
            sum(n for share, n in peak.shares.items() if (share.role, share.part) == (role, part))
            for role in roles
        ]
        if any(cells):
            parts.append([part, *map(gigabytes, cells)])
    process = plan.process_bytes if cluster.device == "cpu" else 0
    rest = peak.total - process - sum(peak.shares.values())
    sums = {"kept by the C library": rest, "process": process, "together": peak.total}
    parts += [[name, gigabytes(n), *[""] * (len(roles) - 1)] for name, n in sums.items() if n]
    rows = [["phase", "peak", "at", "host", "loading", "network/step", "s/step"]]
    lines = []
    for phase in plan.phases:
        device, seconds = phase.ledger.peaks["device"], phase.seconds(cluster)
        times = "-" if seconds is None else " to ".join(f"{one:.3g}" for one in seconds)
        rows.append(
            [
                *(phase.name, gigabytes(device.total), device.when),
                gigabytes(phase.ledger.peaks["host"].total) if cluster.device == "cuda" else "-",
                *(gigabytes(phase.load_peak), gigabytes(phase.network) if phase.flops else "-"),
                times,
            ]
        )
        lines += [
            f"{phase.name}: {name} answers {count} micro-batches in one forward "
            f"({plan.config.key_of(name)}.joins_micro_batches)"
            for name, count in phase.per_call.items()
        ]
        if phase.forwards:
            each = f" for every {phase.per_rows} rows" if phase.per_rows else ""
            lines.append(f"{phase.name}: {phase.forwards} forwards of a rank{each}")
    tables = ["\n".join(aligned_rows(table)) for table in (parts, rows)]
    return "\n\n".join([f"{head}; GB per rank", *tables, "\n".join([*lines, _verdict(plan)])])


def _verdict(plan: Plan) -> str:
    missing = max((-room for room in plan.rooms), default=0)
    if plan.fits is None:
        return "The plan cannot say whether the run fits; set --gpu_memory_gb."
    if plan.fits:
        return "The run fits."
    return (
        f"The run does not fit: {gigabytes(missing)} GB per rank are missing. Shard more "
        "(student.deepspeed, teacher.deepspeed), learn in bf16, take more nodes, fewer rows at a "
        "time or train.gradient_checkpointing, or offload to the host."
    )


def gigabytes(size: float) -> str:
    """Return a size as digits of 1e9 bytes."""
    digits = 1 if size >= 10 * GIGA else 2 if size >= GIGA else 3
    return f"{size / GIGA:,.{digits}f}"
