"""The plan of a run: what each phase takes, whether the run fits, and changes that make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import psutil

from megakd.config.deepspeed import load_ds_config, shards_within_node, zero_stage
from megakd.config.file import config_of, config_tree
from megakd.config.models import TeacherConfig
from megakd.config.run import RunConfig
from megakd.contract.tasks import STUDENT_BASE
from megakd.errors import ConfigError
from megakd.inputs.precision import training_dtype
from megakd.planning.cluster import GIGA, Cluster, Device
from megakd.planning.engine_memory import PARTS, Part, Place, Share
from megakd.planning.phase_traces import Traces
from megakd.planning.planning_lab import PlanningLab, planned_sources
from megakd.planning.timeline import PhasePlan, Timeline
from megakd.process.terminal import aligned_rows

ROLES = ("teacher", "student")
SPARE = 0.05
"""Fraction of an accelerator's memory that its allocator cannot use because of fragmentation."""
MISCELLANY = 60_000_000
"""Bytes of a process in addition to its imports: process group, data, tokenizer, DeepSpeed's code.

Measured on CPU ranks: 15 MB before the first model, 45 MB by the end of the first step.
"""
WANTED = 3
_MOST_TOGETHER = 4
_MOST_NODES = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources that a run needs.

    host_base_bytes: bytes of a rank's process before its models, libraries included.
    """

    config: RunConfig
    cluster: Cluster
    phases: Sequence[PhasePlan]
    host_base_bytes: int
    changes: Sequence[Change] = ()

    @property
    def required(self) -> list[PhasePlan]:
        return [phase for phase in self.phases if phase.required]

    @property
    def highest(self) -> PhasePlan:
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
        # Its speed is the speed of the run.
        return next((phase for phase in reversed(self.phases) if phase.flops), None)

    @property
    def seconds_per_step(self) -> float | None:
        return self.last_training and self.seconds_of(self.last_training)

    def seconds_of(self, phase: PhasePlan) -> float | None:
        """Return the seconds of a step: operations, then network; None if a rate is missing."""
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
            "changes": [change._asdict() for change in self.changes],
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
            and {"parameters": phase.pruned.parameters, "width": phase.pruned.width},
        }


def page(plan: Plan) -> str:
    """Return the text that `megakd plan` prints."""
    tables = ("\n".join(aligned_rows(rows)) for rows in (_parts(plan), _phases(plan)))
    return "\n\n".join([_head(plan), *tables, *_calls(plan), _verdict(plan)])


def _head(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    ranks = f"{cluster.ranks} rank{'s' if cluster.ranks > 1 else ''}"
    memory = ""
    if cluster.device == "cuda" and cluster.device_memory:
        memory = f" of {cluster.device_memory / GIGA:,.0f} GB"
    elif cluster.host_memory:
        memory = f", {cluster.host_memory / GIGA:,.0f} GB a node"
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    return f"{plan.config.method.name} on {ranks} ({kind}{memory}), {nodes}; GB per rank"


def _parts(plan: Plan) -> list[list[str]]:
    peak = plan.highest.ledger.peaks["device"]
    roles = sorted({share.role for share in peak.shares}, reverse=True)
    rows = [[f"{plan.highest.name}: {peak.when}", *roles]]
    for part in PARTS:
        cells = [
            sum(s for share, s in peak.shares.items() if (share.role, share.part) == (role, part))
            for role in roles
        ]
        if any(cells):
            rows.append([part, *(_gigabytes(cell) for cell in cells)])
    sums = {"kept by the C library": peak.total - sum(peak.shares.values()), "together": peak.total}
    blank = [""] * (len(roles) - 1)
    rows += [[name, _gigabytes(size), *blank] for name, size in sums.items() if size]
    return rows


def _phases(plan: Plan) -> list[list[str]]:
    head = ["phase", "peak", "at", "host", "loading", "network/step", "s/step"]
    is_pruned = any(phase.pruned for phase in plan.phases)
    rows = [[head[0], *(["width", "weights"] if is_pruned else []), *head[1:]]]
    for phase in plan.as_json()["phases"]:
        seconds, left = phase["seconds_per_step"], phase["pruned_to"]
        size = [str(left["width"]), f"{left['parameters']:,}"] if left else ["-", "-"]
        rows.append(
            [
                phase["name"] if phase["required"] else f"{phase['name']} (optional)",
                *(size if is_pruned else []),
                _gigabytes(phase["peak_bytes_per_rank"]),
                phase["peak_moment"],
                _gigabytes(phase["host_bytes_per_rank"]) if plan.cluster.device == "cuda" else "-",
                _gigabytes(phase["load_peak_bytes_per_rank"]),
                _gigabytes(phase["network_bytes_per_step"]) if phase["flops_per_step"] else "-",
                "-" if seconds is None else f"{seconds:.3g}",
            ]
        )
    return rows


def _calls(plan: Plan) -> list[str]:
    lines = [
        f"{phase.name}: {name} answers {count} micro-batches in one forward "
        f"({plan.config.key_of(name)}.micro_batches_per_call)"
        for phase in plan.phases
        for name, count in phase.per_call.items()
    ]
    for phase in plan.phases:
        if phase.forwards:
            one = plan.seconds_of(phase)
            time = "" if one is None else f", {one * phase.forwards:.3g} s together"
            lines.append(f"{phase.name}: {phase.forwards} forwards of the teacher{time}")
    return ["\n".join(lines)] if lines else []


def _verdict(plan: Plan) -> str:
    base = plan.host_base_bytes
    text = f"In addition, the process of a rank takes {_gigabytes(base)} GB of the host's memory."
    if plan.cluster.device == "cpu":
        text += f" Total: {_gigabytes(plan.peak_bytes_per_rank + base)} GB per rank."
    if plan.fits is None:
        return f"{text}\nThe plan cannot say whether the run fits; set --gpu_memory_gb."
    if plan.fits:
        return f"{text}\nThe run fits."
    text += f"\nThe run does not fit: {_gigabytes(plan.overflow)} GB per rank are missing."
    if not plan.changes:
        return f"{text} No setting that megakd tried makes the run fit."
    changes = (
        f"  {' '.join(change.settings)}  ({_gigabytes(change.peak_bytes_per_rank)} GB)"
        for change in plan.changes
    )
    return "\n".join([f"{text} Each of these changes is enough:", *changes])


def _gigabytes(size: float) -> str:
    digits = 1 if size >= 10 * GIGA else 2 if size >= GIGA else 3
    return f"{size / GIGA:,.{digits}f}"


def plan_run(
    config: RunConfig, cluster: Cluster, *, advise: bool = True, traces: Traces | None = None
) -> Plan:
    """Plan a run from configs only, and search for changes if the run does not fit."""
    if config.task.max_length is None:
        raise ConfigError(
            "task.max_length: missing, and a plan reads no data; set it to the tokens of the "
            "longest row to plan for (a run takes the length of 99 % of the training rows)"
        )
    base, known = host_base_bytes(), Traces() if traces is None else traces

    def planned(case: SizedCase) -> Plan:
        ranks, device = case.cluster.ranks, case.cluster.device
        lab = PlanningLab(case.config, planned_sources(case.config), ranks=ranks, device=device)
        phases = [Timeline(phase, case.config, case.cluster, known).play() for phase in lab.play()]
        return Plan(config=case.config, cluster=case.cluster, phases=phases, host_base_bytes=base)

    case = SizedCase(config, cluster)
    plan = planned(case)
    if plan.fits is not False or not advise:
        return plan
    return replace(plan, changes=find_changes(case, planned))


def host_base_bytes() -> int:
    """Return the bytes of this process after the imports of a run, plus `MISCELLANY`."""
    from megakd.reports import html
    from megakd.training import progress, stage_run

    del html, progress, stage_run
    return psutil.Process().memory_info().rss + MISCELLANY


class Change(NamedTuple):
    """A tested change that makes a run fit: settings of the config or of the command."""

    settings: list[str]
    peak_bytes_per_rank: int


class SizedCase(NamedTuple):
    """A variant of a run, and the settings that lead to it, as typed after the command."""

    config: RunConfig
    cluster: Cluster
    settings: tuple[str, ...] = ()

    def changed(self, settings: Iterable[str]) -> Iterator[SizedCase]:
        """Yield the case with each of some settings that the rest of the config allows."""
        for setting in settings:
            with suppress(ConfigError):
                config = config_of(config_tree(self.config), setting.split())
                yield SizedCase(config, self.cluster, (*self.settings, setting))


def find_changes(case: SizedCase, planned: Callable[[SizedCase], Plan]) -> list[Change]:
    """Return at most three ways to make a run fit, in order of increasing cost in speed.

    Single settings are tried one by one. If none is enough, the setting with the smallest remaining
    overflow is kept, and other settings are tried together with it.
    """
    changes: list[Change] = []
    for _ in range(_MOST_TOGETHER):
        rest: list[tuple[float, SizedCase]] = []
        for other in candidates(case):
            plan = planned(other)
            if plan.overflow > 0:
                rest.append((plan.overflow, other))
                continue
            changes.append(Change(list(other.settings), plan.peak_bytes_per_rank))
            if len(changes) == WANTED:
                return changes
        if changes or not rest:
            return changes
        case = min(rest, key=lambda pair: pair[0])[1]
    return changes


def candidates(case: SizedCase) -> Iterator[SizedCase]:
    """Yield single settings that save memory, in order of increasing cost in speed."""
    if case.cluster.ranks > 1:
        yield from case.changed(_sharding(case.config))
    yield from case.changed(_precision(case.config, case.cluster.device))
    nodes, ranks = 2 * case.cluster.nodes, 2 * case.cluster.ranks
    if nodes <= _MOST_NODES:
        cluster = replace(case.cluster, nodes=nodes, ranks=ranks)
        settings = (*case.settings, f"--nodes {nodes} --ranks {ranks}")
        yield SizedCase(case.config, cluster, settings)
    yield from case.changed(_activations(case.config))
    if case.cluster.device == "cuda":
        yield from case.changed(_offload(case.config))


def _owned(config: RunConfig) -> dict[str, TeacherConfig]:
    # Without a student's base, which has the student's weights and settings.
    return {n: spec for n, spec in config.teacher_specs.items() if spec.model != STUDENT_BASE}


def _of_teachers(config: RunConfig, setting: str, *, finetuned: bool = False) -> str:
    names = [n for n, spec in _owned(config).items() if spec.finetune or not finetuned]
    keys = [config.key_of(name).replace("[", ".").removesuffix("]") for name in names]
    return " ".join(f"{key}.{setting}" for key in keys)


def _sharding(config: RunConfig) -> Iterator[str]:
    specs = _owned(config).values()
    for stage in (2, 3):
        if _stage(config.student.deepspeed) < stage:
            yield f"student.deepspeed=zero{stage}"
    loaded = [load_ds_config(spec.deepspeed, where="deepspeed") for spec in specs]
    if any(zero_stage(ds) < 3 or shards_within_node(ds) for ds in loaded):
        yield _of_teachers(config, "deepspeed=teacher_zero3")
    trained = [spec.finetune for spec in specs if spec.finetune]
    if any(_stage(one.deepspeed) < 3 for one in trained):
        yield _of_teachers(config, "finetune.deepspeed=zero3", finetuned=True)


def _precision(config: RunConfig, device: Device) -> Iterator[str]:
    if training_dtype(config.train, device) == "fp32":
        yield "train.bf16=true"
    wide = {"fp32"} if device == "cuda" else {None, "fp32"}
    if any(spec.dtype in wide for spec in _owned(config).values()):
        yield _of_teachers(config, "dtype=bf16")


def _activations(config: RunConfig) -> Iterator[str]:
    train, task = config.train, config.task
    rows, tokens = train.per_device_train_batch_size, train.tokens_per_rank
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true"
    if getattr(config.method, "passes_per_backward", 1) is None:
        yield "method.passes_per_backward=1"
    if tokens is not None and tokens > task.row_length:
        yield f"train.tokens_per_rank={max(tokens // 2, task.row_length)}"
    if tokens is None and rows > 1:
        held = -(-train.gradient_accumulation_steps * rows // (rows // 2))
        fewer = f"train.per_device_train_batch_size={rows // 2}"
        yield f"{fewer} train.gradient_accumulation_steps={held}"
    if config.eval_rows() > rows:
        yield f"eval.per_device_eval_batch_size={rows}"


def _offload(config: RunConfig) -> Iterator[str]:
    for preset in ("zero2_offload", "zero3_offload"):
        if config.student.deepspeed != preset:
            yield f"student.deepspeed={preset}"
    offloaded = "teacher_zero3_offload"
    if any(spec.deepspeed != offloaded for spec in _owned(config).values()):
        yield _of_teachers(config, f"deepspeed={offloaded}")


def _stage(spec: Any) -> int:
    return zero_stage(load_ds_config(spec, where="deepspeed"))
