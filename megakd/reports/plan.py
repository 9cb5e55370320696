"""The plan of a run: its machines, what each phase takes on a rank, and whether the run fits."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from megakd.config.deepspeed import frozen_on, load_ds_config, shards_within_node
from megakd.config.run import RunConfig
from megakd.config.task import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.errors import ConfigError
from megakd.models.architectures import stated
from megakd.models.model_folder import SHARD_BYTES
from megakd.models.quantized import bytes_per_weight, check_whole, fp8_bytes
from megakd.process.terminal import aligned_rows
from megakd.reports.plan_memory import (
    FP32,
    PARTS,
    PLACES,
    Engine,
    Holding,
    Ledger,
    Part,
    Share,
    blocks,
)
from megakd.reports.plan_phases import Phase, PlannedWork, planned_phases, planned_sources
from megakd.reports.plan_tracing import Device, PhaseTraces, Trace, planned_dtype
from megakd.stage import Stage
from megakd.training.facts import RunFacts
from megakd.training.learners import learner_ds
from megakd.training.precision import TORCH_DTYPE, largest_step, training_dtype

GIGA = 10**9
MOMENTS = {"adamw": 2, "sgd": 0}
ROLES = ("teacher", "student")
_SPARE = 0.05
"""Fraction of an accelerator's memory that its allocator cannot use because of fragmentation."""
_CONTEXT = 1_500_000_000
"""Bytes of a GPU for its context and the NCCL buffers; assumed, not measured."""
_DATA, _WORK = 65_000_000, 100_000_000
"""Bytes of a process beside its imports: data, tokenizer and process group; then what steps,
scoring and the report add. Measured in two small runs on two CPU ranks.
"""
NOTHING: Holding = Counter()
# Logits of one position, the logits of the sampling rules, the noise, and their sum.
_LOGIT_BUFFERS = 4


@dataclass(frozen=True)
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

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes


def cluster_of(options: Mapping[str, Any]) -> Cluster:
    """Return the machines that options describe; defaults come from this machine.

    Raises:
        ConfigError: a number is out of range, or two options contradict each other.
    """
    names = ("nodes", "ranks", "gpu_memory_gb", "host_memory_gb", "tflops", "gbps")
    numbers = {name: options[name] for name in names if options.get(name) is not None}
    try:
        rates = tuple(map(float, str(numbers.pop("gbps", "1")).split(",")))
        within, between = rates * 2 if len(rates) == 1 else rates
    except ValueError:
        raise ConfigError(
            f"--gbps must be one or two numbers as in 400,45, got {options['gbps']}"
        ) from None
    for name, value in (*numbers.items(), ("gbps", within), ("gbps", between)):
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name} must be a finite number above 0, got {value:g}")
    memory, host = (
        round(numbers[name] * GIGA) if name in numbers else None
        for name in ("gpu_memory_gb", "host_memory_gb")
    )
    has_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    device: Device = options.get("device") or ("cuda" if memory or has_gpu else "cpu")
    if device == "cpu" and memory is not None:
        raise ConfigError("--gpu_memory_gb cannot be used with --device cpu; remove one of the two")
    if device == "cuda" and memory is None and has_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    if device == "cpu" and host is None:
        host = psutil.virtual_memory().total
    nodes = numbers.get("nodes", 1)
    ranks = numbers.get("ranks", (8 if device == "cuda" else 1) * nodes)
    if ranks % nodes:
        raise ConfigError(
            f"{ranks} ranks cannot be divided equally between {nodes} nodes; --ranks is the number "
            "of all ranks and must be a multiple of --nodes"
        )
    gbps = None if options.get("gbps") is None else (within, between)
    return Cluster(ranks, nodes, device, memory, host, numbers.get("tflops"), gbps)


def cached_numbers(config: PretrainedConfig) -> int:
    """Return the keys and values of one token in all layers of a decoder."""
    heads = stated(config, "num_attention_heads") or 1  # a recurrent model has none
    key_heads = stated(config, "num_key_value_heads") or heads
    width = stated(config, "head_dim") or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * width


