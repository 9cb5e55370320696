"""Forward and backward of the models of a phase on tensors that have shapes but no values.

The trace executes the code of a run: losses, gradient checkpointing, sub-networks, the attention of
the installed transformers. Nothing is computed or allocated. A torch mode sees each operator, the
sizes of its results, and the time of their release.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from megakd.config.run import RunConfig
from megakd.config.task import SOFT_LABELS, Dtype, FusedLayers
from megakd.config.terms import Unit, source_of
from megakd.data.batch import Batch, Documents, Outputs, Targets, backward_groups, teacher_names
from megakd.data.collation import DEFAULT_PROBABILITY
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.objective import StageLosses, label_objective, stage_losses, with_even_weights
from megakd.models.fitting import ModelSource, ReadyTeacher, build_empty
from megakd.models.fused_layers import fused_forwards
from megakd.models.lora import add_adapters
from megakd.models.outputs import LanguageModelHead, Needs
from megakd.models.packing import VARLEN, set_attention
from megakd.models.second_vocabulary import SecondSize, build_second_vocabulary
from megakd.reports.plan_phases import Phase
from megakd.stage import Stage
from megakd.teachers.frozen import FrozenModel, joined, split
from megakd.training.importance import GateGradients
from megakd.training.precision import (
    TORCH_DTYPE,
    choice_of,
    frozen_dtype,
    joins_micro_batches,
    largest_step,
    training_dtype,
)
from megakd_kernels.chunking import CPU_CHUNK_MB, GPU_CHUNK_MB, MEBIBYTE
from megakd_kernels.hidden_ops import CHUNK_MB, KERNEL_CHUNK_MB

Device = Literal["cpu", "cuda"]
VALUELESS = torch.device("meta")
"""Tensors on this device have shapes and dtypes, but no values and no memory."""
MAPPED_BYTES = 32 << 20
"""On a CPU rank, blocks of at least this size are mapped one by one (see `engine.memory`)."""
_STEPS = 100  # over which the use of teachers is counted
# Positions of the chunk size in the arguments of the operators on heads; 0: the default.
_CHUNK_ARGUMENT = {"megakd::linear_kd": 17, "megakd::topk_kd": 16}
_GRADIENTS_ARGUMENT = {"megakd::linear_kd": 10, "megakd::topk_kd": 11}
"""Positions of whether they form gradients."""
_ROW_BUFFERS = 5 * MEBIBYTE  # of the row kernels on a CPU; a GPU has none
_IN_KERNEL = ContextVar("_IN_KERNEL", default=False)
"""Whether the code that runs is one kernel in a run, whose intermediates have no memory."""
_RELATION_BUFFERS = {"cpu": 12 << 20, "cuda": 192 << 20}


class Point(NamedTuple):
    """Peak bytes in small and in large blocks until gradients of `done` elements are complete."""

    small: int
    large: int
    done: int

    @property
    def live(self) -> int:
        return self.small + self.large


@dataclass(frozen=True)
class Trace:
    """Record of one forward, and optionally its backward, run without computing any values.

    sizes, learned: elements of all parameters, tied ones once, and of those that learn, in order.
    read: elements of the parameters that are read.
    points: peaks of activations in the forward; before a backward, until each of its gradients,
        and to its end.
    flops: operations of matrix products.
    """

    sizes: Sequence[int] = ()
    learned: Sequence[int] = ()
    read: Sequence[int] = ()
    points: Sequence[Point] = ()
    flops: float = 0.0

    @property
    def has_backward(self) -> bool:
        return len(self.points) > 1


def trace_call(
    module: nn.Module, call: Callable[[], Any], *, backward: bool, device: str
) -> tuple[Trace, Any]:
    """Return the trace of one call of a module, and its result, with a `total` for the backward."""
    parameters = list(module.parameters())
    watch = _AllocationWatch(module, device)

    def finish(parameter: Tensor) -> None:
        parameter.grad = None
        watch.end_point(parameter.numel())

    learning = [one for one in parameters if one.requires_grad]
    hooks = [one.register_post_accumulate_grad_hook(finish) for one in learning]
    with watch:
        with _without_values(device), nullcontext() if backward else torch.no_grad():
            result = call()
        watch.end_point()
        if backward:
            watch.end_point()
            result.total.backward()
            watch.end_point()
    for hook in hooks:
        hook.remove()
    read = [one.numel() for one in parameters if _storage(one) in watch.read]
    sizes, learned = ([one.numel() for one in some] for some in (parameters, learning))
    return Trace(sizes, learned, read, watch.points, watch.flops), result


@contextmanager
def _without_values(device: str) -> Iterator[None]:
    with VALUELESS, _Valueless(device):
        yield


def repeat_alike(model: Any, device: str) -> None:
    """Make forwards that gradient checkpointing repeats run in the modes of the first forward.

    A backward does not restore the torch modes of its forward.
    """

    def modes() -> tuple[Any, Any]:
        return nullcontext(), _without_values(device)

    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": modes})


class _Valueless(TorchFunctionMode):
    """Mode that answers conditions on values with False, so that masks are not omitted."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return False
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(self._device, *args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **options: Any,
) -> Tensor:
    # On a CPU attention is fused unless it has dropout or learns a bias; on a GPU it is always
    # fused, and holds the same memory. Values of another width than queries
    # count as not fused, as on a CPU.
    aten, bias = torch.ops.aten, attn_mask
    is_learned = bias is not None and bias.requires_grad and query.requires_grad
    is_fused = query.shape[-1] == value.shape[-1]
    if not is_fused or (device == "cpu" and (dropout_p > 0 or is_learned)):
        inputs = (query, key, value, bias, dropout_p)
        return aten._scaled_dot_product_attention_math(*inputs, **options)[0]  # noqa: SLF001
    if options.pop("enable_gqa", False):
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    if bias is not None:
        bias = (bias.to(query.dtype) if bias.dtype == torch.bool else bias).detach()
    mixed = aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        query, key, value, attn_mask=bias, **options
    )[0]
    # A learned bias gets its gradient here, as from the operator of a GPU.
    return mixed + attn_mask.sum() * 0 if attn_mask is not None and is_learned else mixed


