"""Forward and backward of a model on tensors that have shapes but no values.

The trace executes the same code as a run: the bundle, its losses, gradient checkpointing,
elastic views, and the attention of the installed transformers version. Nothing is computed or
allocated. A torch mode sees each operator, the sizes of its results, and the time of their
release.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from megakd.planning.moments import (
    MAPPED_BYTES,
    NOTHING,
    Amount,
    Inventory,
    Moment,
    Parameter,
    Trace,
    block,
)
from megakd.planning.workspaces import loss_flops, loss_workspace

VALUELESS = torch.device("meta")
"""Tensors on this device have shapes and dtypes, but no values and no memory."""


class Run(NamedTuple):
    """A trace and the result of its call."""

    trace: Trace
    said: Any


def inventory(module: nn.Module) -> Inventory:
    """Return the parameters of a module; tied parameters occur once."""
    parameters = tuple(
        Parameter(name, parameter.numel(), parameter.dim() > 1)
        for name, parameter in module.named_parameters()
    )
    return Inventory(parameters)


def trace_call(module: nn.Module, call: Callable[[], Any], *, backward: bool, device: str) -> Run:
    """Call a module once and, if requested, run the backward from the total of its losses.

    Args:
        module: module whose parameters are not counted as activations.
        call: runs the forward; its result needs a field `total` for a backward.
        backward: whether a backward follows.
        device: cpu or cuda, which determines the attention.
    """
    watch = Watch(module, device)
    with watch:
        with VALUELESS, _Valueless(device), nullcontext() if backward else torch.no_grad():
            result = call()
        watch.turn()
        if backward:
            result.total.backward()
    trace = Trace(tuple(watch.moments), watch.turned, watch.held, watch.flops)
    return Run(trace, result)


def repeat_alike(module: nn.Module, device: str) -> None:
    """Make forwards that gradient checkpointing repeats run in the modes of the first forward.

    A backward does not restore the torch modes of its forward.
    """
    for child in module.modules():
        checkpoint = getattr(child, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            vars(child)["_gradient_checkpointing_func"] = _carrying(checkpoint, device)


def _carrying(checkpoint: Callable[..., Any], device: str) -> Callable[..., Any]:
    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def carried(*inner: Any, **options: Any) -> Any:
            with VALUELESS, _Valueless(device):
                return function(*inner, **options)

        return checkpoint(carried, *args, **kwargs)

    return checkpointed


class _Valueless(TorchFunctionMode):
    """Mode that answers conditions on values and selects the attention of the device.

    A condition on values is False, so that masks are not omitted if there is no padding. On a CPU
    attention is fused unless it has dropout; on a GPU attention is always fused, and holds the
    same memory.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__bool__:
            return False
        if function is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _attention(  # noqa: PLR0913  (torch's signature)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        is_learned = attn_mask is not None and attn_mask.requires_grad and query.requires_grad
        if self._device == "cpu" and (dropout_p > 0 or is_learned):
            return torch.ops.aten._scaled_dot_product_attention_math(  # noqa: SLF001
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0]
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = (part.expand(-1, part.shape[1], -1, -1) for part in (key, value))
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        bias = None if attn_mask is None else attn_mask.detach()
        mixed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )[0]
        # A learned bias gets its gradient here, as from the operator of a GPU.
        return mixed + attn_mask.sum() * 0 if attn_mask is not None and is_learned else mixed


class Watch(TorchDispatchMode):
    """Mode that counts the memory in use by active module."""

    def __init__(self, module: nn.Module, device: str) -> None:
        super().__init__()
        self._device = device
        names = dict(module.named_parameters())
        self._module = module
        self._number = {id(parameter): n for n, parameter in enumerate(names.values())}
        self._parameter_of = {_storage(p): n for n, p in enumerate(names.values())}
        self._known: dict[int, tuple[int, Any]] = {}
        self._ignored = {_storage(tensor) for tensor in module.buffers()}
        self._small = self._large = 0
        self._hooks: list[Any] = []
        self.moments: list[Moment] = [Moment("", forward=True)]
        self.turned, self.held, self.flops = 0, NOTHING, 0.0

    def __enter__(self) -> Watch:
        for path, child in self._module.named_modules():
            own = [self._number[id(p)] for p in child.parameters(recurse=False)]
            if own or not any(True for _ in child.children()):
                self._watch(child, path, tuple(own))
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._finish)
                self._hooks.append(hook)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, path: str, own: tuple[int, ...]) -> None:
        def before(_module: nn.Module, _inputs: Any) -> None:
            self._begin(path, own, forward=True)

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in tree_iter(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._begin(path, own, forward=False))
                    break

        self._hooks += [module.register_forward_pre_hook(before)]
        self._hooks += [module.register_forward_hook(after)]

    def _begin(self, path: str, own: tuple[int, ...], *, forward: bool) -> None:
        live = Amount(self._small, self._large)
        self.moments.append(Moment(path, forward, own, set(own), live))

    def _finish(self, parameter: Tensor) -> None:
        self.moments[-1].finished.append(self._number[id(parameter)])
        parameter.grad = None

    def turn(self) -> None:
        """Record the end of the forward."""
        self.held = Amount(self._small, self._large)
        self.turned = len(self.moments)
        self.moments.append(Moment("", forward=False, live=self.held))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check would double the time

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        moment = self.moments[-1]
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                used = self._parameter_of.get(_storage(tensor))
                if used is not None:
                    moment.used.add(used)
        out = function(*args, **kwargs)
        self._add_in_place(function, args, out)
        self._count_flops(function, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        workspace = loss_workspace(function, args, self._device)
        if workspace:
            moment.workspace = moment.workspace.most(block(workspace))
        if self._small > moment.live.small or self._large > moment.live.large:
            moment.live = moment.live.most(Amount(self._small, self._large))
        return out

    def _count_flops(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        count = flop_registry.get(getattr(function, "overloadpacket", None))
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        else:
            self.flops += loss_flops(function, args)

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001  (identifies a storage)
        if key in self._known or key in self._parameter_of or key in self._ignored:
            return
        size = storage.nbytes()
        self._known[key] = (size, weakref.ref(storage, lambda _: self._free(key)))
        self._change(size)

    def _add_in_place(self, function: Any, args: Any, out: Any) -> None:
        """Free the first gradient of a sum: autograd adds in place, except on valueless tensors."""
        if function is not torch.ops.aten.add.Tensor or not self.turned or torch.is_grad_enabled():
            return
        first = args[0]
        if isinstance(first, Tensor) and first.shape == out.shape and first.dtype == out.dtype:
            self._free(_storage(first))

    def _free(self, key: int) -> None:
        size, _ = self._known.pop(key, (0, None))
        self._change(-size)

    def _change(self, size: int) -> None:
        if abs(size) >= MAPPED_BYTES:
            self._large += size
        else:
            self._small += size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  (as above)
