"""Forward and backward of a model on tensors that have shapes but no values.

The trace executes the same code as a run: the bundle, its losses, gradient checkpointing,
elastic views, and the attention of the installed transformers version. Nothing is computed or
allocated. A torch mode sees each operator, the sizes of its results, and the time of their
release.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from megakd_kernels.chunking import (
    MEBIBYTE,
    gradient_dtype,
    plan_chunks,
    plan_row_chunks,
)
from megakd_kernels.hidden_ops import CHUNK_MB, KERNEL_CHUNK_MB

VALUELESS = torch.device("meta")
"""Tensors on this device have shapes and dtypes, but no values and no memory."""
MAPPED_BYTES = 32 << 20
"""On a CPU rank, blocks of at least this size are mapped one by one (see `engine.memory`)."""
_LIKE = {device: torch.empty(0, device=to) for device, to in (("cpu", "cpu"), ("cuda", "meta"))}
_ROW_BUFFERS = 5  # block buffers of the row kernels on a CPU; a GPU has none
# Positions of the chunk size in the arguments of the operators on heads; 0: the default.
_LINEAR_CHUNK_MB, _TOPK_CHUNK_MB = 17, 16
_RELATION_TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


class Amount(NamedTuple):
    """Bytes in small and in large blocks: the C library's heap keeps only freed small blocks."""

    small: int = 0
    large: int = 0

    @property
    def total(self) -> int:
        return self.small + self.large

    def plus(self, other: Amount) -> Amount:
        return Amount(self.small + other.small, self.large + other.large)

    def times(self, share: float) -> Amount:
        return Amount(round(self.small * share), round(self.large * share))

    def most(self, other: Amount) -> Amount:
        return Amount(max(self.small, other.small), max(self.large, other.large))


NOTHING = Amount()


def amount_of(sizes: Iterable[float]) -> Amount:
    """Return the amount of blocks with these sizes."""
    blocks = [round(size) for size in sizes]
    large = sum(size for size in blocks if size >= MAPPED_BYTES)
    return Amount(sum(blocks) - large, large)


def block(size: float) -> Amount:
    """Return the amount of one block with this size."""
    return amount_of([size])


def mapped(size: float) -> Amount:
    """Return this many bytes as blocks that the C library hands back once they are freed.

    Weights that are built and filled are such blocks, whatever their size: `engine.memory`.
    """
    return Amount(large=round(size))


class Parameter(NamedTuple):
    """One weight of a model; `learns` is False for frozen weights."""

    numel: int
    learns: bool = True


class Inventory(tuple[Parameter, ...]):
    """The weights of a module in module order; tied weights occur once."""

    __slots__ = ()

    def of(self, numbers: Iterable[int]) -> Inventory:
        return Inventory(self[number] for number in numbers)

    @property
    def learned(self) -> Inventory:
        return Inventory(parameter for parameter in self if parameter.learns)

    @property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self)

    @property
    def largest(self) -> int:
        return max((parameter.numel for parameter in self), default=0)

    def amount(self, itemsize: int) -> Amount:
        return amount_of(parameter.numel * itemsize for parameter in self)


def inventory(module: nn.Module) -> Inventory:
    """Return the parameters of a module; tied parameters occur once."""
    return Inventory(Parameter(p.numel(), p.requires_grad) for p in module.parameters())


@dataclass
class Moment:
    """The time from the entry of one module to the entry of the next module.

    module: its path. used: numbers of its own parameters and of all others that are read.
    live: peak bytes of activations. workspace: additional bytes of the losses' chunks.
    finished: numbers of the parameters whose gradient becomes complete.
    """

    module: str
    used: set[int] = field(default_factory=set)
    live: Amount = NOTHING
    workspace: Amount = NOTHING
    finished: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """Record of one forward, and optionally its backward, run without computing any values.

    moments: moments of forward and backward, in order; the backward begins at `turn`.
    flops: operations of matrix products.
    """

    inventory: Inventory
    moments: Sequence[Moment]
    turn: int
    flops: float


def trace_call(
    module: nn.Module, call: Callable[[], Any], *, backward: bool, device: str
) -> tuple[Trace, Any]:
    """Return the trace of one call of a module, and its result.

    With `backward`, the result has a `total`.
    """
    with _AllocationWatch(module, device) as watch:
        with _without_values(device), nullcontext() if backward else torch.no_grad():
            result = call()
        watch.turn()
        if backward:
            result.total.backward()
    return Trace(inventory(module), watch.moments, watch.turned, watch.flops), result


