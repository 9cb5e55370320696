"""Modules that compute with a prefix of their weights, as the current view defines it.

Each class here is laid over the class of a module by assigning `__class__`. Parameters, names and
hooks do not change, and without a view the module's original forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from megakd.contract.units import Axes, Axis, View
from megakd.engine.sharding import full_shape


class Prefix(NamedTuple):
    """The kept part of one dimension: the first `length` entries of each of its `parts`."""

    length: int
    parts: int = 1


Prefixes = tuple[Prefix, ...]


def window(whole: Tensor, prefixes: Prefixes) -> Tensor:
    """Return the kept part as a view, in which every dimension becomes two: [parts, length]."""
    for dimension, (length, parts) in reversed(list(enumerate(prefixes))):
        size = whole.shape[dimension] // parts
        whole = whole.unflatten(dimension, (parts, size)).narrow(dimension + 1, 0, length)
    return whole


def taken(whole: Tensor, prefixes: Prefixes) -> Tensor:
    """Return the kept part of a weight; it shares memory unless a dimension has several parts."""
    return window(whole, prefixes).reshape([length * parts for length, parts in prefixes])


def padded(part: Tensor, shape: torch.Size, prefixes: Prefixes) -> Tensor:
    """Return a whole tensor with `part` in the places that `taken` reads, and zeros elsewhere."""
    whole = part.new_zeros(shape)
    target = window(whole, prefixes)
    target.copy_(part.reshape(target.shape))
    return whole


@dataclass
class Views:
    """State that all modules of one elastic model read.

    current: the active view; None for the whole model.
    shared: outputs of the embeddings by their inputs; None if nothing is shared.
    """

    current: View | None = None
    shared: dict[Hashable, tuple[Any, Any]] | None = None

    @contextmanager
    def at(self, view: View | None) -> Iterator[None]:
        """Activate `view` inside the context, and restore the previous view afterwards."""
        former, self.current = self.current, view
        try:
            yield
        finally:
            self.current = former


@dataclass(frozen=True)
class Elasticity:
    """The views as seen by one module.

    axes, shapes: axes and shapes of the module's own parameters, by name.
    needs_heads: the module makes queries, keys or values for an attention that fails without heads.
    """

    views: Views
    axes: Mapping[str, Axes] = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    needs_heads: bool = False

    def prefixes(self, name: str) -> Prefixes | None:
        """Return the prefixes of a parameter in the current view; None: the whole parameter."""
        view, axes = self.views.current, self.axes.get(name)
        if view is None or axes is None:
            return None
        shape = self.shapes[name]
        kept = tuple(_prefix(axis, size, view) for axis, size in zip(axes, shape, strict=True))
        is_whole = all(p.length * p.parts == size for p, size in zip(kept, shape, strict=True))
        return None if is_whole else kept


def _prefix(axis: Axis | None, size: int, view: View) -> Prefix:
    kept = None if axis is None else axis.kept(view)
    if axis is None or kept is None:
        return Prefix(size)
    return Prefix(kept * axis.size, axis.parts)


class PrefixLinear(torch.autograd.Function):
    """x W^T + b with prefixes of W and b; the gradients are zero outside the prefixes.

    A map without inputs returns zeros, without its bias: a sub-layer without heads or neurons
    contributes nothing, as in MiniDisc's code. The gradient of its bias is zero.

    The function saves the parameter, not the slice, and slices again in the backward. Under ZeRO 3
    a slice would hold the whole gathered weight from the forward to the backward, whereas the
    parameter is released and gathered again. Empty prefixes are allowed, unlike in DeepSpeed's own
    linear function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        prefixes: Prefixes,
        output_dimension: int,
    ) -> Tensor:
        """Return outputs [..., O] of inputs [..., I]; the prefixes define O and I.

        Args:
            ctx: the autograd context.
            inputs: tensor with any number of leading dimensions.
            weight: whole, or sharded and currently gathered.
            bias: whole, or None.
            prefixes: prefixes of the weight's two dimensions.
            output_dimension: dimension of the outputs in the weight: 0 in a Linear, 1 in a Conv1D.
        """
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        ctx.prefixes, ctx.output_dimension = prefixes, output_dimension
        ctx.shapes = full_shape(weight), None if bias is None else full_shape(bias)
        rows = _as_rows(inputs)  # [N, I]
        matrix = _matrix(weight, prefixes, output_dimension)  # [O, I]
        ctx.adds_bias = bias is not None and matrix.shape[1] > 0
        if bias is None or not ctx.adds_bias:
            outputs = rows @ matrix.t()
        else:
            outputs = torch.addmm(taken(bias, (prefixes[output_dimension],)), rows, matrix.t())
        return outputs.view(*inputs.shape[:-1], len(matrix))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        rows, shapes = _as_rows(gradient), ctx.shapes  # [N, O]
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = _matrix(weight, ctx.prefixes, ctx.output_dimension).to(rows.dtype)
            of_inputs = (rows @ matrix).view(*gradient.shape[:-1], matrix.shape[1])
        if ctx.needs_input_grad[1]:
            part = rows.t() @ _as_rows(inputs).to(rows.dtype)  # [O, I]
            part = part if ctx.output_dimension == 0 else part.t()
            of_weight = padded(part, shapes[0], ctx.prefixes)
        if ctx.needs_input_grad[2]:
            part = rows.sum(0) if ctx.adds_bias else rows.new_zeros(rows.shape[1])
            of_bias = padded(part, shapes[1], (ctx.prefixes[ctx.output_dimension],))
        return of_inputs, of_weight, of_bias, None, None


