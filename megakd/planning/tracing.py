"""Forward and backward of a model on tensors that have shapes but no values.

The trace executes the code of a run: losses, gradient checkpointing, sub-networks, the attention of
the installed transformers. Nothing is computed or allocated. A torch mode sees each operator, the
sizes of its results, and the time of their release.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from megakd_kernels.chunking import CPU_CHUNK_MB, GPU_CHUNK_MB, MEBIBYTE
from megakd_kernels.hidden_ops import CHUNK_MB, KERNEL_CHUNK_MB

VALUELESS = torch.device("meta")
"""Tensors on this device have shapes and dtypes, but no values and no memory."""
MAPPED_BYTES = 32 << 20
"""On a CPU rank, blocks of at least this size are mapped one by one (see `engine.memory`)."""
# Positions of the chunk size in the arguments of the operators on heads; 0: the default.
_CHUNK_ARGUMENT = {"megakd::linear_kd": 17, "megakd::topk_kd": 16}
_ROW_BUFFERS = 5  # MiB of block buffers of the row kernels on a CPU; a GPU has none
_RELATION_BUFFERS = {"cpu": 12 << 20, "cuda": 192 << 20}

Amount = NDArray[np.float64]
"""[2] bytes in small and in large blocks: the C library's heap keeps only freed small blocks."""
NOTHING: Amount = np.zeros(2)


def blocks(*sizes: float) -> Amount:
    """Return the amount of blocks with these sizes."""
    large = sum(size for size in sizes if size >= MAPPED_BYTES)
    return np.array([sum(sizes) - large, large], dtype=float)


def mapped(size: float) -> Amount:
    """Return this many bytes as blocks that the C library returns to the system once freed.

    Weights that are built and filled are such blocks, whatever their size: `engine.memory`.
    """
    return np.array([0.0, size])


@dataclass
class Moment:
    """The time from the entry of one module to the entry of the next module.

    used: numbers of the parameters that are read. live: peak of activations. done: elements of the
    gradients that are complete by its end. newest: elements of the last of them in this moment.
    """

    used: set[int] = field(default_factory=set)
    live: Amount = field(default_factory=lambda: NOTHING)
    done: int = 0
    newest: int = 0


@dataclass(frozen=True)
class Trace:
    """Record of one forward, and optionally its backward, run without computing any values.

    sizes, learned: elements of all parameters, tied ones once, and of those that learn, in order.
    moments: moments of forward and backward, in order; the backward begins at `turn`.
    flops: operations of matrix products.
    """

    sizes: Sequence[int]
    learned: Sequence[int]
    moments: Sequence[Moment]
    turn: int
    flops: float


