"""The traces of a phase; each phase is traced once, however often a plan uses it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megakd.config.run import RunConfig
from megakd.contract.batch import Batch, Documents, Knowledge, Targets, Unit
from megakd.contract.joined_batches import joined, part_of, parts_of
from megakd.contract.stage import Pass, Stage, backward_groups, teacher_names
from megakd.contract.tasks import Dtype
from megakd.data.masking import DEFAULT_PROBABILITY
from megakd.inputs.precision import TORCH_DTYPE, frozen_dtype, training_dtype
from megakd.inputs.step_size import largest_step, micro_batches_per_call
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.class_weights import with_even_weights
from megakd.losses.stage_losses import StageLosses, label_objective, stage_losses
from megakd.models.fitting import build_empty
from megakd.models.knowledge import Needs, language_model_head
from megakd.models.lora import add_adapters
from megakd.models.packed_attention import VARLEN, attention_name, register_packed_attention
from megakd.models.second_vocabulary import SecondSize, build_second_vocabulary
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.models.valueless_experts import send_tokens_to_one_expert
from megakd.planning.cluster import Cluster, Device
from megakd.planning.moments import Trace
from megakd.planning.pruned import Pruned, largest_mask, pruned
from megakd.planning.routed import answers_to_parts, waiting_bytes, with_even_parts
from megakd.planning.stages import Phase
from megakd.planning.tracing import VALUELESS, repeat_alike, trace_call
from megakd.pruning.importance import GateGradients
from megakd.teachers.frozen import FrozenModel
from megakd.training.engines import second_sizes

PLANS = 100
"""Number of steps over which the use of teachers is counted."""


class Measured(NamedTuple):
    """The losses of held-out rows, without gradient: teachers, bytes of their outputs, learner."""

    teachers: Mapping[str, Trace]
    answers: int
    learner: Trace


@dataclass(frozen=True, kw_only=True)
class SimulatedPhase:
    """A traced phase.

    teachers: the forward of each frozen model by name.
    asked: mean number of answers per micro-batch of each teacher.
    per_call: number of micro-batches that each teacher answers in one forward.
    answers: bytes of the outputs of a step's teachers, kept while the learner runs.
    learner: each group of passes of the learner with its backward.
    masked: the same of a learner that has lost its first units; empty if it loses none.
    of_one_view: peak bytes of activations of the first pass, if several views share a backward.
    evaluation: evaluation of the learner, without gradient.
    measured: the losses of an evaluation that also measures them; None if a step needs more.
    pruned: what is left of a learner that is pruned in the phase.
    """

    teachers: Mapping[str, Trace]
    asked: Mapping[str, float] = field(default_factory=dict)
    per_call: Mapping[str, int] = field(default_factory=dict)
    answers: int = 0
    learner: Sequence[Trace] = ()
    masked: Sequence[Trace] = ()
    of_one_view: int | None = None
    evaluation: Trace | None = None
    measured: Measured | None = None
    pruned: Pruned | None = None


class Traces(dict[str, SimulatedPhase]):
    """Cache of traced phases by everything that they depend on, which sharding is not."""


def simulated_phase(
    phase: Phase, config: RunConfig, cluster: Cluster, known: Traces
) -> SimulatedPhase:
    """Trace a phase with models that have no memory.

    Raises:
        MegakdError: the losses cannot work with these models.
    """
    tracer = _Tracer(phase, config, cluster)
    key = tracer.key()
    if key not in known:
        known[key] = tracer.alone() if phase.stage is None else tracer.training(phase.stage)
    return known[key]


def planned_dtype(teacher: ReadyTeacher, device: Device) -> Dtype:
    """Return the dtype of a frozen model according to its config; weight files are not read."""
    stored = teacher.source.config.dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return frozen_dtype(teacher.spec, stored, device)


class _Tracer:
    """Traces one phase."""

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster) -> None:
        self._phase, self._config, self._task = phase, config, config.task
        self._device: Device = cluster.device
        self._memory = cluster.device_memory if cluster.device == "cuda" else None

    def key(self) -> str:
        """Return everything that the traces depend on."""
        phase, stage = self._phase, self._phase.stage
        frozen = [
            (name, planned_dtype(ready, self._device), _shown(ready.source))
            for name, ready in phase.teachers.items()
        ]
        on = (self._device, self._memory)
        facts = (on, self._task, phase.work, phase.rows, phase.with_width, frozen)
        if stage is None:
            return repr(facts)
        train, learners = stage.train, list(map(_shown, phase.learners.values()))
        # A strategy that is not made of plain values lists the values that it depends on.
        strategy = (type(stage.strategy).__name__, getattr(stage.strategy, "facts", stage.strategy))
        losses = (stage.objective, stage.views, strategy)
        pruning = (stage.strategy.pruned_to, stage.measures_losses, stage.mixed)
        rows = (largest_step(train, self._task), self._config.eval_rows(train))
        dtype = training_dtype(train, self._device)
        repeats = (train.gradient_checkpointing, train.activation_offload)
        held = (dtype, repeats, stage.passes_per_backward)
        held += (self._config.lora_of(stage.role), [*phase.bases])
        return repr((facts, learners, losses, pruning, rows, held, self._sharding()))

    def _sharding(self) -> list[Any]:
        specs = [ready.spec for ready in self._phase.teachers.values()]
        return [(spec.micro_batches_per_call, spec.deepspeed) for spec in specs]

    def training(self, stage: Stage) -> SimulatedPhase:
        """Trace the training of a student with teachers."""
        step = largest_step(stage.train, self._task)
        batch = self._batch(step.rows, length=step.length)
        batch = batch._replace(others=self._mixed(stage, batch) or None)
        batch = with_even_parts(batch, stage, self._part)
        losses = self._losses(stage)
        per_call = {
            name: self._per_call(stage, ready, losses.teacher_needs())
            for name, ready in self._phase.teachers.items()
        }
        teachers, answers = self._asked(losses, batch, per_call)
        knowledge = {
            name: part_of(said, next(parts_of([batch] * per_call[name])))
            for name, said in answers.items()
        }
        plans = [teacher_names(stage.strategy.passes(step)) for step in range(PLANS)]
        sizes = {name: _said_bytes(said) for name, said in answers.items()}
        waiting = [waiting_bytes(plan, sizes, routed=stage.strategy.routes_rows) for plan in plans]
        bundle = self._bundle(stage, losses)
        found = self._learner(stage, bundle, batch, answers_to_parts(batch, knowledge))
        scored = self._batch(self._config.eval_rows(stage.train))
        evaluation, _ = self._forward(bundle.eval(), scored, view=next(iter(stage.views), None))
        return replace(
            found,
            teachers=teachers,
            per_call=per_call,
            asked={name: sum(name in plan for plan in plans) / PLANS for name in teachers},
            answers=max(waiting),
            evaluation=evaluation,
            measured=self._measured(stage, bundle, losses, scored),
        )

    def _per_call(self, stage: Stage, ready: ReadyTeacher, needs: Needs) -> int:
        dtype = planned_dtype(ready, self._device)
        return micro_batches_per_call(
            ready, needs, stage.train, self._config, dtype=dtype, device=self._device
        )

    def _asked(
        self, losses: StageLosses, batch: Batch, per_call: Mapping[str, int]
    ) -> tuple[dict[str, Trace], dict[str, Knowledge]]:
        teachers: dict[str, Trace] = {}
        knowledge: dict[str, Knowledge] = {}
        for name, ready in self._phase.teachers.items():
            frozen = self._frozen(ready, losses.teacher_needs())
            together = joined([batch] * per_call[name]) if per_call[name] > 1 else batch
            teachers[name], said = self._forward(frozen, together)
            if said.hidden is not None:
                said = said._replace(head=language_model_head(frozen.model))
            knowledge[name] = said
        return teachers, knowledge

    def _learner(
        self, stage: Stage, bundle: StudentBundle, batch: Batch, knowledge: Mapping[str, Knowledge]
    ) -> SimulatedPhase:
        """Trace the passes of a step, of a learner that is pruned also with its first mask."""

        def backward_of(passes: Sequence[Pass]) -> Trace:
            call = partial(bundle, batch, knowledge, passes, _ones(bundle))
            return self._trace(bundle, call, backward=True)[0]

        groups = backward_groups(stage.strategy.passes(0), stage.passes_per_backward)
        found = SimulatedPhase(teachers={}, learner=[backward_of(group) for group in groups])
        if len({planned.view for planned in groups[0]}) > 1:
            of_one_view = max(m.live.total for m in backward_of(groups[0][:1]).moments)
            found = replace(found, of_one_view=of_one_view)
        if bundle.elastic is None or stage.strategy.pruned_to is None:
            return found
        mask = largest_mask(bundle.elastic.prunable, stage.strategy.pruned_to)
        bundle.elastic.keep(mask)
        masked = () if mask is None else [backward_of(group) for group in groups]
        return replace(found, masked=masked, pruned=pruned(bundle, stage.strategy.pruned_to))

    def _measured(
        self, stage: Stage, bundle: StudentBundle, losses: StageLosses, batch: Batch
    ) -> Measured | None:
        step = largest_step(stage.train, self._task)
        if not stage.measures_losses or batch.valid.numel() <= step.tokens:
            return None
        once = dict.fromkeys(self._phase.teachers, 1)
        teachers, knowledge = self._asked(losses, batch, once)
        said, passes = sum(map(_said_bytes, knowledge.values())), stage.strategy.passes(0)
        scored = tuple(stage.views) or (None,)
        trace, _ = self._forward(
            bundle.eval(), batch, knowledge, passes, _ones(bundle), scored=scored
        )
        return Measured(teachers, said, trace)

    def alone(self) -> SimulatedPhase:
        """Trace work with frozen models: importance, scoring, timing."""
        teachers = self._phase.teachers
        return SimulatedPhase(teachers={name: self._work(one) for name, one in teachers.items()})

    def _work(self, ready: ReadyTeacher) -> Trace:
        phase, frozen = self._phase, self._frozen(ready, Needs())
        if phase.work == "timing":
            shape = (phase.rows, self._task.row_length)
            ids = torch.ones(shape, dtype=torch.long, device=VALUELESS)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return self._forward(frozen.model, **inputs)[0]
        batch = self._batch(phase.rows)
        if phase.work == "scoring":
            return self._forward(frozen, batch, scoring=True)[0]
        objective = label_objective(ready.source, self._task.type, _classes(ready.source))
        gates = GateGradients(frozen, objective, VALUELESS, with_width=phase.with_width)
        return self._forward(gates.eval(), batch)[0]

    def _forward(self, module: nn.Module, *args: Any, **options: Any) -> tuple[Trace, Any]:
        call = partial(module, *args, **options)
        return self._trace(module, call, backward=False)

    def _trace(
        self, module: nn.Module, call: Callable[[], Any], *, backward: bool
    ) -> tuple[Trace, Any]:
        return trace_call(module, call, backward=backward, device=self._device, memory=self._memory)

    def _frozen(self, ready: ReadyTeacher, needs: Needs) -> FrozenModel:
        model = self._model(ready.source, planned_dtype(ready, self._device))
        model.requires_grad_(requires_grad=False)
        return FrozenModel(model, needs=needs, label_order=None, kernels="chunked").eval()

    def _bundle(self, stage: Stage, losses: StageLosses) -> StudentBundle:
        dtype = training_dtype(stage.train, self._device)
        learners = {role: self._model(one, dtype) for role, one in self._phase.learners.items()}
        with VALUELESS:
            for role, size in self._second_sizes(stage).items():
                model, kind = learners[role], TORCH_DTYPE[dtype]
                build_second_vocabulary(model, size, ds=None, dtype=kind)
            lora = self._config.lora_of(stage.role)
            if lora is not None:
                source, model = self._phase.learner, learners[stage.role]
                add_adapters(model, source, self._task, lora, seed=self._config.seed)
            bundle = build_bundle(
                losses, learners, dtype=TORCH_DTYPE[dtype], world_size=1, kernels="chunked"
            )
        if stage.train.gradient_checkpointing:
            for model in learners.values():
                offload = stage.train.activation_offload and self._device == "cuda"
                repeat_alike(model, self._device, offload=offload)
        return bundle.train()

    def _second_sizes(self, stage: Stage) -> dict[str, SecondSize]:
        vocabulary, learners = self._config.method.own_vocabulary, self._phase.learners
        offsets = [learners[role].config.vocab_size for role in stage.mixed if role in learners]
        if vocabulary is None or self._phase.student is None or not offsets:
            return {}
        return second_sizes(stage, self._phase.student, pieces=vocabulary.size, offset=max(offsets))

    def _mixed(self, stage: Stage, batch: Batch) -> dict[str, Batch]:
        """Return the rows as models with a tokenizer of their own read them, by role."""
        found = {}
        for role, reading in stage.mixed.items():
            count = 0 if batch.targets is None else len(batch.targets)
            second = math.ceil(reading.probability * count)
            with VALUELESS:
                numbers = [
                    torch.ones(max(1, n), dtype=torch.long) for n in (count - second, second)
                ]
            targets = Targets(numbers[1], numbers[1])
            found[role] = batch._replace(targets=numbers[0], second=targets)
        return found

    def _losses(self, stage: Stage) -> StageLosses:
        classes = _classes(self._phase.learner)
        return stage_losses(
            replace(stage, objective=with_even_weights(stage.objective, classes)),
            self._task.type,
            learners=self._phase.learners,
            teachers=self._phase.teaching,
            classes=classes,
        )

    def _model(self, source: ModelSource, dtype: Dtype) -> Any:
        with VALUELESS:
            model = build_empty(source, self._task, source.config, TORCH_DTYPE[dtype])
        send_tokens_to_one_expert(model)
        device = torch.device(self._device)
        if attention_name(model, source, self._task.type, device) == VARLEN:
            register_packed_attention()
            model.set_attn_implementation(VARLEN)
        return model

    def _part(self, rows: int, length: int) -> Batch:
        return self._batch(rows, length=length)

    def _batch(self, rows: int, *, length: int | None = None) -> Batch:
        task = self._task
        length = length or task.row_length
        with VALUELESS:
            valid = torch.ones((rows, length), dtype=torch.bool)
            ids = torch.ones((rows, length), dtype=torch.long)
            if task.type == "causal_lm":
                inputs = {"input_ids": ids, "position_ids": ids.clone()}
                # Half of the positions for each source, in values: losses select rows by them.
                halves = torch.arange(ids.numel(), device="cpu").view(ids.shape) % 2 == 0
                starts = torch.ones(ids.numel() // task.row_length + 1, dtype=torch.int32)
                texts = Documents(starts, task.row_length)
                return Batch(inputs, ids.clone(), valid, documents=texts, is_rollout=halves)
            others = {name: ids.clone() for name in ("attention_mask", "token_type_ids")}
            inputs = {"input_ids": ids, **others}
            if task.type == "mlm":
                share = task.mlm_probability or DEFAULT_PROBABILITY
                targets = torch.ones(math.ceil(share * rows * length), dtype=torch.long)
                return Batch(inputs, ids.clone(), valid, targets)
            dtype = torch.float32 if task.type == "regression" else torch.long
            return Batch(inputs, torch.ones(rows, dtype=dtype), valid)


def _ones(bundle: StudentBundle) -> dict[Unit, torch.Tensor]:
    """Return a count of 1 for every unit of the losses."""
    return dict.fromkeys(bundle.counters, torch.ones((), dtype=torch.long, device=VALUELESS))


def _said_bytes(said: Knowledge) -> int:
    """Return the bytes of the outputs of a frozen teacher."""
    attention = [part for vectors in said.attention if vectors for part in vectors[:3]]
    tensors = (said.logits, said.hidden, *said.hidden_states, *attention)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _classes(source: ModelSource) -> int:
    """Return the number of classes, the same for all planned models; see `planned_sources`."""
    return source.config.num_labels or 0


def _shown(source: ModelSource) -> str:
    return source.config.to_json_string(use_diff=False)
