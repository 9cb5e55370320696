"""Resources of one phase on one rank: memory from the first build to a checkpoint, and network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from megakd.config.deepspeed import frozen_on, load_ds_config, shards_within_node
from megakd.config.run import RunConfig
from megakd.contract.stage import Stage
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.inputs.precision import TORCH_DTYPE, training_dtype
from megakd.inputs.step_size import largest_step
from megakd.models.model_folder import BUFFER_BYTES
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.engine_memory import FP32, Engine, Holding, Ledger, Share, together
from megakd.planning.phase_traces import PhaseTracer, planned_dtype
from megakd.planning.planning_lab import Phase
from megakd.planning.tracing import NOTHING, Amount, Trace, blocks

MOMENTS = {"adamw": 2, "sgd": 0}
# Logits of one position, the logits of the sampling rules, the noise, and their sum.
_LOGIT_BUFFERS = 4


def cached_numbers(config: PretrainedConfig) -> int:
    """Return the keys and values of one token in all layers of a decoder."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * key_heads * width


@dataclass
class PhasePlan:
    """Resources of a phase on a rank.

    load_peak: peak bytes of the host while the models are built and loaded.
    flops: operations of a training step, or of one of the `forwards` of other work.
    sent: by role, bytes that such a step receives from its own node, and from others.
    per_rows: see `Phase`.
    per_call: micro-batches of a step that teachers answer in one forward, if more than one.
    """

    name: str
    ledger: Ledger
    load_peak: int = 0
    flops: float = 0.0
    forwards: int = 0
    per_rows: int = 0
    sent: dict[str, Amount] = field(default_factory=dict)
    per_call: dict[str, int] = field(default_factory=dict)

    @property
    def network(self) -> float:
        return float(sum(amount.sum() for amount in self.sent.values()))

    def seconds(self, cluster: Cluster) -> tuple[float, float] | None:
        """Return the seconds of a step if sending runs beside computing, and if it runs after it.

        None if a rate is missing.
        """
        if not self.flops or cluster.tflops is None or (cluster.gbps is None and self.network):
            return None
        computing = self.flops / (cluster.tflops * 1e12)
        rates = np.array(cluster.gbps or (1, 1)) * GIGA
        sending = float(sum((amount / rates).sum() for amount in self.sent.values()))
        return max(computing, sending), computing + sending


