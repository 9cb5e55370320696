"""Modules that compute with a part of their weights, as the current cut of the model defines it.

Each class here is laid over the class of a module by assigning `__class__`. Parameters, names and
hooks do not change, and without a view the module's original forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from megakd.contract.views import Axes, Axis, Cut, Kind
from megakd.engine.sharding import full_shape


class Kept(NamedTuple):
    """The kept part of one dimension.

    length, parts: the first `length` entries of each of `parts` equal parts are kept.
    rows: [length] the entries that are kept instead, in this order, if `parts` is 1.
    """

    length: int
    parts: int = 1
    rows: Tensor | None = None


Dimensions = tuple[Kept, ...]
"""The kept part of a weight: one entry per dimension."""


def _prefix_view(whole: Tensor, kept: Dimensions) -> Tensor:
    # Every dimension becomes two, [parts, length]; a list of rows is taken afterwards.
    for dimension, (length, parts, rows) in reversed(list(enumerate(kept))):
        size = whole.shape[dimension] // parts
        whole = whole.unflatten(dimension, (parts, size))
        whole = whole.narrow(dimension + 1, 0, size if rows is not None else length)
    return whole


def taken(whole: Tensor, kept: Dimensions) -> Tensor:
    """Return the kept part of a weight, which shares memory if each dimension keeps one prefix."""
    part = _prefix_view(whole, kept)
    part = part.reshape([p * n for p, n in zip(part.shape[::2], part.shape[1::2], strict=True)])
    for dimension, (_, _, rows) in enumerate(kept):
        part = part if rows is None else part.index_select(dimension, rows)
    return part


def padded(part: Tensor, shape: torch.Size, kept: Dimensions) -> Tensor:
    """Return a whole tensor with `part` in the places that `taken` reads, and zeros elsewhere."""
    for dimension, (_, _, rows) in enumerate(kept):
        if rows is not None:
            wider = part.new_zeros(
                (*part.shape[:dimension], shape[dimension], *part.shape[dimension + 1 :])
            )
            part = wider.index_copy_(dimension, rows, part)
    if part.shape == shape:
        return part
    whole = part.new_zeros(shape)
    target = _prefix_view(whole, kept)
    target.copy_(part.reshape(target.shape))
    return whole


@dataclass
class Views:
    """State that all modules of one elastic model read.

    base: how the model runs outside all contexts; None for the whole model.
    current: how the model runs now.
    shared: outputs of the embeddings by their inputs; None if nothing is shared.
    """

    base: Cut | None = None
    current: Cut | None = None
    shared: dict[Hashable, tuple[Any, Any]] | None = None
    _rows: dict[Hashable, Kept] = field(default_factory=dict)

    @contextmanager
    def at(self, cut: Cut | None) -> Iterator[None]:
        former, self.current = self.current, cut
        try:
            yield
        finally:
            self.current = former

    def keep(self, cut: Cut | None) -> None:
        """Run as a cut from now on; call this outside all contexts."""
        self.base = self.current = cut
        self._rows.clear()

    def kept(self, axis: Axis | None, size: int, device: torch.device) -> Kept:
        """Return the part of a dimension of `size` entries that is kept now."""
        cut = self.current
        if cut is None or axis is None or axis.kept(cut.view) is None:
            return Kept(size)
        if axis.keeps_prefix(cut):
            return Kept((axis.length(cut.view) or 0) // axis.parts, axis.parts)
        key = (axis, size, device)
        if cut is self.base and key in self._rows:
            return self._rows[key]
        rows = axis.rows(cut, size)
        if rows == [*range(size)]:
            kept = Kept(size)
        else:
            kept = Kept(len(rows), 1, torch.tensor(rows, dtype=torch.long, device=device))
        if cut is self.base:  # copied to the device once per cut, not once per forward
            self._rows[key] = kept
        return kept


@dataclass(frozen=True)
class Elasticity:
    """The views as seen by one module.

    axes, shapes: axes and shapes of the module's own parameters, by name.
    needs_heads: the module makes queries, keys or values for an attention that fails without heads.
    fills: kinds of units of which what lies between the maps takes all: others are zeros.
    """

    views: Views
    axes: Mapping[str, Axes] = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)
    needs_heads: bool = False
    fills: Collection[Kind] = ()

    def kept(self, name: str, device: torch.device) -> Dimensions | None:
        """Return the kept part of a parameter now; None: the whole parameter."""
        axes = self.axes.get(name)
        if self.views.current is None or axes is None:
            return None
        sizes = zip(axes, self.shapes[name], strict=True)
        kept = tuple(self.views.kept(axis, size, device) for axis, size in sizes)
        is_whole = all(
            k.rows is None and k.length * k.parts == size
            for k, size in zip(kept, self.shapes[name], strict=True)
        )
        return None if is_whole else kept


class NarrowLinear(torch.autograd.Function):
    """x W^T + b with parts of W and b; the gradients are zero outside the parts.

    A map without inputs returns zeros, without its bias: a sub-layer without heads or neurons
    contributes nothing, as in MiniDisc's code. The gradient of its bias is zero.

    The function saves the parameter, not the slice, and slices again in the backward. Under ZeRO 3
    a slice would hold the whole gathered weight from the forward to the backward, whereas the
    parameter is released and gathered again. Empty parts are allowed, unlike in DeepSpeed's own
    linear function.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kept: Dimensions,
        output_dimension: int,
    ) -> Tensor:
        """Return outputs [..., O] of inputs [..., I]; the kept part defines O and I.

        The outputs are dimension 0 of the weight of a Linear, and 1 of that of a Conv1D.
        """
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight)
        ctx.kept, ctx.output_dimension = kept, output_dimension
        ctx.shapes = full_shape(weight), None if bias is None else full_shape(bias)
        rows = _as_rows(inputs)  # [N, I]
        matrix = _matrix(weight, kept, output_dimension)  # [O, I]
        ctx.adds_bias = bias is not None and matrix.shape[1] > 0
        if bias is None or not ctx.adds_bias:
            outputs = rows @ matrix.t()
        else:
            outputs = torch.addmm(taken(bias, (kept[output_dimension],)), rows, matrix.t())
        return outputs.view(*inputs.shape[:-1], len(matrix))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        (gradient,) = gradients
        rows, shapes = _as_rows(gradient), ctx.shapes  # [N, O]
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = _matrix(weight, ctx.kept, ctx.output_dimension).to(rows.dtype)
            of_inputs = (rows @ matrix).view(*gradient.shape[:-1], matrix.shape[1])
        if ctx.needs_input_grad[1]:
            part = rows.t() @ _as_rows(inputs).to(rows.dtype)  # [O, I]
            part = part if ctx.output_dimension == 0 else part.t()
            of_weight = padded(part, shapes[0], ctx.kept)
        if ctx.needs_input_grad[2]:
            part = rows.sum(0) if ctx.adds_bias else rows.new_zeros(rows.shape[1])
            of_bias = padded(part, shapes[1], (ctx.kept[ctx.output_dimension],))
        return of_inputs, of_weight, of_bias, None, None