def _as_rows(tensor: Tensor) -> Tensor:
    # The number of rows is explicit, because -1 is ambiguous if the last dimension is empty.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _matrix(weight: Tensor, prefixes: Prefixes, output_dimension: int) -> Tensor:
    part = taken(weight, prefixes)
    return part if output_dimension == 0 else part.t()


class ElasticModule(nn.Module):
    """Base of modules that follow the views; `stock` is the module's original class."""

    elasticity: Elasticity
    stock: ClassVar[type[nn.Module]]


class ElasticLinear(ElasticModule):
    """A linear map from a prefix of the inputs to a prefix of the outputs."""

    weight: Tensor
    bias: Tensor | None
    output_dimension: ClassVar[int] = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., I] to [..., O]; give one head of zeros if a required head is missing."""
        prefixes = self.elasticity.prefixes("weight")
        if prefixes is None:
            return super().forward(inputs)
        if prefixes[1 - self.output_dimension].length == 0:
            inputs = inputs[..., :0]
        outputs = PrefixLinear.apply(
            inputs, self.weight, self.bias, prefixes, self.output_dimension
        )
        if outputs.shape[-1] == 0 and self.elasticity.needs_heads:
            axis = self.elasticity.axes["weight"][self.output_dimension]
            outputs = nn.functional.pad(outputs, (0, axis.size * axis.parts if axis else 0))
        return outputs


class ElasticConv1D(ElasticLinear):
    """`ElasticLinear` for GPT-2's Conv1D, which stores the transposed weight."""

    output_dimension = 1


class ElasticEmbedding(ElasticModule):
    """An embedding that uses a prefix of its columns."""

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the embeddings [..., D] of numbers [...]."""
        rows = super().forward(numbers)
        prefixes = self.elasticity.prefixes("weight")
        return rows if prefixes is None else rows[..., : prefixes[1].length]


class ElasticNorm(ElasticModule):
    """A norm of narrower vectors; its statistics cover only the kept entries."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalized hidden states [..., D]."""
        prefixes = self.elasticity.prefixes("weight")
        if prefixes is None:
            return super().forward(hidden)
        return self.stock.forward(_NarrowNorm(self, prefixes), hidden)  # pyright: ignore[reportArgumentType]