@contextmanager
def _without_values(device: str) -> Iterator[None]:
    with VALUELESS, _Valueless(device):
        yield


def repeat_alike(model: Any, device: str, *, offload: bool = False) -> None:
    """Make forwards that gradient checkpointing repeats run in the modes of the first forward.

    A backward does not restore the torch modes of its forward. `offload`: the inputs of repeated
    layers wait in host memory.
    """

    def shape_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        return tensor.shape, tensor.dtype

    def made_of(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(saved[0], dtype=saved[1], device=VALUELESS)

    def repeated(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        modes = {"context_fn": lambda: (nullcontext(), _without_values(device))}
        with saved_tensors_hooks(shape_of, made_of) if offload else nullcontext():
            return checkpoint(function, *inputs, use_reentrant=False, **modes, **options)

    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = repeated  # noqa: SLF001  (transformers' own)


class _Valueless(TorchFunctionMode):
    """Mode that answers conditions on values and selects the attention of the device.

    A condition on values is False, so that masks are not omitted if there is no padding. On a CPU
    attention is fused unless it has dropout; on a GPU attention is always fused, and holds the
    same memory.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return False
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **options: Any,
    ) -> Tensor:
        is_learned = attn_mask is not None and attn_mask.requires_grad and query.requires_grad
        aten = torch.ops.aten
        if self._device == "cpu" and (dropout_p > 0 or is_learned):
            return aten._scaled_dot_product_attention_math(  # noqa: SLF001
                query, key, value, attn_mask, dropout_p, **options
            )[0]
        if options.pop("enable_gqa", False):
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        bias = None if attn_mask is None else attn_mask.detach()
        mixed = aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            query, key, value, attn_mask=bias, **options
        )[0]
        # A learned bias gets its gradient here, as from the operator of a GPU.
        return mixed + attn_mask.sum() * 0 if attn_mask is not None and is_learned else mixed


class _AllocationWatch(TorchDispatchMode):
    """Mode that counts the memory in use by active module."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self._module, self._device = module, device
        self._number = {_storage(p): number for number, p in enumerate(module.parameters())}
        self._ignored = {_storage(tensor) for tensor in module.buffers()} | self._number.keys()
        self._known: dict[int, tuple[Amount, Any]] = {}
        self._live = NOTHING
        self._hooks: list[Any] = []
        self.moments = [Moment("")]
        self.turned, self.flops = 0, 0.0

    def __enter__(self) -> _AllocationWatch:
        for path, child in self._module.named_modules():
            numbers = {self._number[_storage(p)] for p in child.parameters(recurse=False)}
            if numbers or next(child.children(), None) is None:
                self._watch(child, path, numbers)
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._finish)
                self._hooks.append(hook)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, path: str, numbers: set[int]) -> None:
        def begin(*_: Any) -> None:
            self.moments.append(Moment(path, set(numbers), self._live))

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tree_iter(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(begin)
                    break

        self._hooks += [module.register_forward_pre_hook(begin)]
        self._hooks += [module.register_forward_hook(after)]

    def _finish(self, parameter: Tensor) -> None:
        self.moments[-1].finished.append(self._number[_storage(parameter)])
        parameter.grad = None

    def turn(self) -> None:
        self.turned = len(self.moments)
        self.moments.append(Moment("", live=self._live))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check would double the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moment = self.moments[-1]
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor) and _storage(tensor) in self._number:
                moment.used.add(self._number[_storage(tensor)])
        out = func(*args, **kwargs)
        self._add_in_place(func, args, out)
        of_body, of_head = _products(func, args, kwargs, out)
        # The loss computes its gradient in the forward, with two products more.
        self.flops += of_body * (3 if _is_linear_kd(func) and any(args[10]) else 1) + of_head
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        workspace = block(loss_workspace(func, args, self._device))
        moment.workspace = moment.workspace.most(workspace)
        moment.live = moment.live.most(self._live)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key not in self._known and key not in self._ignored:
            size = block(storage.nbytes())
            self._known[key] = (size, weakref.ref(storage, lambda _: self._free(key)))
            self._live = self._live.plus(size)

    def _add_in_place(self, func: Any, args: Any, out: Any) -> None:
        # Free the first gradient of a sum: autograd adds in place, except on valueless tensors.
        if func is not torch.ops.aten.add.Tensor or not self.turned or torch.is_grad_enabled():
            return
        first = args[0]
        if isinstance(first, Tensor) and first.shape == out.shape and first.dtype == out.dtype:
            self._free(_storage(first))

    def _free(self, key: int) -> None:
        size, _ = self._known.pop(key, (NOTHING, None))
        self._live = self._live.plus(size.times(-1))