class PhasePlan(Ledger):
    """What a phase takes on a rank: its peaks, and its network and operations per step.

    load_peak: peak bytes of the host while the models are built and loaded.
    flops: operations of a training step, or of one of the `forwards` of other work.
    sent: bytes that such a step receives, by role and whether they come from another node.
    per_rows: see `Phase`.
    per_call: micro-batches of a step that teachers answer in one forward, if more than one.
    """

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster, process: int) -> None:
        super().__init__(cluster.device, process)
        self.name, self.forwards, self.per_rows = phase.name, phase.forwards, phase.per_rows
        self.load_peak, self.flops, self.per_call = 0, 0.0, dict[str, int]()
        self.sent = Counter[tuple[str, bool]]()
        self._phase, self._config, self._cluster = phase, config, cluster
        self._traces = PhaseTraces(phase, config, cluster.device)
        self._resting = Counter[Share]()
        if phase.stage is not None:
            self._train(phase.stage)
            return
        when = f"scoring (eval.per_device_eval_batch_size {phase.rows})"
        when = when if phase.work == "scoring" else "measuring importance"
        for name, run in self._traces.teachers.items():
            is_teacher = phase.work == "importance" or name in config.teacher_specs
            engine = self._frozen(name, TEACHER if is_teacher else STUDENT)
            self._forward(when, engine, run)
            if phase.forwards:
                self.flops = run.flops
                self._send(engine, engine.fetched(run))

    def look(self, when: str, *holdings: Holding) -> None:
        super().look(when, self._resting, *holdings)

    def seconds(self) -> tuple[float, float] | None:
        """Return the seconds of a step if sending runs beside computing, and if it runs after it.

        None if a rate is missing.
        """
        tflops, rates = self._cluster.tflops, self._cluster.gbps
        if not self.flops or tflops is None or (rates is None and self.sent.total()):
            return None
        computing, rates = self.flops / (tflops * 1e12), rates or (1, 1)
        sending = sum(size / (rates[is_far] * GIGA) for (_, is_far), size in self.sent.items())
        return max(computing, sending), computing + sending

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "peak_bytes_per_rank": self.peak.total,
            "peak_moment": self.peak.when,
            "load_peak_bytes_per_rank": self.load_peak,
            "host_bytes_per_rank": self.host_peak.total,
            "network_bytes_per_step": self.sent.total(),
            "flops_per_step": self.flops,
            "forwards": self.forwards,
            "forwards_per_rows": self.per_rows,
            "seconds_per_step": self.seconds(),
            "micro_batches_per_call": self.per_call,
        }

    def _engine(self, role: str, run: Trace, ds: Mapping[str, Any], **options: Any) -> Engine:
        engine = Engine(
            role=role,
            sizes=run.sizes,
            zero=ds.get("zero_optimization", {}),
            ranks=self._cluster.ranks_per_node if shards_within_node(ds) else self._cluster.ranks,
            is_cpu=self._cluster.device == "cpu",
            **options,
        )
        self.look(f"loading the {role}", engine.loading())
        self.load_peak = self.host_peak.total
        self._resting = self._resting + engine.resting()
        return engine

    def _frozen(self, name: str, role: str = TEACHER) -> Engine:
        ready = self._phase.teachers[name]
        ds = load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")
        width = TORCH_DTYPE[planned_dtype(ready, self._cluster.device)].itemsize
        ds, run = frozen_on(self._cluster.ranks, ds), self._traces.teachers[name]
        check_whole(ready.source, ds)
        stored = (
            fp8_bytes(ready.source, self._config.task.type, width)
            if ready.source.fp8
            else bytes_per_weight(ready.source, sum(run.sizes), width)
        )
        return self._engine(role, run, ds, itemsize=width, stored_itemsize=stored)

    def _train(self, stage: Stage) -> None:
        traces, train, run = self._traces, stage.train, self._traces.learner[0]
        frozen = {
            name: self._frozen(name)
            for name, ready in self._phase.teachers.items()
            if ready.is_loaded(measures_losses=bool(stage.measured))
        }
        role = STUDENT if stage.role == STUDENT else TEACHER
        learner = self._engine(
            role,
            run,
            learner_ds(stage, self._config, ranks=self._cluster.ranks, device=self._cluster.device),
            itemsize=TORCH_DTYPE[training_dtype(train, self._cluster.device)].itemsize,
            learned=run.learned,
            moments=MOMENTS[train.optim],
        )
        averages = learner.averages(traces.units, int(stage.pruned_to is not None))
        # The copy of a rank's part of the state that a save, except the last, writes beside the
        # training.
        save, host = self._config.save, self._cluster.host_memory
        copy = (MOMENTS[train.optim] + 1) * learner.part * FP32 + averages.total()
        fits = host is None or 2 * self._cluster.ranks_per_node * copy <= host
        is_copied = fits if save.asynchronous == "auto" else save.asynchronous
        if is_copied and (train.max_steps is None or train.max_steps > (save.save_steps or 0)):
            averages += learner.held("checkpoint", copy, "host")
        # A drawn teacher that waits on the host is copied from there.
        drawn = [
            one.shard * one.itemsize
            for name, one in frozen.items()
            if traces.asked[name] < 1 and one.weights_at == "host" and not one.is_cpu
        ]
        averages[Share(TEACHER, "weights")] += max(drawn, default=0)
        self._resting = self._resting + averages
        self._step(stage, learner, frozen)
        self._generate(stage, {STUDENT: learner, **frozen})
        largest = learner.largest * learner.itemsize
        written = min(learner.numel * learner.itemsize, SHARD_BYTES + largest)
        self.look("writing the model", learner.held("weights", written, "host"))
        if stage.has_next_window:  # rank 0 gathers the training state for the next window
            state = min(learner.numel * FP32 * (1 + MOMENTS[train.optim]), SHARD_BYTES)
            state += learner.largest * FP32
            state /= learner.itemsize
            self.look("writing the state", learner.like("activations", state, run.sizes, "host"))

    def _step(self, stage: Stage, learner: Engine, frozen: Mapping[str, Engine]) -> None:
        traces, train, config = self._traces, stage.train, self._config
        many = largest_step(train, config.task).micro_batches
        beside = blocks(TEACHER, "activations", traces.answers)
        accumulated = learner.gradients(learner.count * (many > 1))
        waits, self.flops = NOTHING, many * sum(run.flops for run in traces.learner)
        self.per_call = {name: count for name, count in traces.per_call.items() if count > 1}
        for name, engine in frozen.items():
            source, run = self._phase.teachers[name].source, traces.teachers[name]
            head = 0  # the output matrix, which the student's forward gathers at ZeRO 3
            if engine.stage == 3 and config.task.type in LANGUAGE_TASKS:
                head = source.config.vocab_size * source.width
                beside = beside + blocks(TEACHER, "gather", head * engine.itemsize)
            if self._phase.teachers[name].spec.cache is not None:
                continue
            # Answers of an earlier teacher wait, unless it was asked in another step.
            self._forward("the teacher's forward", engine, run, accumulated + waits)
            waits = blocks(TEACHER, "activations", traces.answers * (traces.asked[name] == 1))
            share, per_call = traces.asked[name], traces.per_call[name]
            self.flops += share * run.flops * many / per_call
            calls = -(-many // per_call)
            self._send(engine, share * (calls * engine.fetched(run) + many * head))
        for number, run in enumerate(traces.learner):
            self._learn(stage, learner, run, beside, adds=many > 1 or number > 0)
        for held in learner.updating():
            self.look("updating the weights", held)
        when = f"evaluating (eval.per_device_eval_batch_size {config.eval_rows(train)})"
        for name, run in traces.evaluated.items():
            others = beside if len(traces.evaluated) > 1 else NOTHING
            self._forward(when, frozen.get(name, learner), run, others)
        backwards = many * len(traces.learner)
        # An all-reduce; one, and the new weights are gathered; gradients of every backward.
        each = (2, 3, 2 * backwards + 1, backwards)[learner.stage]
        gathered = many * sum(map(learner.fetched, traces.learner))
        self._send(learner, each * learner.count + gathered)

    def _learn(
        self, stage: Stage, learner: Engine, run: Trace, beside: Holding, *, adds: bool
    ) -> None:
        earlier, away, source = learner.gradients(learner.count * adds), 0, self._phase.learner
        if stage.train.activation_offload and not learner.is_cpu:
            # The inputs of repeated layers wait on the host.
            tokens = largest_step(stage.train, self._config.task).tokens
            away = source.depth * tokens * source.width * learner.itemsize
            beside = beside + learner.held("activations", away, "host")
        beside = beside + self._gather("the student's forward", learner, run, beside + earlier)
        # A forward with pruned weights holds a copy of them.
        copied = learner.numel * (stage.pruned_to is not None)
        for number, (small, large, done) in enumerate(run.points):
            left = 1 - done / learner.count
            held = learner.like("activations", copied * left, run.sizes)
            held += learner.live(small, large)
            if away:
                held = learner.held("activations", max(0, held.total() - away * left))
            if number == 0:
                self.look("the student's forward", beside, earlier, held)
                continue
            before, last = run.points[number - 1].done, number + 1 == len(run.points)
            gradients = learner.backward(done, before, adds=adds, last=last)
            self.look("the student's backward", beside, gradients, held)

    def _forward(self, when: str, engine: Engine, run: Trace, others: Holding = NOTHING) -> None:
        small, large, _ = run.points[0]
        gathered = self._gather(when, engine, run, others)
        self.look(when, others, gathered, engine.live(small, large))

    def _gather(self, when: str, engine: Engine, run: Trace, others: Holding) -> Holding:
        # Return what ZeRO 3 gathers while the activations exist.
        whole, buffers = engine.gathered(run)
        self.look(when, others, whole, buffers)
        return whole if engine.is_gathered_early(run) else whole + buffers

    def _generate(self, stage: Stage, engines: Mapping[str, Engine]) -> None:
        generation, train = self._config.eval.generation, stage.train
        rollouts = self._config.rollout if stage.teachers else None
        texts: list[tuple[str, str, int]] = []
        if rollouts is not None and rollouts.server is None:
            rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
            rows = min(rows * (rollouts.max_staleness + 1), rollouts.rows_per_call)
            key = f"rollout.rows_per_call {rollouts.rows_per_call}"
            texts.append((f"generating texts ({key})", rollouts.by, rows))
        if generation is not None and stage.role == STUDENT:
            key = f"eval.generation.rows_per_call {generation.rows_per_call}"
            rows = min(generation.rows, generation.rows_per_call)
            texts.append((f"evaluating on texts ({key})", STUDENT, rows))
        for when, role, rows in texts:
            engine, ready = engines[role], self._phase.teachers.get(role)
            model = (ready.source if ready else self._phase.learner).config
            cache = self._config.task.row_length * cached_numbers(model) * engine.itemsize
            logits = model.vocab_size * FP32 * _LOGIT_BUFFERS
            held = engine.blocks("activations", rows * (cache + logits))
            if engine.stage == 3:  # the model is gathered whole
                held += engine.blocks("gather", engine.numel * engine.itemsize)
            self.look(when, held)

    def _send(self, engine: Engine, elements: float) -> None:
        # Of what ranks gather or reduce, each has an equal part.
        near = min(engine.ranks, self._cluster.ranks_per_node)
        for is_far, ranks in ((False, near - 1), (True, engine.ranks - near)):
            size = round(elements * engine.itemsize * ranks / engine.ranks)
            self.sent[engine.role, is_far] += size


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
        return max(self.phases, key=lambda phase: phase.peak.total)

    @property
    def peak_bytes_per_rank(self) -> int:
        """The peak of the device: of a GPU what its allocator holds, as in the report."""
        return self.highest.peak.total

    @property
    def host_bytes_per_rank(self) -> int:
        """Peak bytes of the host, with offloaded parts and loading."""
        return max(phase.host_peak.total for phase in self.phases)

    @property
    def rooms(self) -> list[float]:
        """Free bytes of the device, and of a rank's share of the host, where a size is known."""
        cluster, rooms = self.cluster, []
        if cluster.device == "cuda" and cluster.device_memory is not None:
            rooms.append(cluster.device_memory * (1 - _SPARE) - _CONTEXT - self.peak_bytes_per_rank)
        if cluster.host_memory is not None:
            rooms.append(cluster.host_memory / cluster.ranks_per_node - self.host_bytes_per_rank)
        return rooms

    @property
    def fits(self) -> bool | None:
        """True if device and host have enough memory; None if no memory size is known."""
        return all(room >= 0 for room in self.rooms) if self.rooms else None

    def part(self, role: str, part: Part) -> int:
        """Return the most bytes of the device that a part needs in any phase."""
        # A CPU has one memory.
        places = PLACES if self.cluster.device == "cpu" else PLACES[:1]
        return sum(
            max(phase.most[Share(role, part, place)] for phase in self.phases) for place in places
        )

    def as_json(self) -> dict[str, Any]:
        cluster = self.cluster
        trainings = [phase for phase in self.phases if phase.flops and not phase.forwards]
        last = trainings[-1] if trainings else None  # its speed is that of the run
        return {
            "ranks": cluster.ranks,
            "nodes": cluster.nodes,
            "device": cluster.device,
            "roles": {role: {part: self.part(role, part) for part in PARTS} for role in ROLES},
            "process_bytes": self.process_bytes,
            "peak_bytes_per_rank": self.peak_bytes_per_rank,
            "peak_phase": self.highest.name,
            "peak_moment": self.highest.peak.when,
            "load_peak_bytes_per_rank": max(phase.load_peak for phase in self.phases),
            "host_bytes_per_rank": self.host_bytes_per_rank,
            "network_bytes_per_step": last.sent.total() if last else 0,
            "seconds_per_step": last and last.seconds(),
            "fits": self.fits,
            "phases": [phase.as_json() for phase in self.phases],
        }


def plan_run(config: RunConfig, cluster: Cluster, *, process: int | None = None) -> Plan:
    """Plan a run from configs only; `process`: its bytes before models, if they are known."""
    process = process_bytes() if process is None else process
    facts = RunFacts(config, planned_sources(config), world=cluster.ranks)
    planned = planned_phases(PlannedWork(facts))
    phases = [PhasePlan(phase, config, cluster, process) for phase in planned]
    return Plan(config=config, cluster=cluster, phases=phases, process_bytes=process)


def process_bytes(*, has_data: bool = False) -> int:
    """Return the bytes of a run's process without models, from this process with its imports."""
    from megakd.reports import html
    from megakd.training import log, stage_run

    del html, log, stage_run
    return psutil.Process().memory_info().rss + _WORK + (0 if has_data else _DATA)


def page(plan: Plan) -> str:
    """Return the text that `megakd plan` prints."""
    cluster, peak, config = plan.cluster, plan.highest.peak, plan.config
    is_cpu = cluster.device == "cpu"
    memory = cluster.host_memory if is_cpu else cluster.device_memory
    size = f" of {memory / GIGA:,.0f} GB{' a node' if is_cpu else ''}" if memory else ""
    machines = f"{cluster.ranks} ranks ({cluster.device.upper()}{size}), {cluster.nodes} nodes"
    machines = machines.replace("CUDA", "GPU")
    roles = sorted({share.role for share in peak.shares}, reverse=True)
    parts = [[f"{plan.highest.name}: {peak.when}", *roles]]
    for part in PARTS:
        cells = [
            sum(peak.shares.get(Share(role, part, one), 0) for one in PLACES) for role in roles
        ]
        if any(cells):
            parts.append([part, *map(gigabytes, cells)])
    process = plan.process_bytes if is_cpu else 0
    rest = peak.total - process - sum(peak.shares.values())
    sums = {"kept by the C library": rest, "process": process, "together": peak.total}
    parts += [[name, gigabytes(n), *[""] * (len(roles) - 1)] for name, n in sums.items() if n]
    rows, lines = [["phase", "peak", "at", "host", "loading", "network/step", "s/step"]], []
    for phase in plan.phases:
        seconds = phase.seconds()
        rows.append(
            [
                *(phase.name, gigabytes(phase.peak.total), phase.peak.when),
                "-" if is_cpu else gigabytes(phase.host_peak.total),
                gigabytes(phase.load_peak),
                gigabytes(phase.sent.total()) if phase.flops else "-",
                "-" if seconds is None else " to ".join(f"{one:.3g}" for one in seconds),
            ]
        )
        lines += [
            f"{phase.name}: {name} answers {count} micro-batches in one forward "
            f"({config.key_of(name)}.joins_micro_batches)"
            for name, count in phase.per_call.items()
        ]
        if phase.forwards:
            each = f" for every {phase.per_rows} rows" if phase.per_rows else ""
            lines.append(f"{phase.name}: {phase.forwards} forwards of a rank{each}")
    tables = ["\n".join(aligned_rows(table)) for table in (parts, rows)]
    missing = max((-room for room in plan.rooms), default=0)
    verdict = {
        None: "The plan cannot say whether the run fits; set --gpu_memory_gb.",
        True: "The run fits.",
        False: f"The run does not fit: {gigabytes(missing)} GB per rank are missing. Shard more "
        "(student.deepspeed, teacher.deepspeed), learn in bf16, take more nodes, fewer rows at a "
        "time or train.gradient_checkpointing, or offload to the host.",
    }[plan.fits]
    head = f"{config.method.name}: {machines}; GB per rank"
    return "\n\n".join([head, *tables, "\n".join([*lines, verdict])])


def gigabytes(size: float) -> str:
    """Return a size as digits of 1e9 bytes."""
    digits = 1 if size >= 10 * GIGA else 2 if size >= GIGA else 3
    return f"{size / GIGA:,.{digits}f}"
