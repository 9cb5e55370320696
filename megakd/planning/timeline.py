"""Memory of one phase on one rank, from the first build to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from megakd.config.deepspeed import frozen_on, load_ds_config, shards_within_node
from megakd.config.run import RunConfig
from megakd.contract.stage import Stage, backward_groups
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.inputs.precision import TORCH_DTYPE, training_dtype
from megakd.inputs.step_size import largest_step
from megakd.models.model_folder import BUFFER_BYTES
from megakd.planning.cluster import Cluster
from megakd.planning.engine_memory import (
    FP32,
    Frozen,
    Holding,
    Ledger,
    Part,
    Share,
    Trained,
    together,
)
from megakd.planning.phase_traces import Pruned, Traces, planned_dtype, simulated_phase
from megakd.planning.planning_lab import Phase, Work
from megakd.planning.tracing import NOTHING, Amount, Moment, Trace, amount_of, block

# Logits of one position, the logits of the sampling rules, the noise, and their sum.
_LOGIT_BUFFERS = 4


def cached_numbers(config: PretrainedConfig) -> int:
    """Return the keys and values of one token in all layers of a decoder."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * width


_WORK: Mapping[Work, str] = {
    "importance": "measuring importance",
    "scoring": "scoring",
    "timing": "timing all models side by side",
}
MOMENTS = {"adamw": 2, "sgd": 0}


@dataclass
class PhasePlan:
    """Resources of a phase on a rank.

    load_peak: peak bytes of the host while the models are built and loaded.
    flops, network: operations, and bytes sent by role, of a training step or of one of `forwards`.
    required: False if the run continues without the phase when memory is short.
    per_call: micro-batches of a step that teachers answer in one forward, if more than one.
    """

    name: str
    ledger: Ledger
    load_peak: int = 0
    flops: float = 0.0
    forwards: int = 0
    network: dict[str, float] = field(default_factory=dict)
    required: bool = True
    pruned: Pruned | None = None
    per_call: dict[str, int] = field(default_factory=dict)

    @property
    def sent(self) -> float:
        return sum(self.network.values())