class Timeline:
    """The memory of a phase at each time."""

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster, process: int) -> None:
        self.phase, self.config, self.cluster = phase, config, cluster
        self.traces = PhaseTracer(phase, config, cluster.device).traces()
        ledger = Ledger(cluster.device, process)
        self.plan = PhasePlan(phase.name, ledger, forwards=phase.forwards, per_rows=phase.per_rows)
        self._resting: Holding = {}

    def play(self) -> PhasePlan:
        """Return the resources of the phase."""
        if self.phase.stage is None:
            for name in self.phase.teachers:
                work, runs = self.phase.work, self.traces.teachers[name]
                is_teacher = work == "importance" or name in self.config.teacher_specs
                engine = self._frozen(name, TEACHER if is_teacher else STUDENT)
                when = "measuring importance"
                if work == "scoring":
                    when = f"scoring (eval.per_device_eval_batch_size {self.phase.rows})"
                self._forward(when, engine, runs)
                if self.phase.forwards:
                    self.plan.flops = runs.flops
                    self.plan.sent[TEACHER] = self._moved(engine, engine.fetched(runs))
        else:
            self._train(self.phase.stage)
        return self.plan

    def _look(self, when: str, *held: Holding) -> None:
        self.plan.ledger.look(when, self._resting, *held)

    def _engine(self, role: str, run: Trace, ds: Mapping[str, Any], **options: Any) -> Engine:
        within = shards_within_node(ds)
        engine = Engine(
            role=role,
            sizes=run.sizes,
            zero=ds.get("zero_optimization", {}),
            ranks=self.cluster.ranks_per_node if within else self.cluster.ranks,
            is_cpu=self.cluster.device == "cpu",
            **options,
        )
        self._look(f"loading the {role}", engine.loading())
        self.plan.load_peak = self.plan.ledger.peaks["host"].total
        return engine

    def _frozen(self, name: str, role: str = TEACHER) -> Engine:
        ready = self.phase.teachers[name]
        ds = load_ds_config(ready.spec.deepspeed, where=f"{role}.deepspeed")
        ds = frozen_on(self.cluster.ranks, ds)
        width = TORCH_DTYPE[planned_dtype(ready, self.cluster.device)].itemsize
        engine = self._engine(role, self.traces.teachers[name], ds, itemsize=width)
        self._resting = together(self._resting, engine.resting())
        return engine

    def _train(self, stage: Stage) -> None:
        teachers, traces, strategy = self.phase.teachers, self.traces, stage.strategy
        frozen = {
            name: self._frozen(name)
            for name, ready in teachers.items()
            if ready.is_loaded(measures_losses=stage.measures_losses)
        }
        role = STUDENT if stage.role == STUDENT else TEACHER
        learner = self._engine(
            role,
            traces.learner[0],
            load_ds_config(stage.deepspeed, where=f"{role}.deepspeed"),
            itemsize=TORCH_DTYPE[training_dtype(stage.train, self.cluster.device)].itemsize,
            learned=traces.learner[0].learned,
            moments=MOMENTS[stage.train.optim],
        )
        values = strategy.values_per_weight if traces.units else 0
        averages = learner.averages(traces.units, values)
        copy = self._copy(stage, learner, averages)
        # A drawn teacher that waits on the host is copied from there.
        drawn = [
            blocks(one.share(one.numel) * one.itemsize)
            for name, one in frozen.items()
            if traces.asked[name] < 1 and one.place("offload_param") == "host" and not one.is_cpu
        ]
        copied = {Share(TEACHER, "weights"): max(drawn, key=np.sum)} if drawn else {}
        self._resting = together(self._resting, learner.resting(), averages, copy, copied)
        self._step(stage, learner, frozen)
        self._generate(stage, {STUDENT: learner, **frozen})
        whole, largest = learner.numel * learner.itemsize, max(learner.sizes)
        written = min(whole, BUFFER_BYTES + largest * learner.itemsize)
        self._look("writing the model", learner.held("weights", blocks(written), "host"))
        if stage.goes_on:  # rank 0 gathers the training state for the next window
            state = blocks(*(n * FP32 for n in learner.sizes)) * (1 + MOMENTS[stage.train.optim])
            state = state * min(1.0, BUFFER_BYTES / state.sum()) + blocks(largest * FP32)
            self._look("writing the state", learner.held("activations", state, "host"))

    def _step(self, stage: Stage, learner: Engine, frozen: Mapping[str, Engine]) -> None:
        teachers, traces = self.phase.teachers, self.traces
        many = largest_step(stage.train, self.config.task).micro_batches
        answers: Holding = {Share(TEACHER, "activations"): blocks(traces.answers)}
        accumulated = learner.gradients(learner.count) if many > 1 else {}
        asked = {name: one for name, one in frozen.items() if teachers[name].spec.cache is None}
        for number, (name, engine) in enumerate(asked.items()):
            # Answers of an earlier teacher wait, unless it was asked in another step.
            waits = answers if number and traces.asked[name] == 1 else {}
            self._forward(
                "the teacher's forward", engine, traces.teachers[name], accumulated, waits
            )
        heads = {name: self._head(name, engine) for name, engine in frozen.items()}
        beside = together(answers, *({Share(TEACHER, "gather"): blocks(n)} for n in heads.values()))
        for number, run in enumerate(traces.learner):
            self._learn(stage, learner, run, beside, adds=many > 1 or number > 0)
        for held in learner.updating():
            self._look("updating the weights", held)
        when = f"evaluating (eval.per_device_eval_batch_size {self.config.eval_rows(stage.train)})"
        for name, run in traces.evaluated.items():
            others = beside if len(traces.evaluated) > 1 else {}
            self._forward(when, frozen.get(name, learner), run, others)
        self._count(learner, asked, heads, many)

    def _copy(self, stage: Stage, learner: Engine, averages: Holding) -> Holding:
        # The copy of a rank's part of the state that a save writes beside the training.
        save, steps, host = self.config.save, stage.train.max_steps, self.cluster.host_memory
        if steps is not None and steps <= save.save_steps:
            return {}  # the last save of a stage makes no copy
        values = (learner.moments or 0) + 1
        copy = values * blocks(learner.share(learner.count) * FP32) + sum(averages.values())
        twice = 2 * self.cluster.ranks_per_node * copy.sum()
        fits = host is None or twice <= host
        is_copied = fits if save.asynchronous == "auto" else save.asynchronous
        return learner.held("checkpoint", copy, "host") if is_copied else {}

    def _learn(
        self, stage: Stage, learner: Engine, run: Trace, beside: Holding, *, adds: bool
    ) -> None:
        earlier = learner.gradients(learner.count) if adds else {}
        whole, gathered = blocks(*(n * learner.itemsize for n in run.sizes)), learner.gathered(run)
        if stage.train.activation_offload and not learner.is_cpu:
            source, tokens = self.phase.learner, largest_step(stage.train, self.config.task).tokens
            layers = source.architecture.number_of_layers(source.config)
            width = source.architecture.hidden_width(source.config) * learner.itemsize
            inputs = learner.held("activations", blocks(layers * tokens * width), "host")
            beside = together(beside, inputs)
        for index, (moment, weights) in enumerate(zip(run.moments, gathered, strict=True)):
            live = moment.live
            if stage.strategy.pruned_to is not None:  # the forward copies the part that is left
                left = index / run.turn if index < run.turn else 1 - moment.done / learner.count
                live = live + whole * left
            held = together(learner.held("activations", live), learner.held("gather", weights))
            if index < run.turn:
                self._look("the student's forward", beside, earlier, held)
            else:
                gradients = learner.backward(moment.done, moment.newest, adds=adds)
                self._look("the student's backward", beside, gradients, held)
        self._look(
            "the student's backward",
            beside,
            learner.backward(learner.count, 0, adds=adds, last=True),
        )

    def _head(self, name: str, engine: Engine) -> int:
        # Bytes of a teacher's output matrix, which the student's forward gathers at ZeRO 3.
        source = self.phase.teachers[name].source
        if engine.stage != 3 or self.config.task.type not in LANGUAGE_TASKS:
            return 0
        width = source.architecture.hidden_width(source.config)
        return source.config.vocab_size * width * engine.itemsize

    def _forward(self, when: str, engine: Engine, run: Trace, *others: Holding) -> None:
        for moment, gathered in zip(run.moments, engine.gathered(run), strict=True):
            held = engine.held("activations", moment.live)
            self._look(when, *others, held, engine.held("gather", gathered))

    def _generate(self, stage: Stage, engines: Mapping[str, Engine]) -> None:
        # At ZeRO 3 the model that generates is gathered whole.
        for when, role, rows in self._texts(stage):
            engine = engines[role]
            ready = self.phase.teachers.get(role)
            model = (ready.source if ready else self.phase.learner).config
            cache = self.config.task.row_length * cached_numbers(model) * engine.itemsize
            logits = model.vocab_size * FP32 * _LOGIT_BUFFERS
            whole = engine.numel * engine.itemsize * (engine.stage == 3)
            texts = engine.held("activations", blocks(rows * (cache + logits)))
            self._look(when, engine.held("gather", blocks(whole)), texts)

    def _texts(self, stage: Stage) -> Iterator[tuple[str, str, int]]:
        rollouts, generation, train = stage.rollouts, self.config.eval.generation, stage.train
        if rollouts is not None and rollouts.server is None:
            rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
            rows = min(rows * (rollouts.max_staleness + 1), rollouts.rows_per_call)
            key = f"rollout.rows_per_call {rollouts.rows_per_call}"
            yield f"generating texts ({key})", rollouts.by, rows
        if generation is not None and stage.role == STUDENT:
            key = f"eval.generation.rows_per_call {generation.rows_per_call}"
            rows = min(generation.rows, generation.rows_per_call)
            yield f"evaluating on texts ({key})", STUDENT, rows

    def _count(
        self, learner: Engine, asked: Mapping[str, Engine], heads: Mapping[str, int], many: int
    ) -> None:
        traces, plan = self.traces, self.plan
        plan.flops = many * sum(run.flops for run in traces.learner)
        plan.per_call = {name: count for name, count in traces.per_call.items() if count > 1}
        plan.sent[TEACHER] = NOTHING
        for name, engine in asked.items():
            run, per_call, share = traces.teachers[name], traces.per_call[name], traces.asked[name]
            plan.flops += share * run.flops * many / per_call
            # The student's forward gathers the head for every micro-batch.
            elements = -(-many // per_call) * engine.fetched(run)
            elements += many * heads[name] // engine.itemsize
            plan.sent[TEACHER] = plan.sent[TEACHER] + share * self._moved(engine, elements)
        backwards, gathered = many * len(traces.learner), sum(map(learner.fetched, traces.learner))
        elements = {
            0: 2 * learner.count,  # an all-reduce
            1: 3 * learner.count,  # an all-reduce, and the new weights are gathered
            2: (2 * backwards + 1) * learner.count,
            3: many * gathered + backwards * learner.count,
        }[learner.stage]
        plan.sent[learner.role] = plan.sent.get(learner.role, NOTHING) + self._moved(
            learner, elements
        )

    def _moved(self, engine: Engine, elements: float) -> Amount:
        # Of what ranks gather or reduce, each has an equal part.
        near = min(engine.ranks, self.cluster.ranks_per_node)
        parts = np.array([near - 1, engine.ranks - near]) / engine.ranks
        return elements * engine.itemsize * parts