def trace_call(
    module: nn.Module, call: Callable[[], Any], *, backward: bool, device: str
) -> tuple[Trace, Any]:
    """Return the trace of one call of a module, and its result, with a `total` for the backward."""
    with _AllocationWatch(module, device) as watch:
        with _without_values(device), nullcontext() if backward else torch.no_grad():
            result = call()
        watch.turn()
        if backward:
            result.total.backward()
    sizes = [parameter.numel() for parameter in module.parameters()]
    learned = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    return Trace(sizes, learned, watch.moments, watch.turned, watch.flops), result


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

    def of_shape(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(saved[0], dtype=saved[1], device=VALUELESS)

    def repeated(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        modes = {"context_fn": lambda: (nullcontext(), _without_values(device))}
        with saved_tensors_hooks(shape_of, of_shape) if offload else nullcontext():
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
        bias = None
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            bias = (attn_mask.to(query.dtype) if is_bool else attn_mask).detach()
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
        self.moments = [Moment()]
        self.turned, self.flops = 0, 0.0

    def __enter__(self) -> _AllocationWatch:
        for child in self._module.modules():
            numbers = {self._number[_storage(p)] for p in child.parameters(recurse=False)}
            if numbers or next(child.children(), None) is None:
                self._watch(child, numbers)
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._finish)
                self._hooks.append(hook)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, numbers: set[int]) -> None:
        def begin(*_: Any) -> None:
            self.moments.append(Moment(set(numbers), self._live, self.moments[-1].done))

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tree_iter(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(begin)
                    break

        self._hooks += [module.register_forward_pre_hook(begin)]
        self._hooks += [module.register_forward_hook(after)]

    def _finish(self, parameter: Tensor) -> None:
        moment = self.moments[-1]
        moment.done, moment.newest = moment.done + parameter.numel(), parameter.numel()
        parameter.grad = None

    def turn(self) -> None:
        self.turned = len(self.moments)
        self.moments.append(Moment(live=self._live))

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
        self.flops += _operations(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        buffers = blocks(loss_workspace(func, args, self._device))
        moment.live = np.maximum(moment.live, self._live + buffers)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        if key not in self._known and key not in self._ignored:
            size = blocks(storage.nbytes())
            self._known[key] = (size, weakref.ref(storage, lambda _: self._free(key)))
            self._live = self._live + size

    def _add_in_place(self, func: Any, args: Any, out: Any) -> None:
        # Free the first gradient of a sum: autograd adds in place, except on valueless tensors.
        if func is not torch.ops.aten.add.Tensor or not self.turned or torch.is_grad_enabled():
            return
        first = args[0]
        if isinstance(first, Tensor) and first.shape == out.shape and first.dtype == out.dtype:
            self._free(_storage(first))

    def _free(self, key: int) -> None:
        size, _ = self._known.pop(key, (NOTHING, None))
        self._live = self._live - size


def _operations(function: Any, args: Any, kwargs: Any, out: Any) -> float:
    count = flop_registry.get(getattr(function, "overloadpacket", None))
    if count is not None:
        # Before torch 2.13, the formula of attention refuses queries that share keys.
        with suppress(AssertionError):
            return float(count(*args, **kwargs, out_val=out))
    if _name(function) != "megakd::linear_kd":
        return 0.0
    # The loss multiplies hidden states and heads itself, and with a gradient it does so for both
    # operands of the student's product in the forward.
    hidden, student, teacher = args[0], args[1], args[4]
    products = student.numel() * (3 if any(args[10]) else 1)
    return 2.0 * len(hidden) * (products + (teacher.numel() if teacher is not None else 0))


def _name(function: Any) -> str:
    return getattr(function, "name", str)().partition(".")[0]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  (identifies a storage)


def loss_workspace(function: Any, args: tuple[Any, ...], device: str) -> float:
    """Return the bytes that a fused loss holds beside its results; 0 for other operators."""
    is_cpu, name = device == "cpu", _name(function)
    if name in _CHUNK_ARGUMENT:
        heads = [args[1], args[4]] if name == "megakd::linear_kd" else [args[1]]
        logits = 4 * len(args[0]) * sum(len(head) for head in heads if head is not None)
        budget = args[_CHUNK_ARGUMENT[name]] or (CPU_CHUNK_MB if is_cpu else GPU_CHUNK_MB)
        rows = _ROW_BUFFERS * MEBIBYTE if is_cpu else 0
        return min(logits + rows, budget * MEBIBYTE + rows) + 4 * args[0].numel()
    if name == "megakd::hidden_loss":
        (count, width), projection = args[2].shape, args[1]
        if is_cpu:
            return min(4 * count * (args[0].shape[1] + 2 * width), CHUNK_MB * MEBIBYTE)
        # Projected states in fp32 and their gradient in 16 bits.
        most = KERNEL_CHUNK_MB * MEBIBYTE
        return 0 if projection is None else min(6 * count * width, most)
    if name == "megakd::relation_kl":  # tiles of rows, keys and relation heads, and an example
        example = math.prod(args[0].shape[1:]) + math.prod(args[2].shape[1:])
        return _RELATION_BUFFERS[device] + 8 * example
    return 0
