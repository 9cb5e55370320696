"""The traces of a phase: its models, without values, run one step; each phase is traced once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megakd.config.run import RunConfig
from megakd.contract.batch import Batch, Documents, Extras, Knowledge, Targets, Unit, Within
from megakd.contract.joined_batches import joined, part_of, parts_of
from megakd.contract.stage import Constant, Pass, Stage, backward_groups, teacher_names
from megakd.contract.tasks import Dtype
from megakd.contract.views import Cut, UnitOrder, View
from megakd.data.masking import DEFAULT_PROBABILITY
from megakd.inputs.precision import TORCH_DTYPE, frozen_dtype, training_dtype
from megakd.inputs.step_size import largest_step, micro_batches_per_call
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.objective import StageLosses, label_objective, stage_losses, with_even_weights
from megakd.models.architectures import architecture_of
from megakd.models.axes import lengths
from megakd.models.fitting import build_empty
from megakd.models.knowledge import Needs, language_model_head
from megakd.models.lora import add_adapters
from megakd.models.packed_attention import VARLEN, attention_name, register_packed_attention
from megakd.models.second_vocabulary import SecondSize, build_second_vocabulary
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.planning.cluster import Cluster, Device
from megakd.planning.planning_lab import Phase
from megakd.planning.tracing import VALUELESS, Inventory, Parameter, Trace, repeat_alike, trace_call
from megakd.pruning.importance import GateGradients
from megakd.teachers.frozen import FrozenModel
from megakd.training.assembly import second_sizes

PLANS = 100  # steps over which the use of teachers is counted


class TracedMemory(NamedTuple):
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
    measured: TracedMemory | None = None
    pruned: Pruned | None = None


class Traces(dict[str, SimulatedPhase]):
    """Cache of traced phases by everything that they depend on, which sharding is not."""


def simulated_phase(
    phase: Phase, config: RunConfig, cluster: Cluster, known: Traces
) -> SimulatedPhase:
    """Trace a phase with models that have no memory."""
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
    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster) -> None:
        self._phase, self._config, self._task = phase, config, config.task
        self._device: Device = cluster.device
        self._trace = partial(trace_call, device=self._device)

    def key(self) -> str:
        # The traces do not depend on the learner's sharding.
        phase, stage, config = self._phase, self._phase.stage, self._config
        frozen = [
            (name, planned_dtype(one, self._device), _shown(one.source))
            for name, one in phase.teachers.items()
        ]
        work = (phase.work, phase.rows, phase.with_width)
        specs = [ready.spec for ready in phase.teachers.values()]
        calls = [(spec.micro_batches_per_call, spec.deepspeed) for spec in specs]
        facts = (self._device, self._task, work, frozen, calls)
        if stage is None:
            return repr(facts)
        # A strategy that is not made of plain values lists the values that it depends on.
        planned = stage.strategy
        strategy = (type(planned).__name__, getattr(planned, "facts", planned), planned.pruned_to)
        others = {"deepspeed": None, "strategy": Constant(), "start": None, "judge": None}
        learners = [(role, _shown(source)) for role, source in phase.learners.items()]
        of_stage = (replace(stage, name="", **others), strategy, learners, [*phase.bases])
        of_config = (config.lora_of(stage.role), config.eval_rows(stage.train))
        return repr((facts, of_stage, of_config))

    def training(self, stage: Stage) -> SimulatedPhase:
        step = largest_step(stage.train, self._task)
        batch = self._batch(step.rows, step.length)
        batch = batch.extended(others=self._mixed(stage, batch) or None)
        batch = _with_even_parts(batch, stage, self._batch)
        losses = self._losses(stage)
        per_call = {
            name: micro_batches_per_call(
                ready,
                losses.teacher_needs(),
                stage.train,
                self._config,
                dtype=planned_dtype(ready, self._device),
                device=self._device,
            )
            for name, ready in self._phase.teachers.items()
        }
        teachers, answers = self._asked(losses, batch, per_call)
        # Of the first micro-batch of a call, cut to the teacher's part if rows name their teachers.
        is_divided = stage.strategy.routes_rows
        knowledge = {
            name: part_of(answer, next(parts_of([batch.of(name) if is_divided else batch])))
            for name, answer in answers.items()
        }
        plans = [teacher_names(stage.strategy.passes(step)) for step in range(PLANS)]
        sizes = {name: _answer_bytes(answer) for name, answer in answers.items()}
        waiting = [[sizes[name] for name in plan if name in sizes] for plan in plans]
        in_step = partial(max, default=0) if is_divided else sum
        bundle = self._bundle(stage, losses)
        phase = self._learner(stage, bundle, batch, knowledge)
        scored = self._batch(self._config.eval_rows(stage.train))
        evaluation, _ = self._forward(bundle.eval(), scored, view=next(iter(stage.views), None))
        return replace(
            phase,
            teachers=teachers,
            per_call=per_call,
            asked={name: sum(name in plan for plan in plans) / PLANS for name in teachers},
            answers=max(map(in_step, waiting)),
            evaluation=evaluation,
            measured=self._measured(stage, bundle, losses, scored),
        )

    def _asked(
        self, losses: StageLosses, batch: Batch, per_call: Mapping[str, int]
    ) -> tuple[dict[str, Trace], dict[str, Knowledge]]:
        teachers: dict[str, Trace] = {}
        knowledge: dict[str, Knowledge] = {}
        for name, ready in self._phase.teachers.items():
            frozen = self._frozen(ready, losses.teacher_needs())
            together = joined([batch] * per_call[name]) if per_call[name] > 1 else batch
            teachers[name], answer = self._forward(frozen, together)
            if answer.hidden is not None:
                answer = answer._replace(head=language_model_head(frozen.model))
            knowledge[name] = answer
        return teachers, knowledge

    def _learner(
        self, stage: Stage, bundle: StudentBundle, batch: Batch, knowledge: Mapping[str, Knowledge]
    ) -> SimulatedPhase:
        # Trace the passes of a step, of a learner that is pruned also with its first mask.

        def backward_of(passes: Sequence[Pass]) -> Trace:
            call = partial(bundle, batch, knowledge, passes, _ones(bundle))
            return self._trace(bundle, call, backward=True)[0]

        groups = backward_groups(stage.strategy.passes(0), stage.passes_per_backward)
        phase = SimulatedPhase(teachers={}, learner=[backward_of(group) for group in groups])
        if len({planned.view for planned in groups[0]}) > 1:
            moments = backward_of(groups[0][:1]).moments
            phase = replace(phase, of_one_view=max(moment.live.total for moment in moments))
        if bundle.elastic is None or stage.strategy.pruned_to is None:
            return phase
        mask = largest_mask(bundle.elastic.prunable, stage.strategy.pruned_to)
        bundle.elastic.keep(mask)
        masked = () if mask is None else [backward_of(group) for group in groups]
        return replace(phase, masked=masked, pruned=pruned(bundle, stage.strategy.pruned_to))

    def _measured(
        self, stage: Stage, bundle: StudentBundle, losses: StageLosses, batch: Batch
    ) -> TracedMemory | None:
        step = largest_step(stage.train, self._task)
        if not stage.measures_losses or batch.valid.numel() <= step.tokens:
            return None
        once = dict.fromkeys(self._phase.teachers, 1)
        teachers, knowledge = self._asked(losses, batch, once)
        answers, passes = sum(map(_answer_bytes, knowledge.values())), stage.strategy.passes(0)
        scored = tuple(stage.views) or (None,)
        trace, _ = self._forward(
            bundle.eval(), batch, knowledge, passes, _ones(bundle), scored=scored
        )
        return TracedMemory(teachers, answers, trace)

    def alone(self) -> SimulatedPhase:
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
        return self._trace(module, partial(module, *args, **options), backward=False)

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
        batches = {}
        for role, reading in stage.mixed.items():
            count = 0 if batch.targets is None else len(batch.targets)
            second = math.ceil(reading.probability * count)
            with VALUELESS:
                numbers = [
                    torch.ones(max(1, n), dtype=torch.long) for n in (count - second, second)
                ]
            targets = Targets(numbers[1], numbers[1])
            batches[role] = batch._replace(targets=numbers[0]).extended(second=targets)
        return batches

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
        name = attention_name(model, source, self._task.type, torch.device(self._device))
        if name == VARLEN:
            register_packed_attention()
        if name in (VARLEN, "sdpa", "eager"):
            model.set_attn_implementation(name)
        return model

    def _batch(self, rows: int, length: int | None = None) -> Batch:
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
                return Batch(
                    inputs, ids.clone(), valid, documents=texts, extras=Extras(is_rollout=halves)
                )
            others = {name: ids.clone() for name in ("attention_mask", "token_type_ids")}
            inputs = {"input_ids": ids, **others}
            if task.type == "mlm":
                share = task.mlm_probability or DEFAULT_PROBABILITY
                targets = torch.ones(math.ceil(share * rows * length), dtype=torch.long)
                return Batch(inputs, ids.clone(), valid, targets)
            dtype = torch.float32 if task.type == "regression" else torch.long
            return Batch(inputs, torch.ones(rows, dtype=dtype), valid)


def _ones(bundle: StudentBundle) -> dict[Unit, torch.Tensor]:
    return dict.fromkeys(bundle.counters, torch.ones((), dtype=torch.long, device=VALUELESS))


def _answer_bytes(answer: Knowledge) -> int:
    attention = [part for vectors in answer.attention if vectors for part in vectors[:3]]
    tensors = (answer.logits, answer.hidden, *answer.hidden_states, *attention)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _classes(source: ModelSource) -> int:
    # Return the number of classes, the same for all planned models; see `planned_sources`.
    return source.config.num_labels or 0


def _shown(source: ModelSource) -> str:
    return f"{source.attn_implementation} {source.config.to_json_string(use_diff=False)}"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """Weights that remain at the end of a stage with `pruned_to`.

    weights: those that the engine trains, as they are cut, in the order of the engine's module.
    makers: numbers of the weights that produce units; the strategy keeps values for them.
    parameters, width: size of the learner, without projections and heads of the losses.
    """

    weights: Inventory
    makers: frozenset[int]
    parameters: int
    width: int


def pruned(bundle: StudentBundle, end: View) -> Pruned:
    """Return what is left of a bundle whose first learner is cut to the units `end`."""
    axes, student = bundle.axes, bundle.student
    names = bundle.elastic.makers if bundle.elastic else ()
    made = {id(student.get_parameter(name)) for name in names}
    weights = list(bundle.named_parameters())
    shapes = [
        lengths(weight.shape, axes.get(name, (None,) * weight.dim()), end)
        for name, weight in weights
    ]
    left = Inventory(Parameter(math.prod(shape)) for shape in shapes)
    students = {id(weight) for weight in student.parameters()}
    learner = [number for number, (_, weight) in enumerate(weights) if id(weight) in students]
    makers = frozenset(number for number, (_, weight) in enumerate(weights) if id(weight) in made)
    return Pruned(
        weights=left, makers=makers, parameters=left.of(learner).numel, width=end.width or 0
    )


def largest_mask(units: View, end: View) -> Cut | None:
    """Return the largest part of a learner that loses units; None if no unit is lost.

    The first steps after a removal need the most memory: the activations are nearly whole, and the
    forward copies the kept part of every weight. Here every kind of units that shrinks loses one
    unit, the first, so that no part is a prefix of its weight, which would not be copied.
    """
    view = View(
        tuple(map(_less, units.heads, end.heads)),
        tuple(map(_less, units.neurons, end.neurons)),
        None if units.width is None else _less(units.width, end.width),
        None if units.head_width is None else _less(units.head_width, end.head_width),
    )
    if view == units:
        return None
    inside = None
    if units.head_width is not None:
        columns = _last(units.head_width, view.head_width)
        inside = tuple((columns,) * heads for heads in units.heads)
    order = UnitOrder(
        tuple(map(_last, units.heads, view.heads)),
        tuple(map(_last, units.neurons, view.neurons)),
        None if units.width is None else _last(units.width, view.width),
        inside,
        inside,
    )
    return Cut(order, view)


def _less(count: int, end: int | None) -> int:
    return count if end is None else max(end, count - 1)


def _last(count: int, kept: int | None) -> tuple[int, ...]:
    lost = 0 if kept is None else count - kept
    return (*range(lost, count), *range(lost))


def _with_even_parts(batch: Batch, stage: Stage, make: Callable[[int, int], Batch]) -> Batch:
    # Return a micro-batch in which every teacher has an equal part, if rows name their teachers.
    # The student's losses need about the same memory for every division of the rows. Only the
    # largest forward of a teacher depends on the division: it has all rows of a micro-batch.
    if not stage.strategy.routes_rows:
        return batch
    (rows, length), teachers = batch.valid.shape, stage.teachers
    if rows < len(teachers):  # the positions of a packed row are divided
        length = math.ceil(rows * length / len(teachers))
    part = make(math.ceil(rows / len(teachers)), length)
    targets = None if part.targets is None else torch.ones_like(part.targets)
    with VALUELESS:
        places = torch.ones(part.valid.shape, dtype=torch.long)
        within = Within(places[:, 0], places, targets)
    return batch.extended(others=dict.fromkeys(teachers, part.extended(within=within)))


def send_tokens_to_one_expert(model: PreTrainedModel) -> None:
    """Let a mixture on the meta device use one expert of each layer for all tokens.

    The tensors have the shapes of transformers' grouped product, which the meta device supports
    only in bf16, and the products have as many operations. A dense model does not change.
    """
    if architecture_of(model.config).experts is not None:
        ALL_EXPERTS_FUNCTIONS.register("one_expert", _of_one_expert)
        model.set_experts_implementation("one_expert")


def _of_one_expert(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    rows = hidden.repeat_interleave(chosen.shape[1], dim=0)  # [N * k, D]
    # transformers gives its modules this method.
    gated = experts._apply_gate(_of_first_expert(experts, "gate_up_proj", rows))  # noqa: SLF001
    outputs = _of_first_expert(experts, "down_proj", gated) * weights.reshape(-1, 1)
    return outputs.unflatten(0, chosen.shape).sum(1).to(hidden.dtype)


def _of_first_expert(experts: nn.Module, name: str, rows: Tensor) -> Tensor:
    weight = experts.get_parameter(name)[0]
    product = rows @ (weight if experts.is_transposed else weight.T)
    return product + experts.get_parameter(f"{name}_bias")[0] if experts.has_bias else product