class _AllocationWatch(TorchDispatchMode):
    """Mode that counts the memory in use up to each gradient; see `Trace`."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self._device = device
        self._parameters = {_storage(parameter) for parameter in module.parameters()}
        self._ignored = self._parameters | {_storage(tensor) for tensor in module.buffers()}
        self._known: dict[int, tuple[int, Any]] = {}
        self._live, self._peak, self._done = [0, 0], [0, 0], 0  # small and large blocks
        self.points: list[Point] = []
        self.read, self.flops = set[int](), 0.0

    def end_point(self, gradient: int = 0) -> None:
        """End a point, by the gradient of so many elements."""
        self._done += gradient
        small, large = self._peak
        self.points.append(Point(small, large, self._done))
        self._peak = list(self._live)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check would double the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = {_storage(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        self.read |= read & self._parameters
        out = func(*args, **kwargs)
        # Autograd adds gradients in place, except on valueless tensors: free the first of a sum.
        is_sum = func is torch.ops.aten.add.Tensor and self.points and not torch.is_grad_enabled()
        if is_sum and isinstance(args[0], Tensor) and _alike(args[0]) == _alike(out):
            self._free(_storage(args[0]))
        self.flops += _operations(func, args, kwargs, out)
        if _IN_KERNEL.get():
            return out
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        buffers = loss_workspace(func, args, self._device)
        for kind, live in enumerate(self._live):
            more = buffers if kind == (buffers >= MAPPED_BYTES) else 0
            self._peak[kind] = max(self._peak[kind], live + more)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key not in self._known and key not in self._ignored:
            release = weakref.ref(storage, lambda _: self._free(key))
            self._known[key] = (storage.nbytes(), release)
            self._live[storage.nbytes() >= MAPPED_BYTES] += storage.nbytes()

    def _free(self, key: int) -> None:
        size, _ = self._known.pop(key, (0, None))
        self._live[size >= MAPPED_BYTES] -= size


def one_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that holds, without values, what `function` holds once torch compiled it.

    It keeps for the backward what the function keeps, except intermediates as large as an input:
    torch's partitioner of graphs computes these again from the inputs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = [*tree_iter((args, kwargs))]
        inputs = [one for one in leaves if isinstance(one, Tensor)]
        parts = [one for one in leaves if isinstance(one, nn.Module)]
        inputs += [weight for part in parts for weight in part.parameters(recurse=False)]
        packed: list[Tensor] = []

        def pack(tensor: Tensor) -> None:
            packed.append(tensor.detach())  # without its graph, which holds this function

        token = _IN_KERNEL.set(True)
        try:
            with saved_tensors_hooks(pack, lambda one: one):  # `_Kernel` has the backward
                outputs, form = tree_flatten(function(*args, **kwargs))
        finally:
            _IN_KERNEL.reset(token)
        stored = {_storage(one) for one in (*inputs, *outputs)}
        largest = max(one.numel() for one in inputs)
        kept = [one for one in packed if _storage(one) in stored or one.numel() < largest]
        kept += inputs if len(kept) < len(packed) else []
        return tree_unflatten(_Kernel.apply(kept, outputs, *inputs), form)

    return call


class _Kernel(torch.autograd.Function):
    """Outputs of inputs whose computation takes no memory, and whose backward only has results."""

    @staticmethod
    def forward(
        ctx: Any, kept: Sequence[Tensor], outputs: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(tensor.detach() for tensor in kept))
        ctx.alike = [_alike(one) for one in inputs]
        return tuple(output.detach() for output in outputs)  # which counts their memory

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            torch.empty(size, dtype=dtype, device=VALUELESS) if is_needed else None
            for (size, dtype), is_needed in zip(ctx.alike, ctx.needs_input_grad[2:], strict=True)
        )
        return (None, None, *gradients)


def _operations(function: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet, aten = getattr(function, "overloadpacket", None), torch.ops.aten
    # The attention of a CPU, which torch does not count: a backward as two forwards, as in a log.
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # noqa: SLF001
        return float(sdpa_flop_count(*(one.shape for one in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:  # noqa: SLF001
        return 2.0 * sdpa_flop_count(*(one.shape for one in args[1:4]))
    count = flop_registry.get(packet)
    if count is not None:
        return float(count(*args, **kwargs, out_val=out))
    # The losses multiply hidden states and heads themselves, and with a gradient they do so for
    # both operands of the student's product in the forward.
    if _name(function) not in _GRADIENTS_ARGUMENT:
        return 0.0
    hidden, student = args[:2]
    teacher = args[4] if _name(function) == "megakd::linear_kd" else None
    products = student.numel() * (3 if any(args[_GRADIENTS_ARGUMENT[_name(function)]]) else 1)
    return 2.0 * len(hidden) * (products + (teacher.numel() if teacher is not None else 0))


def _name(function: Any) -> str:
    return getattr(function, "name", str)().partition(".")[0]


def _alike(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  (identifies a storage)


def loss_workspace(function: Any, args: tuple[Any, ...], device: str) -> int:
    """Return the bytes that a fused loss holds beside its results; 0 for other operators."""
    is_cpu, name = device == "cpu", _name(function)
    if name in _CHUNK_ARGUMENT:
        heads = [args[1], args[4]] if name == "megakd::linear_kd" else [args[1]]
        logits = 4 * len(args[0]) * sum(len(head) for head in heads if head is not None)
        budget = args[_CHUNK_ARGUMENT[name]] or (CPU_CHUNK_MB if is_cpu else GPU_CHUNK_MB)
        rows = _ROW_BUFFERS if is_cpu else 0
        return min(logits, round(budget * MEBIBYTE)) + rows + 4 * args[0].numel()
    if name == "megakd::hidden_loss":
        (count, width), projection = args[2].shape, args[1]
        if is_cpu:
            return min(4 * count * (args[0].shape[1] + 2 * width), round(CHUNK_MB * MEBIBYTE))
        # Projected states in fp32 and their gradient in 16 bits.
        most = round(KERNEL_CHUNK_MB * MEBIBYTE)
        return 0 if projection is None else min(6 * count * width, most)
    if name == "megakd::relation_kl":  # tiles of rows, keys and relation heads, and an example
        example = math.prod(args[0].shape[1:]) + math.prod(args[2].shape[1:])
        return _RELATION_BUFFERS[device] + 8 * example
    return 0


def planned_dtype(teacher: ReadyTeacher, device: Device) -> Dtype:
    """Return the dtype of a frozen model according to its config; weight files are not read."""
    stored = teacher.source.config.dtype
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return frozen_dtype(teacher.spec, stored, device)


class PhaseTraces:
    """The traces of a phase, whose models are built without values.

    teachers: the forward of each frozen model by name.
    asked: mean number of answers per micro-batch of each teacher.
    per_call: number of micro-batches that each teacher answers in one forward.
    answers: bytes of the outputs of a step's teachers, kept while the learner runs.
    learner: each group of passes of the learner with its backward.
    evaluated: forwards of an evaluation, of the learner by its role, and of teachers by name if
        an evaluation has larger batches than a step, and measures losses too.
    units: number of weights that produce units of a learner that is pruned; 0 for others.
    """

    def __init__(self, phase: Phase, config: RunConfig, device: Device) -> None:
        self._phase, self._config, self._task = phase, config, config.task
        self._device: Device = device
        self._trace = partial(trace_call, device=device)
        self.teachers, self.evaluated = dict[str, Trace](), dict[str, Trace]()
        if phase.stage is not None:
            self._train(phase.stage)
            return
        batch = self._batch(phase.rows)
        for name, ready in phase.teachers.items():
            frozen, options = self._frozen(ready, Needs()), {"scoring": True}
            if phase.work == "importance":
                classes, options = ready.source.config.num_labels or 0, {}
                objective = label_objective(ready.source, self._task.type, classes)
                frozen = GateGradients(frozen, objective, VALUELESS)
            self.teachers[name], _ = self._forward(frozen.eval(), batch, **options)

    def _train(self, stage: Stage) -> None:
        step, config, device = largest_step(stage.train, self._task), self._config, self._device
        phase, strategy = self._phase, stage.strategy
        classes = phase.learner.config.num_labels or 0
        # A copy to the host needs values; the plan of the phase has its memory.
        train = replace(stage.train, activation_offload=False)
        terms = with_even_weights(stage.objective, classes)
        losses = stage_losses(
            replace(stage, train=train, objective=terms),
            self._task.type,
            learners=phase.learners,
            teachers=phase.teaching,
            classes=classes,
        )
        needs = losses.teacher_needs()
        batch = self._batch(step.rows, step.length)
        batch = batch._replace(
            others=self._mixed(stage, batch) or None,
            is_rollout=any(source_of(term) == "rollouts" for term in stage.objective),
        )
        self.per_call = {
            name: step.micro_batches
            if joins_micro_batches(
                one, needs, stage.train, config, dtype=planned_dtype(one, device), device=device
            )
            else 1
            for name, one in phase.teachers.items()
        }
        self.teachers, answers = self._asked(needs, batch, self.per_call)
        # Of the first of the micro-batches of a call.
        outputs = {name: next(split(answer, [batch])) for name, answer in answers.items()}
        if SOFT_LABELS in stage.teachers:
            of_rows = torch.empty(len(batch.valid), classes, device=batch.valid.device)
            outputs[SOFT_LABELS] = Outputs(logits=of_rows)
        sizes = {name: _answer_bytes(answer) for name, answer in answers.items()}
        plans = [teacher_names(strategy.passes(number)) for number in range(_STEPS)]
        if config.method.routes_rows:  # a micro-batch has rows of one teacher
            plans = [(name,) for name in stage.teachers]
        self.asked = {name: sum(name in plan for plan in plans) / len(plans) for name in sizes}
        self.answers = max(sum(sizes.get(name, 0) for name in plan) for plan in plans)
        bundle = self._bundle(stage, losses)
        self.learner = self._learner(stage, bundle, batch, outputs)
        names = bundle.elastic.makers if bundle.elastic is not None and stage.pruned_to else ()
        self.units = sum(bundle.student.get_parameter(name).numel() for name in names)
        rows = self._batch(config.eval_rows(stage.train))
        self._evaluate(stage, bundle, rows, needs if rows.valid.numel() > step.tokens else None)

    def _evaluate(
        self, stage: Stage, bundle: StudentBundle, rows: Batch, needs: Needs | None
    ) -> None:
        # needs: of the losses that are measured, if the rows are more than those of a step.
        if needs is not None and stage.measured:
            self.evaluated, answers = self._asked(needs, rows, dict.fromkeys(self.teachers, 1))
            inputs = (rows, answers, stage.measured, _ones(bundle))
            options: dict[str, Any] = {"scored": True}
        else:
            inputs, options = (rows,), {"view": next(iter(stage.views), None)}
        self.evaluated[stage.role], _ = self._forward(bundle.eval(), *inputs, **options)

    def _asked(
        self, needs: Needs, batch: Batch, per_call: Mapping[str, int]
    ) -> tuple[dict[str, Trace], dict[str, Outputs]]:
        teachers, outputs = dict[str, Trace](), dict[str, Outputs]()
        for name, ready in self._phase.teachers.items():
            frozen = self._frozen(ready, needs)
            together = joined([batch] * per_call[name]) if per_call[name] > 1 else batch
            teachers[name], answer = self._forward(frozen, together)
            head = None if answer.hidden is None else LanguageModelHead(frozen.model)
            outputs[name] = answer._replace(head=head)
        return teachers, outputs

    def _learner(
        self, stage: Stage, bundle: StudentBundle, batch: Batch, outputs: Mapping[str, Outputs]
    ) -> list[Trace]:
        # Without values, no weights can be chosen by outputs.
        passes = [replace(one, weigh=None) for one in stage.strategy.passes(0)]
        passes = passes[:1] if self._config.method.routes_rows else passes
        return [
            self._trace(
                bundle, partial(bundle, batch, outputs, group, _ones(bundle)), backward=True
            )[0]
            for group in backward_groups(passes)
        ]

    def _forward(self, module: nn.Module, *args: Any, **options: Any) -> tuple[Trace, Any]:
        return self._trace(module, partial(module, *args, **options), backward=False)

    def _frozen(self, ready: ReadyTeacher, needs: Needs) -> FrozenModel:
        fused = self._config.train.fused_layers
        model = self._model(ready.source, planned_dtype(ready, self._device), fused)
        model.requires_grad_(requires_grad=False)
        return FrozenModel(model, needs=needs, label_order=None, kernels="chunked").eval()

    def _bundle(self, stage: Stage, losses: StageLosses) -> StudentBundle:
        dtype, phase, config = training_dtype(stage.train, self._device), self._phase, self._config
        fused = choice_of(stage)
        learners = {role: self._model(one, dtype, fused) for role, one in phase.learners.items()}
        kind, vocabulary = TORCH_DTYPE[dtype], config.method.own_vocabulary
        lora = config.lora_of(stage.role)
        with VALUELESS:
            for role in (name for name, share in config.method.mixed(stage).items() if share):
                size = SecondSize(vocabulary or 0, learners[role].config.vocab_size)
                build_second_vocabulary(learners[role], size, ds=None, dtype=kind)
            if lora is not None:
                model = learners[stage.role]
                add_adapters(model, phase.learner, self._task, lora, seed=config.seed)
            bundle = build_bundle(losses, learners, dtype=kind, world_size=1, kernels="chunked")
        if stage.train.gradient_checkpointing:
            for model in learners.values():
                repeat_alike(model, self._device)
        return bundle.train()

    def _mixed(self, stage: Stage, batch: Batch) -> dict[str, Batch]:
        batches, count = {}, 0 if batch.targets is None else len(batch.targets)
        for role, probability in self._config.method.mixed(stage).items():
            second = math.ceil(probability * count)
            sizes = (max(1, count - second), max(1, second))
            with VALUELESS:
                first, second = (torch.ones(size, dtype=torch.long) for size in sizes)
            targets = Targets(second, second)
            batches[role] = batch._replace(targets=first, second=targets)
        return batches

    def _model(self, source: ModelSource, dtype: Dtype, fused: FusedLayers) -> Any:
        with VALUELESS:
            model = build_empty(source, self._task, source.config, TORCH_DTYPE[dtype])
        send_tokens_to_one_expert(model)
        if source.attn_implementation in (None, VARLEN, "sdpa", "eager"):
            set_attention(model, source, self._task.type, torch.device(self._device))
        if fused == "on":
            for part, forward in fused_forwards(model, one_kernel).items():
                part.forward = forward.__get__(part)
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


def _answer_bytes(answer: Outputs) -> int:
    attention = [part for vectors in answer.attention if vectors for part in vectors[:3]]
    tensors = (answer.logits, answer.hidden, *answer.hidden_states, *attention)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def send_tokens_to_one_expert(model: PreTrainedModel) -> None:
    """Let a mixture on the meta device use one expert of each layer for all tokens.

    The tensors have the shapes of transformers' grouped product, which the meta device supports
    only in bf16, and the products have as many operations. A dense model does not change.
    """
    if any(hasattr(type(part), "_apply_gate") for part in model.modules()):
        ALL_EXPERTS_FUNCTIONS.register("one_expert", _of_one_expert)
        model.set_experts_implementation("one_expert")


def _of_one_expert(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    def product(rows: Tensor, name: str) -> Tensor:
        weight = experts.get_parameter(name)[0]
        out = rows @ (weight if experts.is_transposed else weight.T)
        return out + experts.get_parameter(f"{name}_bias")[0] if experts.has_bias else out

    rows = hidden.repeat_interleave(chosen.shape[1], dim=0)  # [N * k, D]
    # transformers gives its modules this method.
    gated = experts._apply_gate(product(rows, "gate_up_proj"))  # noqa: SLF001
    outputs = product(gated, "down_proj") * weights.reshape(-1, 1)
    return outputs.unflatten(0, chosen.shape).sum(1).to(hidden.dtype)