def _products(function: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, float]:
    """Return the operations of an operator, and those of a teacher's head in a loss."""
    count = flop_registry.get(getattr(function, "overloadpacket", None))
    if count is not None:
        # Before torch 2.13, the formula of attention refuses queries that share keys.
        with suppress(AssertionError):
            return float(count(*args, **kwargs, out_val=out)), 0.0
    if not _is_linear_kd(function):
        return 0.0, 0.0
    rows, width = args[0].shape
    teacher = 2.0 * rows * args[4].numel() if isinstance(args[4], Tensor) else 0.0
    return 2.0 * rows * len(args[1]) * width, teacher


def _is_linear_kd(function: Any) -> bool:
    """Return whether an operator is the loss that multiplies hidden states and heads itself."""
    return getattr(function, "name", str)().partition(".")[0] == "megakd::linear_kd"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  (identifies a storage)


def loss_workspace(function: Any, args: tuple[Any, ...], device: str) -> int:
    """Return the bytes that a fused loss holds beside its results; 0 for other operators."""
    buffers = _WORKSPACES.get(getattr(function, "name", str)().partition(".")[0])
    return 0 if buffers is None else buffers(args, device)


def _linear(args: tuple[Any, ...], device: str) -> int:
    heads = [head for head in (args[1], args[4]) if head is not None]
    return _chunk_of_logits(args[0], heads, device, args[_LINEAR_CHUNK_MB])


def _topk(args: tuple[Any, ...], device: str) -> int:
    # The student's logits alone.
    return _chunk_of_logits(args[0], [args[1]], device, args[_TOPK_CHUNK_MB])


def _chunk_of_logits(hidden: Tensor, heads: Sequence[Tensor], device: str, chunk_mb: float) -> int:
    # Return the bytes of a chunk: logits of the models, hidden states, and gradients.
    widths = tuple(map(len, heads))
    narrow = torch.float32 if device == "cpu" else gradient_dtype(hidden, torch.float32)
    plan = plan_row_chunks(
        len(hidden),
        widths=widths,
        like=_LIKE[device],
        gradient=narrow,
        chunk_mb=chunk_mb,
        implementation="chunked" if device == "cpu" else "triton",
    )
    group = min(plan.group, len(hidden))
    # The hidden states are in fp32, with zeros in masked rows.
    buffers = plan.chunk * sum(widths) * 4 + group * hidden.shape[1] * 4
    if device == "cpu":
        return buffers + _ROW_BUFFERS * plan.block * max(widths) * 4
    return buffers + (group * widths[0] * narrow.itemsize if narrow != torch.float32 else 0)


def _hidden(args: tuple[Any, ...], device: str) -> int:
    student, projection, teacher = args[:3]
    count, width = teacher.shape
    if device != "cpu":
        # Projected states in fp32 and their gradient in 16 bits, of all rows or of a chunk.
        return 0 if projection is None else min(6 * count * width, KERNEL_CHUNK_MB * MEBIBYTE)
    widths = (student.shape[1], width, width)
    plan = plan_chunks(count, widths=widths, like=_LIKE[device], chunk_mb=CHUNK_MB)
    return plan.chunk * sum(widths) * 4


def _relation(args: tuple[Any, ...], device: str) -> int:
    # Return the bytes of three tiles (rows, keys, all relation heads) and of one example.
    student, teacher = args[0], args[2]
    example = math.prod(student.shape[1:]) + math.prod(teacher.shape[1:])
    return 3 * _RELATION_TILE_BYTES[device] + 8 * example


_WORKSPACES = {
    "megakd::linear_kd": _linear,
    "megakd::topk_kd": _topk,
    "megakd::hidden_loss": _hidden,
    "megakd::relation_kl": _relation,
}
