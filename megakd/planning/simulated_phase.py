"""The traces of a phase; each trace runs once, however often a plan uses it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from megakd.config.run import RunConfig
from megakd.contract.batch import Batch, Knowledge
from megakd.contract.stage import Pass, Stage, backward_groups, teacher_names
from megakd.contract.tasks import Dtype
from megakd.data.loader import StepShape
from megakd.data.masking import DEFAULT_PROBABILITY
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.class_weights import with_even_weights
from megakd.losses.stage_losses import StageLosses, label_objective, stage_losses
from megakd.models.fitting import build_empty
from megakd.models.knowledge import Needs, language_model_head
from megakd.models.source import ModelSource
from megakd.planning.cluster import Device
from megakd.planning.moments import Inventory, Trace
from megakd.planning.stages import Phase
from megakd.planning.tracing import VALUELESS, inventory, repeat_alike, trace_call
from megakd.pruning.importance import GateGradients
from megakd.reports.latency import TIMED_BATCHES
from megakd.teachers.frozen import FrozenModel
from megakd.training.engines import ReadyTeacher
from megakd.training.precision import TORCH_DTYPE, frozen_dtype, training_dtype

PLANS = 100
"""Number of steps over which the use of teachers is counted."""
Made = TypeVar("Made")


class TracedModel(NamedTuple):
    """The weights of one engine and its traces.

    runs: a forward; for a learner, each group of passes with its backward.
    said: the outputs of the first run.
    single: the first pass of a learner alone, if several passes share a backward.
    """

    inventory: Inventory
    runs: tuple[Trace, ...]
    said: Any = None
    single: Trace | None = None


@dataclass(frozen=True, kw_only=True)
class SimulatedPhase:
    """A traced phase.

    teachers: by name. asked: mean number of answers per micro-batch of each teacher.
    evaluation: evaluation of the learner, without gradient.
    answers: bytes of the outputs of a step's teachers, kept while the learner runs.
    """

    teachers: dict[str, TracedModel]
    asked: dict[str, float] = field(default_factory=dict)
    learner: TracedModel = field(default_factory=lambda: TracedModel(Inventory(()), ()))
    evaluation: Trace | None = None
    answers: int = 0


class Traces:
    """Cache of traces by everything that they depend on; they do not depend on sharding."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """Return the value for this key; call `make` if it does not exist yet."""
        name = repr(key)
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


def simulated_phase(
    phase: Phase, config: RunConfig, device: Device, known: Traces
) -> SimulatedPhase:
    """Trace a phase with models that have no memory.

    Raises:
        MegakdError: the losses cannot work with these models.
    """
    tracer = PhaseTracer(config, device, known)
    if phase.stage is None:
        return tracer.alone(phase)
    return tracer.training(phase, phase.stage)


def planned_dtype(teacher: ReadyTeacher, device: Device) -> Dtype:
    """Return the dtype of a frozen model according to its config; weight files are not read."""
    stored = teacher.source.config.dtype
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    return frozen_dtype(teacher.spec, stored, device)


class PhaseTracer:
    """Traces the phases of a run."""

    def __init__(self, config: RunConfig, device: Device, known: Traces) -> None:
        self.config, self._known = config, known
        self._device: Device = device

    def training(self, phase: Phase, stage: Stage) -> SimulatedPhase:
        """Trace the training of a student with teachers."""
        rows = stage.train.per_device_train_batch_size
        batch = self._known.once(("batch", self.config.task, rows), lambda: self._batch(rows))
        needs = self._losses(stage, phase).teacher_needs()
        answers = {
            name: self._known.once(
                ("teacher", *self._traits(ready), self.config.task, rows, needs),
                lambda ready=ready: self._answer(ready, batch, needs),
            )
            for name, ready in phase.teachers.items()
        }
        knowledge = {name: answer.said for name, answer in answers.items()}
        train = stage.train
        traits = (
            *(
                list(map(_shown, phase.learners.values())),
                self.config.task,
                stage.objective,
                stage.views,
            ),
            stage.reads_states,
            *(train.bf16, train.fp16, list(map(self._traits, phase.teachers.values()))),
        )
        passes = (rows, train.gradient_checkpointing, stage.strategy, stage.passes_per_backward)
        learned = self._known.once(
            ("learner", *traits, *passes), lambda: self._learn(phase, stage, batch, knowledge)
        )
        scored = self.config.eval_rows(stage.train)
        evaluation = self._known.once(
            ("evaluation", *traits, scored), lambda: self._evaluation(phase, stage, scored)
        )
        plans = [teacher_names(stage.strategy.passes(step)) for step in range(PLANS)]
        return SimulatedPhase(
            teachers=answers,
            asked={name: sum(name in plan for plan in plans) / PLANS for name in answers},
            learner=learned,
            evaluation=evaluation,
            answers=max(_bytes_of_answers(knowledge, plan) for plan in plans),
        )

    def _traits(self, ready: ReadyTeacher) -> tuple[str, str, str]:
        """Return the traits of a frozen model that its trace depends on."""
        return _shown(ready.source), planned_dtype(ready, self._device), self._device

    def _traced(self, module: nn.Module, call: Callable[[], Any]) -> TracedModel:
        """Trace a forward without gradient."""
        run = trace_call(module, call, backward=False, device=self._device)
        return TracedModel(inventory(module), (run.trace,), run.said)

    def _answer(self, ready: ReadyTeacher, batch: Batch, needs: Needs) -> TracedModel:
        dtype = planned_dtype(ready, self._device)
        model = self._model(ready.source, dtype).requires_grad_(requires_grad=False)
        frozen = self._frozen(model, needs)
        traced = self._traced(frozen, lambda: frozen(batch))
        return traced._replace(said=_with_head(traced.said, model))

    def _learn(
        self, phase: Phase, stage: Stage, batch: Batch, knowledge: dict[str, Knowledge]
    ) -> TracedModel:
        bundle = self._bundle(phase, stage)
        one = torch.ones((), dtype=torch.long, device=VALUELESS)
        counts = dict.fromkeys(bundle.counters, one)

        def backward_of(passes: Sequence[Pass]) -> Trace:
            def call() -> Any:
                return bundle(batch, knowledge, passes, counts)

            return trace_call(bundle, call, backward=True, device=self._device).trace

        plan = stage.strategy.passes(0)
        groups = backward_groups(plan, stage.passes_per_backward)
        runs = tuple(backward_of(group) for group in groups)
        several = len({planned.view for planned in groups[0]}) > 1
        single = backward_of(groups[0][:1]) if several else None
        return TracedModel(inventory(bundle), runs, single=single)

    def _evaluation(self, phase: Phase, stage: Stage, rows: int) -> Trace:
        bundle = self._bundle(phase, stage).eval()
        view = {"view": next(iter(stage.views))} if stage.views else {}
        batch = self._batch(rows)
        return self._traced(bundle, lambda: bundle(batch, **view)).runs[0]

    def alone(self, phase: Phase) -> SimulatedPhase:
        """Trace work with frozen models: importance, scoring, timing."""
        measured = phase.importance
        if measured is not None:
            gates = functools.partial(self._gates, with_width=measured.with_width)
            rows, play = self._importance_rows(measured.batch_size), gates
        elif phase.work == "scoring":
            rows, play = self.config.eval_rows(), self._predictions
        else:
            rows, play = max(TIMED_BATCHES), self._forward
        key = (phase.work, self.config.task, measured, rows)
        return SimulatedPhase(
            teachers={
                name: self._known.once(
                    (*key, *self._traits(ready)), lambda ready=ready: play(ready, rows)
                )
                for name, ready in phase.teachers.items()
            }
        )

    def _predictions(self, ready: ReadyTeacher, rows: int) -> TracedModel:
        model = self._model(ready.source, planned_dtype(ready, self._device))
        frozen, batch = self._frozen(model, Needs()), self._batch(rows)
        return self._traced(frozen, lambda: frozen(batch, scoring=True))

    def _forward(self, ready: ReadyTeacher, rows: int) -> TracedModel:
        model = self._model(ready.source, planned_dtype(ready, self._device)).eval()
        with VALUELESS:
            ids = torch.ones((rows, self.config.task.max_length), dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return self._traced(model, lambda: model(**inputs))

    def _importance_rows(self, batch_size: int) -> int:
        """Return the rows of a micro-batch on one rank; several ranks may use fewer rows."""
        most = self.config.train.per_device_train_batch_size
        return StepShape.of_batch(batch_size, most, rank=0, world=1).per_device

    def _gates(self, ready: ReadyTeacher, rows: int, *, with_width: bool) -> TracedModel:
        source, dtype = ready.source, planned_dtype(ready, self._device)
        model = self._model(source, dtype).requires_grad_(requires_grad=False)
        objective = label_objective(source, self.config.task.type, _classes(source))
        frozen = self._frozen(model, Needs())
        module = GateGradients(frozen, objective, VALUELESS, with_width=with_width).eval()
        batch = self._batch(rows)
        return self._traced(module, lambda: module(batch))

    def _frozen(self, model: nn.Module, needs: Needs) -> FrozenModel:
        return FrozenModel(model, needs=needs, label_order=None, kernels="chunked").eval()

    def _bundle(self, phase: Phase, stage: Stage) -> StudentBundle:
        dtype = training_dtype(stage.train)
        learners = {role: self._model(one, dtype) for role, one in phase.learners.items()}
        with VALUELESS:
            bundle = build_bundle(
                self._losses(stage, phase),
                learners,
                dtype=TORCH_DTYPE[dtype],
                world_size=1,
                kernels="chunked",
            )
        if stage.train.gradient_checkpointing:
            for model in learners.values():
                repeat_alike(model, self._device)
        return bundle.train()

    def _losses(self, stage: Stage, phase: Phase) -> StageLosses:
        classes = _classes(phase.learner)
        return stage_losses(
            replace(stage, objective=with_even_weights(stage.objective, classes)),
            self.config.task.type,
            learners=phase.learners,
            teachers=[ready.source for ready in phase.teachers.values()],
            classes=classes,
        )

    def _model(self, source: ModelSource, dtype: Dtype) -> Any:
        with VALUELESS:
            return build_empty(source, self.config.task, source.config, TORCH_DTYPE[dtype])

    def _batch(self, rows: int) -> Batch:
        """Return the largest possible batch: every text has `max_length` tokens."""
        with VALUELESS:
            return self._longest(rows)

    def _longest(self, rows: int) -> Batch:
        task = self.config.task
        shape = (rows, task.max_length)
        valid = torch.ones(shape, dtype=torch.bool)
        ids = torch.ones(shape, dtype=torch.long)
        if task.type == "causal_lm":
            return Batch({"input_ids": ids, "position_ids": ids.clone()}, ids.clone(), valid)
        inputs = {"input_ids": ids, "attention_mask": ids.clone(), "token_type_ids": ids.clone()}
        if task.type == "mlm":
            share = task.mlm_probability or DEFAULT_PROBABILITY
            targets = torch.ones(math.ceil(share * rows * task.max_length), dtype=torch.long)
            return Batch(inputs, ids.clone(), valid, targets)
        dtype = torch.float32 if task.type == "regression" else torch.long
        return Batch(inputs, torch.ones(rows, dtype=dtype), valid)


def _with_head(said: Knowledge, model: nn.Module) -> Knowledge:
    return said if said.hidden is None else said._replace(head=language_model_head(model))


def _bytes_of_answers(knowledge: Mapping[str, Knowledge], plan: Sequence[str]) -> int:
    """Return the bytes of the outputs of the frozen teachers of a step."""
    return sum(_said_bytes(said) for name, said in knowledge.items() if name in plan)


def _said_bytes(said: Knowledge) -> int:
    attention = [part for vectors in said.attention if vectors for part in vectors[:3]]
    tensors = (said.logits, said.hidden, *said.hidden_states, *attention)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _classes(source: ModelSource) -> int:
    """Return the number of classes, the same for all planned models; see `planned_sources`."""
    return source.config.num_labels or 0


def _shown(source: ModelSource) -> str:
    return source.config.to_json_string(use_diff=False)