class _NarrowNorm:
    """Stand-in for `self` in the forward of a stock norm under a view."""

    def __init__(self, norm: nn.Module, prefixes: Prefixes) -> None:
        self._norm = norm
        self.normalized_shape = (prefixes[0].length,)
        for name, parameter in norm.named_parameters(recurse=False):
            # A copy, because a slice would keep the whole vector that ZeRO 3 has gathered.
            setattr(self, name, taken(parameter, prefixes).clone())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._norm, name)


class ElasticSplit(ElasticModule):
    """An attention that splits one output into queries, keys and values, as in GPT-2."""

    @property
    def split_size(self) -> int:
        """The width of queries, of keys and of values; at least one head if heads are needed."""
        view, (axis, *_) = self.elasticity.views.current, self.elasticity.axes["heads"]
        if view is None or axis is None:
            return vars(self)["split_size"]
        kept = axis.kept(view) or 0
        return (max(kept, 1) if self.elasticity.needs_heads else kept) * axis.size


class ElasticLayer(ElasticModule):
    """A layer that gradient checkpointing repeats with the view of the first forward.

    The repetition runs in the backward, when another view may be active.
    """

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        if "_gradient_checkpointing_func" not in vars(self):
            raise AttributeError("gradient checkpointing was never enabled")
        return self._keep_forward

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        vars(self)["_gradient_checkpointing_func"] = function

    def _keep_forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        views, view = self.elasticity.views, self.elasticity.views.current

        def repeatable(*inputs: Any) -> Any:
            with views.at(view):
                return function(*inputs)

        return vars(self)["_gradient_checkpointing_func"](repeatable, *inputs)


class ElasticSource(ElasticModule):
    """The embeddings; while their output is shared, equal inputs give the same tensor.

    The whole call is skipped, hooks included, so that ZeRO 3 gathers the weights only once.
    """

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Return the module's output; reuse a shared output of the same inputs."""
        views = self.elasticity.views
        if views.shared is None:
            return super().__call__(*inputs, **options)
        width = None if views.current is None else views.current.width
        given = [*inputs, *options.items()]
        key = (width, self.training, torch.is_grad_enabled(), *(_identity(part) for part in given))
        if key not in views.shared:
            # The inputs are kept too, so that their memory is not reused for other tensors.
            views.shared[key] = (given, super().__call__(*inputs, **options))
        return views.shared[key][1]


def _identity(part: Any) -> Hashable:
    """Return a key that is equal for unchanged tensors with the same memory and layout."""
    if isinstance(part, tuple):
        return tuple(_identity(element) for element in part)
    if not isinstance(part, Tensor):
        return part
    place = part.untyped_storage().data_ptr(), part.storage_offset(), part._version  # noqa: SLF001
    return (*place, part.shape, part.stride(), part.dtype, part.device)


@functools.cache
def _laid_over(mixin: type[ElasticModule], stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}{stock.__name__}", (mixin, stock), {"stock": stock})


def make_elastic(module: nn.Module, mixin: type[ElasticModule], elasticity: Elasticity) -> None:
    """Lay `mixin` over the class of a module."""
    module.__class__ = _laid_over(mixin, type(module))
    vars(module)["elasticity"] = elasticity


def weights_in_view(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a linear map in the current view, for code that reads them.

    Args:
        module: elastic or not; under ZeRO 3, call inside the forward of a module that owns it.

    Returns:
        weight [O, I] and bias [O] or None. Slices share the memory of the weight, and gradients
        flow to the weight.
    """
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    bias: Tensor | None = getattr(module, "bias", None)
    if not isinstance(module, ElasticLinear):
        return weight, bias
    prefixes = module.elasticity.prefixes("weight")
    if prefixes is None:
        return weight, bias
    of_bias = (prefixes[module.output_dimension],)
    return taken(weight, prefixes), None if bias is None else taken(bias, of_bias)
