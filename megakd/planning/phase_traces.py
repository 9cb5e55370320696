"""The traces of a phase: its models, without values, run one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megakd.config.run import RunConfig
from megakd.contract.batch import Batch, Documents, Knowledge, Targets, Unit
from megakd.contract.joined_batches import joined, split
from megakd.contract.stage import Stage, backward_groups, teacher_names
from megakd.contract.tasks import Dtype
from megakd.contract.terms import source_of
from megakd.data.masking import DEFAULT_PROBABILITY
from megakd.inputs.precision import TORCH_DTYPE, frozen_dtype, training_dtype
from megakd.inputs.step_size import joins_micro_batches, largest_step
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.objective import StageLosses, label_objective, stage_losses, with_even_weights
from megakd.models.architectures import architecture_of
from megakd.models.fitting import build_empty
from megakd.models.knowledge import Needs, language_model_head
from megakd.models.lora import add_adapters
from megakd.models.packed_attention import VARLEN, attention_name, register_packed_attention
from megakd.models.second_vocabulary import SecondSize, build_second_vocabulary
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.planning.cluster import Device
from megakd.planning.planning_lab import Phase
from megakd.planning.tracing import VALUELESS, Trace, repeat_alike, trace_call
from megakd.pruning.importance import GateGradients
from megakd.teachers.frozen import FrozenModel
from megakd.training.assembly import second_sizes

_STEPS = 100  # over which the use of teachers is counted


@dataclass(frozen=True, kw_only=True)
class PhaseTraces:
    """A traced phase.

    teachers: the forward of each frozen model by name.
    asked: mean number of answers per micro-batch of each teacher.
    per_call: number of micro-batches that each teacher answers in one forward.
    answers: bytes of the outputs of a step's teachers, kept while the learner runs.
    learner: each group of passes of the learner with its backward.
    evaluated: forwards of an evaluation, of the learner by its role, and of teachers by name if
        an evaluation has larger batches than a step, and measures losses too.
    units: number of weights that produce units of a learner that is pruned; 0 for others.
    """

    teachers: Mapping[str, Trace]
    asked: Mapping[str, float] = field(default_factory=dict)
    per_call: Mapping[str, int] = field(default_factory=dict)
    answers: int = 0
    learner: Sequence[Trace] = ()
    evaluated: Mapping[str, Trace] = field(default_factory=dict)
    units: int = 0


def planned_dtype(teacher: ReadyTeacher, device: Device) -> Dtype:
    """Return the dtype of a frozen model according to its config; weight files are not read."""
    stored = teacher.source.config.dtype
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return frozen_dtype(teacher.spec, stored, device)


class PhaseTracer:
    """Builds the models of a phase without values, and traces its forwards and backwards."""

    def __init__(self, phase: Phase, config: RunConfig, device: Device) -> None:
        self._phase, self._config, self._task = phase, config, config.task
        self._device: Device = device
        self._trace = partial(trace_call, device=device)

    def traces(self) -> PhaseTraces:
        """Return the traces of the phase."""
        stage, teachers = self._phase.stage, self._phase.teachers
        if stage is None:
            return PhaseTraces(teachers={name: self._work(one) for name, one in teachers.items()})
        return self._training(stage)

    def _training(self, stage: Stage) -> PhaseTraces:
        step, losses = largest_step(stage.train, self._task), self._losses(stage)
        needs, strategy = losses.teacher_needs(), stage.strategy
        batch = self._batch(step.rows, step.length)
        batch = batch.extended(
            others=self._mixed(stage, batch) or None,
            is_rollout=any(source_of(term) == "rollouts" for term in stage.objective),
        )
        device, config = self._device, self._config
        per_call = {
            name: step.micro_batches
            if joins_micro_batches(
                one, needs, stage.train, config, dtype=planned_dtype(one, device), device=device
            )
            else 1
            for name, one in self._phase.teachers.items()
        }
        teachers, answers = self._asked(needs, batch, per_call)
        # Of the first of the micro-batches of a call.
        knowledge = {name: next(split(answer, [batch])) for name, answer in answers.items()}
        sizes = {name: _answer_bytes(answer) for name, answer in answers.items()}
        plans = [teacher_names(strategy.passes(number)) for number in range(_STEPS)]
        if config.method.routes_rows:  # a micro-batch has rows of one teacher
            plans = [(name,) for name in stage.teachers]
        bundle = self._bundle(stage, losses)
        learner = self._learner(stage, bundle, batch, knowledge)
        rows = self._batch(self._config.eval_rows(stage.train))
        evaluated = self._evaluated(
            stage, bundle, needs, rows, measures=rows.valid.numel() > step.tokens
        )
        names = bundle.elastic.makers if bundle.elastic is not None and strategy.pruned_to else ()
        return PhaseTraces(
            teachers=teachers,
            per_call=per_call,
            asked={name: sum(name in plan for plan in plans) / len(plans) for name in teachers},
            answers=max(sum(sizes.get(name, 0) for name in plan) for plan in plans),
            learner=learner,
            evaluated=evaluated,
            units=sum(bundle.student.get_parameter(name).numel() for name in names),
        )

    def _asked(
        self, needs: Needs, batch: Batch, per_call: Mapping[str, int]
    ) -> tuple[dict[str, Trace], dict[str, Knowledge]]:
        teachers, knowledge = dict[str, Trace](), dict[str, Knowledge]()
        for name, ready in self._phase.teachers.items():
            frozen = self._frozen(ready, needs)
            together = joined([batch] * per_call[name]) if per_call[name] > 1 else batch
            teachers[name], answer = self._forward(frozen, together)
            if answer.hidden is not None:
                answer = answer._replace(head=language_model_head(frozen.model))
            knowledge[name] = answer
        return teachers, knowledge

    def _learner(
        self, stage: Stage, bundle: StudentBundle, batch: Batch, knowledge: Mapping[str, Knowledge]
    ) -> list[Trace]:
        passes = stage.strategy.passes(0)
        passes = passes[:1] if self._config.method.routes_rows else passes
        return [
            self._trace(
                bundle, partial(bundle, batch, knowledge, group, _ones(bundle)), backward=True
            )[0]
            for group in backward_groups(passes, stage.passes_per_backward)
        ]

    def _evaluated(
        self, stage: Stage, bundle: StudentBundle, needs: Needs, rows: Batch, *, measures: bool
    ) -> dict[str, Trace]:
        if not (measures and stage.measures_losses):
            view = next(iter(stage.views), None)
            return {stage.role: self._forward(bundle.eval(), rows, view=view)[0]}
        teachers, knowledge = self._asked(needs, rows, dict.fromkeys(self._phase.teachers, 1))
        passes, scored = stage.strategy.passes(0), tuple(stage.views) or (None,)
        inputs = (rows, knowledge, passes, _ones(bundle))
        return {**teachers, stage.role: self._forward(bundle.eval(), *inputs, scored=scored)[0]}

    def _work(self, ready: ReadyTeacher) -> Trace:
        phase, frozen = self._phase, self._frozen(ready, Needs())
        batch = self._batch(phase.rows)
        if phase.work == "scoring":
            return self._forward(frozen, batch, scoring=True)[0]
        objective = label_objective(ready.source, self._task.type, _classes(ready.source))
        gates = GateGradients(frozen, objective, VALUELESS)
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
        return second_sizes(stage, pieces=vocabulary.size, offset=max(offsets))

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
                starts = torch.ones(ids.numel() // task.row_length + 1, dtype=torch.int32)
                texts = Documents(starts, task.row_length)
                return Batch(inputs, ids.clone(), valid, documents=texts)
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