def _in_last(change: Callable[[Tensor, Dimensions], Tensor], tensor: Tensor, kept: Kept) -> Tensor:
    # Take or fill a part of the last dimension.
    rows = _as_rows(tensor)
    changed = change(rows, (Kept(len(rows)), kept))
    return changed.view(*tensor.shape[:-1], changed.shape[-1])


def _as_rows(tensor: Tensor) -> Tensor:
    # The number of rows is explicit, because -1 is ambiguous if the last dimension is empty.
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _matrix(weight: Tensor, kept: Dimensions, output_dimension: int) -> Tensor:
    part = taken(weight, kept)
    return part if output_dimension == 0 else part.t()


class ElasticModule(nn.Module):
    """Base of modules that follow the views; `stock` is the module's original class."""

    elasticity: Elasticity
    stock: ClassVar[type[nn.Module]]


class ElasticLinear(ElasticModule):
    """A linear map from the kept inputs to the kept outputs."""

    weight: Tensor
    bias: Tensor | None
    output_dimension: ClassVar[int] = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., I] to [..., O]; give one head of zeros if a required head is missing."""
        kept = self.elasticity.kept("weight", self.weight.device)
        if kept is None:
            return super().forward(inputs)
        into, out = kept[1 - self.output_dimension], kept[self.output_dimension]
        if into.length == 0:
            inputs = inputs[..., :0]
        elif self._fills(1 - self.output_dimension):
            inputs = _in_last(taken, inputs, into)
        outputs = NarrowLinear.apply(inputs, self.weight, self.bias, kept, self.output_dimension)
        if self._fills(self.output_dimension):
            size = self.elasticity.shapes["weight"][self.output_dimension]
            shape = torch.Size((outputs.shape[:-1].numel(), size))
            return _in_last(lambda rows, kept: padded(rows, shape, kept), outputs, out)
        if outputs.shape[-1] == 0 and self.elasticity.needs_heads:
            axis = self.elasticity.axes["weight"][self.output_dimension]
            cut = self.elasticity.views.current
            size = axis.size_in(cut and cut.view) * axis.parts if axis else 0
            outputs = nn.functional.pad(outputs, (0, size))
        return outputs

    def _fills(self, dimension: int) -> bool:
        axis = self.elasticity.axes["weight"][dimension]
        return axis is not None and axis.kind in self.elasticity.fills


class ElasticConv1D(ElasticLinear):
    """`ElasticLinear` for GPT-2's Conv1D, which stores the transposed weight."""

    output_dimension = 1