class Timeline:
    """The memory of a phase at each time."""

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster, known: Traces) -> None:
        self.phase, self.config, self.cluster = phase, config, cluster
        self.traced = simulated_phase(phase, config, cluster, known)
        required, left = phase.work != "timing", self.traced.pruned
        self.plan = PhasePlan(phase.name, Ledger(cluster.device), required=required, pruned=left)
        self._resting: Holding = {}
        self._answers: Holding = {Share(TEACHER, "activations"): block(self.traced.answers)}

    def play(self) -> PhasePlan:
        if self.phase.stage is None:
            self._work_alone(self.phase.work)
        else:
            self._train(self.phase.stage)
        return self.plan

    def _look(self, when: str, *held: Holding) -> None:
        self.plan.ledger.look(when, self._resting, *held)

    def _load(self, engine: Frozen) -> None:
        self._look(f"loading the {engine.role}", engine.loading())
        self.plan.load_peak = self.plan.ledger.peaks["host"].total

    def _model(self, role: str, run: Trace, ds: Mapping[str, Any]) -> dict[str, Any]:
        zero = ds.get("zero_optimization", {})
        cluster = self.cluster
        if shards_within_node(ds):
            cluster = replace(cluster, ranks=cluster.ranks_per_node, nodes=1)
        return {"role": role, "inventory": run.inventory, "zero": zero, "cluster": cluster}

    def _frozen(self, name: str, role: str = TEACHER) -> Frozen:
        ready = self.phase.teachers[name]
        ds = load_ds_config(ready.spec.deepspeed, where=f"{role}.deepspeed")
        ds = frozen_on(self.cluster.ranks, ds)
        model = self._model(role, self.traced.teachers[name], ds)
        dtype = TORCH_DTYPE[planned_dtype(ready, self.cluster.device)]
        engine = Frozen(itemsize=dtype.itemsize, **model)
        self._load(engine)
        self._resting = together(self._resting, engine.resting())
        return engine

    def _work_alone(self, work: Work) -> None:
        engines = {}
        for name in self.phase.teachers:
            is_teacher = work == "importance" or name in self.config.teacher_specs
            engines[name] = self._frozen(name, TEACHER if is_teacher else STUDENT)
        when = _WORK[work]
        if work == "scoring":
            when += f" (eval.per_device_eval_batch_size {self.phase.rows})"
        # Activations of gates count as elastic: no weight gets a gradient.
        kind: Part = "elastic" if work == "importance" else "activations"
        for name, engine in engines.items():
            self._forward(when, engine, self.traced.teachers[name], kind=kind)
            if self.phase.forwards:
                self.plan.flops = self.traced.teachers[name].flops
        self.plan.forwards = self.phase.forwards

    def _train(self, stage: Stage) -> None:
        teachers = self.phase.teachers
        losses = stage.measures_losses
        loaded = [n for n, ready in teachers.items() if ready.is_loaded(measures_losses=losses)]
        frozen = {name: self._frozen(name) for name in loaded}
        asked = {name: one for name, one in frozen.items() if teachers[name].spec.cache is None}
        role = STUDENT if stage.role == STUDENT else TEACHER
        ds = load_ds_config(stage.deepspeed, where=f"{role}.deepspeed")
        model = self._model(role, self.traced.learner[0], ds)
        dtype = TORCH_DTYPE[training_dtype(stage.train, self.cluster.device)]
        moments = MOMENTS[stage.train.optim]
        learner = Trained(itemsize=dtype.itemsize, moments=moments, **model)
        self._load(learner)
        self._look("initializing DeepSpeed", learner.initializing())
        left = self.traced.pruned
        averages = learner.averages(left.makers, stage.strategy.values_per_weight) if left else {}
        copy = self._copied(stage, learner.copied(averages))
        self._resting = together(
            self._resting, learner.resting(), averages, self._beside_teachers(frozen), copy
        )
        micro_batches = largest_step(stage.train, self.config.task).micro_batches
        self._ask(asked, learner.accumulated() if micro_batches > 1 else {})
        heads = [
            engine.held("gather", self._gathered_head(name, engine))
            for name, engine in frozen.items()
        ]
        beside = together(*heads, self._offloaded(stage, learner))
        for runs in (self.traced.learner, self.traced.masked):
            for number, run in enumerate(runs):
                self._learn(learner, run, beside, adds=micro_batches > 1 or number > 0)
        for held in learner.updating():
            self._look("updating the weights", held)
        self._generate(stage, {STUDENT: learner, **frozen})
        self._evaluate(learner, frozen, together(*heads), self.config.eval_rows(stage.train))
        self._write(learner, stage)
        self._count(learner, asked, micro_batches)

    def _copied(self, stage: Stage, copy: Holding) -> Holding:
        save, steps, host = self.config.save, stage.train.max_steps, self.cluster.host_memory
        if steps is not None and steps <= save.save_steps:
            return {}  # the last save of a stage makes no copy
        twice = 2 * self.cluster.ranks_per_node * sum(amount.total for amount in copy.values())
        fits = host is None or twice <= host
        return copy if (fits if save.asynchronous == "auto" else save.asynchronous) else {}

    def _offloaded(self, stage: Stage, learner: Trained) -> Holding:
        if not stage.train.activation_offload or learner.is_cpu:
            return {}
        source, tokens = self.phase.learner, largest_step(stage.train, self.config.task).tokens
        architecture = source.architecture
        layers = architecture.number_of_layers(source.config)
        width = architecture.hidden_width(source.config)
        views = max(map(len, backward_groups(stage.strategy.passes(0), stage.passes_per_backward)))
        size = views * layers * tokens * width * learner.itemsize
        return learner.held("activations", block(size), "host")

    def _generate(self, stage: Stage, engines: Mapping[str, Frozen]) -> None:
        # Record the generation of texts; at ZeRO 3 the model that generates is gathered whole.
        sources = {STUDENT: self.phase.learner}
        sources |= {name: ready.source for name, ready in self.phase.teachers.items()}
        for when, role, rows in self._texts(stage):
            engine, model = engines[role], sources[role].config
            whole = engine.inventory.numel * engine.itemsize if engine.stage == 3 else 0
            cache = self.config.task.row_length * cached_numbers(model) * engine.itemsize
            logits = model.vocab_size * FP32 * _LOGIT_BUFFERS
            self._look(
                when,
                engine.held("gather", block(whole)),
                engine.held("workspace", block(rows * (cache + logits))),
            )

    def _texts(self, stage: Stage) -> Iterator[tuple[str, str, int]]:
        rollouts, generation = stage.rollouts, self.config.eval.generation
        if rollouts is not None and rollouts.server is None:
            train = stage.train
            rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
            rows = min(rows * (rollouts.max_staleness + 1), rollouts.rows_per_call)
            key = f"rollout.rows_per_call {rollouts.rows_per_call}"
            yield f"generating texts ({key})", rollouts.by, rows
        if generation is not None and stage.role == STUDENT:
            rows = min(generation.rows, generation.rows_per_call)
            key = f"eval.generation.rows_per_call {generation.rows_per_call}"
            yield f"evaluating on texts ({key})", STUDENT, rows

    def _evaluate(
        self, learner: Trained, frozen: Mapping[str, Frozen], heads: Holding, rows: int
    ) -> None:
        when = f"evaluating (eval.per_device_eval_batch_size {rows})"
        if self.traced.evaluation is not None:
            self._forward(when, learner, self.traced.evaluation)
        if self.traced.measured is None:
            return
        teachers, size, run = self.traced.measured
        answers: Holding = {Share(TEACHER, "activations"): block(size)}
        for name, engine in frozen.items():
            self._forward(when, engine, teachers[name], answers)
        self._forward(when, learner, run, answers, heads)

    def _write(self, learner: Trained, stage: Stage) -> None:
        whole, largest = learner.inventory.numel, learner.inventory.largest
        written = min(whole * learner.itemsize, BUFFER_BYTES + largest * learner.itemsize)
        self._look("writing the model", learner.held("weights", block(written), "host"))
        left = self.traced.pruned
        if left is None or not stage.goes_on:
            return
        # Rank 0 writes the training state for the next window, whole tensors in fp32; at most
        # `BUFFER_BYTES` of it wait on the host. To read it takes less than a step: each rank reads
        # one tensor after the other.
        values, kept = 1 + learner.moments, stage.strategy.values_per_weight
        state = amount_of(
            parameter.numel * FP32
            for number, parameter in enumerate(left.weights)
            for _ in range(values + (kept if number in left.makers else 0))
        )
        state = state.times(min(1.0, BUFFER_BYTES / max(1, state.total)))
        whole = block(largest * FP32)
        self._look(
            "writing the state for the next window",
            learner.held("workspace", state.plus(whole), "host"),
            learner.held("gather", whole),
        )

    def _beside_teachers(self, frozen: Mapping[str, Frozen]) -> Holding:
        # The shards of a drawn teacher, which are copied from the host.
        copied = [
            engine.share(engine.inventory.numel) * engine.itemsize
            for name, engine in frozen.items()
            if self.traced.asked[name] < 1 and engine.place("offload_param") == "host"
        ]
        if copied and self.cluster.device == "cuda":
            return {Share(TEACHER, "weights"): block(max(copied))}
        return {}

    def _ask(self, frozen: Mapping[str, Frozen], gradients: Holding) -> None:
        answers: Holding = {}
        for name, engine in frozen.items():
            is_drawn = self.traced.asked[name] < 1  # earlier answers are of another step
            waiting = {} if is_drawn else answers
            run = self.traced.teachers[name]
            self._forward("the teacher's forward", engine, run, gradients, waiting)
            answers = self._answers

    def _learn(self, learner: Trained, run: Trace, beside: Holding, *, adds: bool) -> None:
        earlier = learner.accumulated() if adds else {}
        done: list[int] = []
        for index, (moment, held) in enumerate(self._moments(learner, run)):
            if index < run.turn:
                self._look("the student's forward", self._answers, beside, earlier, held)
                continue
            done += moment.finished
            gradients = learner.backward(run.inventory.of(done), adds=adds)
            self._look("the student's backward", self._answers, gradients, held)
        gradients = learner.backward(run.inventory, adds=adds, last=True)
        self._look("the student's backward", self._answers, gradients)

    def _gathered_head(self, name: str, engine: Frozen) -> Amount:
        # Return the bytes of the teacher's output matrix, gathered from its shards.
        if engine.stage != 3 or self.config.task.type not in LANGUAGE_TASKS:
            return NOTHING
        source = self.phase.teachers[name].source
        config = source.config
        width = source.architecture.hidden_width(config)
        return block(config.vocab_size * width * engine.itemsize)

    def _forward(
        self, when: str, engine: Frozen, run: Trace, *others: Holding, kind: Part = "activations"
    ) -> None:
        for _, held in self._moments(engine, run, kind):
            self._look(when, *others, held)

    def _moments(
        self, engine: Frozen, run: Trace, kind: Part = "activations"
    ) -> Iterator[tuple[Moment, Holding]]:
        of_one_view = None if engine.role == TEACHER else self.traced.of_one_view
        for moment, gathered in zip(run.moments, engine.gathered(run), strict=True):
            live, share = moment.live, 1.0
            if of_one_view is not None and live.total:
                share = min(1.0, of_one_view / live.total)
            held = together(
                engine.held(kind, live.times(share)),
                engine.held("elastic", live.times(1 - share)),
                engine.held("gather", gathered),
                engine.held("workspace", moment.workspace),
            )
            yield moment, held

    def _count(self, learner: Trained, frozen: Mapping[str, Frozen], micro_batches: int) -> None:
        flops = micro_batches * sum(run.flops for run in self.traced.learner)
        answered, stage = 0.0, self.phase.stage
        is_divided = stage is not None and stage.strategy.routes_rows
        rows = 1 / len(frozen) if is_divided and frozen else 1.0
        for name, engine in frozen.items():
            run, per_call = self.traced.teachers[name], self.traced.per_call[name]
            asked, rest = self.traced.asked[name], engine.received
            gathered = engine.fetched(run) * engine.itemsize
            flops += asked * rows * run.flops * micro_batches / per_call
            answered += asked * -(-micro_batches // per_call) * rest * gathered
            # The student's forward gathers the head for every micro-batch.
            answered += asked * micro_batches * rest * self._gathered_head(name, engine).total
        self.plan.flops = flops
        self.plan.per_call = {n: many for n, many in self.traced.per_call.items() if many > 1}
        gathered = sum(learner.fetched(run) for run in self.traced.learner)
        weights = learner.learned.numel * learner.itemsize
        backwards = micro_batches * len(self.traced.learner)
        sent = {
            0: 2 * weights,  # an all-reduce
            1: 3 * weights,  # an all-reduce, and the new weights are gathered
            2: (2 * backwards + 1) * weights,
            3: micro_batches * gathered * learner.itemsize + backwards * weights,
        }
        self.plan.network[TEACHER] = answered
        before = self.plan.network.get(learner.role, 0.0)
        self.plan.network[learner.role] = before + learner.received * sent[learner.stage]
