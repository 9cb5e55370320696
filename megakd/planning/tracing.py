"""Forward and backward of a model on tensors that have shapes but no values.

The trace executes the same code as a run: the bundle, its losses, gradient checkpointing,
elastic views, and the attention of the installed transformers version. Nothing is computed or
allocated. A torch mode sees each operator, the sizes of its results, and the time of their
release.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from megakd.planning.moments import NOTHING, Amount, Inventory, Moment, Parameter, Trace, block
from megakd.planning.workspaces import loss_flops, loss_workspace

VALUELESS = torch.device("meta")
"""Tensors on this device have shapes and dtypes, but no values and no memory."""


def inventory(module: nn.Module) -> Inventory:
    """Return the parameters of a module; tied parameters occur once."""
    return Inventory(
        Parameter(p.numel(), p.dim() > 1, p.requires_grad) for p in module.parameters()
    )


def trace_call(
    module: nn.Module,
    call: Callable[[], Any],
    *,
    backward: bool,
    device: str,
    memory: int | None = None,
) -> tuple[Trace, Any]:
    """Call a module once and, if requested, run the backward from the total of its losses.

    Args:
        module: module whose parameters are not counted as activations.
        call: runs the forward; its result needs a field `total` for a backward.
        backward: whether a backward follows.
        device: cpu or cuda, which determines the attention.
        memory: bytes of a GPU, which determine the buffers of the losses; None: not known.

    Returns:
        The trace, and the result of the call.
    """
    with Watch(module, device, memory) as watch:
        with without_values(device), nullcontext() if backward else torch.no_grad():
            result = call()
        watch.turn()
        if backward:
            result.total.backward()
    return Trace(inventory(module), watch.moments, watch.turned, watch.flops), result


@contextmanager
def without_values(device: str) -> Iterator[None]:
    """Make tensors without values, in a model that behaves as on `device`."""
    with VALUELESS, _Valueless(device):
        yield


def repeat_alike(model: Any, device: str, *, offload: bool = False) -> None:
    """Make forwards that gradient checkpointing repeats run in the modes of the first forward.

    A backward does not restore the torch modes of its forward.

    Args:
        model: a model without values.
        device: cpu or cuda, which determines the attention.
        offload: whether the inputs of repeated layers wait in host memory.
    """

    def modes() -> tuple[Any, Any]:
        return nullcontext(), without_values(device)

    def repeated(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        with saved_tensors_hooks(_shape_of, _made_of) if offload else nullcontext():
            return checkpoint(function, *inputs, use_reentrant=False, context_fn=modes, **options)

    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = repeated  # noqa: SLF001  (transformers' own)


def _shape_of(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _made_of(saved: tuple[torch.Size, torch.dtype]) -> Tensor:
    shape, dtype = saved
    return torch.empty(shape, dtype=dtype, device=VALUELESS)


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


class Watch(TorchDispatchMode):
    """Mode that counts the memory in use by active module."""

    def __init__(self, module: nn.Module, device: str, memory: int | None) -> None:
        super().__init__()
        self._module, self._device, self._memory = module, device, memory
        self._number = {_storage(p): number for number, p in enumerate(module.parameters())}
        self._ignored = {_storage(tensor) for tensor in module.buffers()} | self._number.keys()
        self._known: dict[int, tuple[Amount, Any]] = {}
        self._live = NOTHING
        self._hooks: list[Any] = []
        self.moments = [Moment("")]
        self.turned, self.flops = 0, 0.0

    def __enter__(self) -> Watch:
        for path, child in self._module.named_modules():
            own = {self._number[_storage(p)] for p in child.parameters(recurse=False)}
            if own or next(child.children(), None) is None:
                self._watch(child, path, own)
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(self._finish)
                self._hooks.append(hook)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, path: str, own: set[int]) -> None:
        def begin(*_: Any) -> None:
            self.moments.append(Moment(path, set(own), self._live))

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
        """Record the end of the forward."""
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
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        self.flops += count(*args, **kwargs, out_val=out) if count else loss_flops(func, args)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._take(tensor)
        workspace = block(loss_workspace(func, args, self._device, self._memory))
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
        """Free the first gradient of a sum: autograd adds in place, except on valueless tensors."""
        if func is not torch.ops.aten.add.Tensor or not self.turned or torch.is_grad_enabled():
            return
        first = args[0]
        if isinstance(first, Tensor) and first.shape == out.shape and first.dtype == out.dtype:
            self._free(_storage(first))

    def _free(self, key: int) -> None:
        size, _ = self._known.pop(key, (NOTHING, None))
        self._live = self._live.plus(size.times(-1))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001  (identifies a storage)