class ElasticEmbedding(ElasticModule):
    """An embedding that uses some of its columns."""

    weight: Tensor

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Return the embeddings [..., D] of numbers [...]; scaled ones as a cut model does."""
        rows = super().forward(*inputs, **options)
        kept = self.elasticity.kept("weight", self.weight.device)
        if kept is None:
            return rows
        columns = kept[1]
        if hasattr(self, "scalar_embed_scale"):  # Gemma's: the root of the width
            rows = rows * (columns.length / full_shape(self.weight)[1]) ** 0.5
        if columns.rows is None:
            return rows[..., : columns.length]
        return rows.index_select(-1, columns.rows)


class ElasticNorm(ElasticModule):
    """A norm of narrower vectors; its statistics cover only the kept entries."""

    weight: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        kept = self.elasticity.kept("weight", self.weight.device)
        if kept is None:
            return super().forward(hidden)
        if hidden.shape[-1] > kept[0].length:  # DeBERTa's of the weight of a table
            hidden = _in_last(taken, hidden, kept[0])
        return self.stock.forward(_NarrowNorm(self, kept), hidden)  # pyright: ignore[reportArgumentType]


class _NarrowNorm:
    """Stand-in for `self` in the forward of a stock norm under a view."""

    def __init__(self, norm: nn.Module, kept: Dimensions) -> None:
        self._whole = norm  # `_norm` is a method of Gemma's norms
        self.normalized_shape = (kept[0].length,)
        for name, parameter in norm.named_parameters(recurse=False):
            # A copy, because a slice would keep the whole vector that ZeRO 3 has gathered.
            setattr(self, name, taken(parameter, kept).clone())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


class ElasticSplit(ElasticModule):
    """An attention that splits one output into queries, keys and values, as in GPT-2."""

    @property
    def split_size(self) -> int:
        """The width of queries, of keys and of values; at least one head if heads are needed."""
        cut, (axis, *_) = self.elasticity.views.current, self.elasticity.axes["heads"]
        if cut is None or axis is None or cut.view is None:
            return vars(self)["split_size"]
        kept = axis.kept(cut.view) or 0
        return (max(kept, 1) if self.elasticity.needs_heads else kept) * axis.size


class ElasticHeads(ElasticModule):
    """An attention whose heads may lose columns, in families with `Cuttable.columns`."""

    @property
    def attention_head_size(self) -> int:
        """The number of columns of each head, with which the attention splits its vectors."""
        cut, (axis, *_) = self.elasticity.views.current, self.elasticity.axes["heads"]
        if cut is None or axis is None:
            return vars(self)["attention_head_size"]
        return axis.size_in(cut.view)


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
        views, cut = self.elasticity.views, self.elasticity.views.current

        def repeatable(*inputs: Any) -> Any:
            with views.at(cut):
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
        view = None if views.current is None else views.current.view
        width = None if view is None else view.width
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
    """Return the weight [O, I] and bias [O] or None of a linear map in the current view.

    Slices share the memory of the weight, and gradients flow to the weight. Under ZeRO 3, call this
    inside the forward of a module that owns the map.
    """
    weight: Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    bias: Tensor | None = getattr(module, "bias", None)
    if not isinstance(module, ElasticLinear):
        return weight, bias
    kept = module.elasticity.kept("weight", weight.device)
    if kept is None:
        return weight, bias
    of_bias = (kept[module.output_dimension],)
    return taken(weight, kept), None if bias is None else taken(bias, of_bias)
