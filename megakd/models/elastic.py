"""Models that can run as any of their sub-networks without a copy of the weights.

Slicing a forward, sorting by importance, cutting, scoring weights and counting parameters all read
this table, so that they cannot disagree.

Each class here is laid over the class of a module by assigning `__class__`. Parameters, names and
hooks do not change, and without a view the module's original forward runs.

If the units are sorted by importance, a sub-network is a prefix of every weight. Its forward
multiplies only with the prefixes, so that a view of a tenth of the units costs about a tenth of the
attentions and feed-forwards. Its gradients have the size of the whole weights and are zero outside
the prefixes. If the units are not sorted, a sub-network is a list of rows and columns of every
weight, which each forward copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from megakd.engine.sharding import full_shape
from megakd.errors import ModelError
from megakd.models.architectures import Architecture
from megakd.models.experts import with_expert_axes
from megakd.models.layers import passed_by
from megakd.models.proposed_units import WIDTH, axes_of
from megakd.models.structure import architecture_of
from megakd.models.units import KINDS
from megakd.models.views import Axes, Axis, Cut, Kind, Maker, View

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_axes(model: PreTrainedModel) -> Mapping[str, Axes]:
    """Return the axes of all parameters that contain prunable units, by name on the model.

    The result is empty for a family that cannot be cut.
    """
    architecture, table = architecture_of(model.config), dict[str, Axes]()
    if architecture.why_uncut(model.config) is None:
        table.update(axes_of(model, architecture.found_units(model.config)))
    return with_expert_axes(model.config, table)


def unit_makers(model: PreTrainedModel) -> dict[str, Maker]:
    """Return the matrices of the layers and embeddings whose outputs are units, by name.

    The columns of the hidden states are made by the embeddings and by the outputs of attentions
    and feed-forwards, heads by queries, keys and values, neurons by the inputs of feed-forwards.
    """
    found, table = architecture_of(model.config).found_units(model.config), weight_axes(model)
    paths = {
        f"{owner}.{path}"
        for _, owner, units in (*found.parts_with("heads"), *found.parts_with("neurons"))
        for path in (*units.makers, units.output)
    }
    makers: dict[str, Maker] = {}
    for path, module in model.named_modules():
        name, is_embedding = f"{path}.weight", isinstance(module, nn.Embedding)
        # ELECTRA's embeddings may be narrower than the hidden states that a matrix makes of them.
        is_raised = isinstance(module, nn.Linear) and table.get(name) == (WIDTH, None)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        # A weight without elements, in a layer without heads or neurons, is no parameter.
        is_maker = is_embedding or is_raised or path in paths
        if name not in table or weight is None or not is_maker:
            continue
        dimension = 1 if is_embedding or not isinstance(module, nn.Linear) else 0
        axis, inputs = table[name][dimension], table[name][1 - dimension]
        if axis is not None:
            rows, columns = full_shape(weight)
            makers[name] = Maker(axis, inputs, dimension, (rows, columns))
    return makers


def check_view(view: View, whole: View) -> None:
    """Raise if a model with these units (see `Architecture.prunable`) has no such sub-network."""
    counts = (view.heads, whole.heads), (view.neurons, whole.neurons)
    columns = (view.width, whole.width), (view.head_width, whole.head_width)
    is_within = all(
        len(kept) == len(every) and all(0 <= n <= most for n, most in zip(kept, every, strict=True))
        for kept, every in counts
    )
    if not is_within or any(kept is not None and not 0 < kept <= (n or 0) for kept, n in columns):
        raise ModelError(
            f"the model cannot be cut to {view}, because it has {whole}: only some families lose "
            "columns of hidden states (width) or of heads, see docs/families.md"
        )


class Kept(NamedTuple):
    """The kept part of one dimension: its first entries, or `rows` [length] in this order."""

    length: int
    rows: Tensor | None = None


Dimensions = tuple[Kept, ...]
"""The kept part of a weight: one entry per dimension."""


def taken(whole: Tensor, kept: Dimensions) -> Tensor:
    """Return the kept part of a weight, which shares memory if each dimension keeps a prefix."""
    for dimension, (length, rows) in enumerate(kept):
        whole = whole.narrow(dimension, 0, length) if rows is None else whole
    for dimension, (_, rows) in enumerate(kept):
        whole = whole if rows is None else whole.index_select(dimension, rows)
    return whole


def padded(part: Tensor, shape: torch.Size, kept: Dimensions) -> Tensor:
    """Return a whole tensor with `part` in the places that `taken` reads, and zeros elsewhere."""
    for dimension, (_, rows) in enumerate(kept):
        if rows is not None:
            wider = part.new_zeros(
                (*part.shape[:dimension], shape[dimension], *part.shape[dimension + 1 :])
            )
            part = wider.index_copy_(dimension, rows, part)
    if part.shape == shape:
        return part
    whole = target = part.new_zeros(shape)
    for dimension, length in enumerate(part.shape):
        target = target.narrow(dimension, 0, length)
    target.copy_(part)
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
        if axis.keeps_prefix(cut) and axis.parts == 1:
            return Kept(axis.length(cut.view) or 0)
        # Copied to the device once per cut. The order in which a base keeps units is long.
        key = (axis, size, device, None if cut is self.base else cut)
        if key not in self._rows:
            rows = axis.rows(cut, size)
            places = torch.tensor(rows, dtype=torch.long, device=device)
            is_whole = rows == [*range(size)]
            self._rows[key] = Kept(size) if is_whole else Kept(len(rows), places)
        return self._rows[key]


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
            k.rows is None and k.length == size
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


class ElasticHeads(ElasticModule):
    """An attention that splits its vectors by a number, whose heads or their columns may go."""

    @property
    def split_size(self) -> int:
        """The width of queries, of keys and of values; at least one head if heads are needed."""
        cut, (axis, *_) = self.elasticity.views.current, self.elasticity.axes["heads"]
        if cut is None or axis is None or cut.view is None:
            return vars(self)["split_size"]
        kept = axis.kept(cut.view) or 0
        return (max(kept, 1) if self.elasticity.needs_heads else kept) * axis.size

    @property
    def attention_head_size(self) -> int:
        """The number of columns of each head, which may lose some (`Cuttable.can_lose_columns`)."""
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


MIXINS: Mapping[type[nn.Module], type[ElasticModule]] = {
    nn.Linear: ElasticLinear,
    Conv1D: ElasticConv1D,
    nn.Embedding: ElasticEmbedding,
}


class Elastic:
    """A model made elastic in place, before or after `deepspeed.initialize`, at any ZeRO stage.

    The parameters, their names, the state dict, and the function of the model outside `viewing` do
    not change. Every module runs in every view, also in layers without heads, so that ZeRO 3 sees
    the same modules in the same order. Several views may run forward before one backward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if any(isinstance(module, ElasticModule) for module in model.modules()):
            raise ModelError(
                f"{type(model).__name__} is already elastic; use the existing Elastic of the model"
            )
        architecture = architecture_of(model.config)
        self.units = architecture.units(model.config)
        self._model = model
        self.prunable = architecture.prunable(model.config)
        self._views = Views()
        self._lay_over_weights(model, architecture)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                make_elastic(module, ElasticLayer, Elasticity(self._views))
        for number in range(1, architecture.number_of_layers(model.config) + 1):
            block = architecture.block_of(model, number)
            block.register_forward_hook(partial(self._pass_by, number), with_kwargs=True)
        embeddings = architecture.backbone_of(model).get_submodule(architecture.embeddings)
        known = embeddings.elasticity if isinstance(embeddings, ElasticModule) else None
        make_elastic(embeddings, ElasticSource, known or Elasticity(self._views))

    @cached_property
    def makers(self) -> dict[str, Maker]:
        return unit_makers(self._model)

    def _pass_by(self, layer: int, *facts: Any) -> Any:
        # The hook of a layer: hidden states pass it by if the view lacks it.
        cut = self._views.current
        layers = None if cut is None or cut.view is None else cut.view.layers
        return None if layers is None or layer in layers else passed_by(*facts)

    def _lay_over_weights(self, model: PreTrainedModel, architecture: Architecture) -> None:
        table = weight_axes(model)
        found = architecture.found_units(model.config)
        # Modules between the maps of these units do not take fewer of them.
        filling: set[Kind] = {kind for kind in KINDS if not getattr(found, kind).layers_run_narrow}
        needing_heads = self._prepare_attentions(model, architecture, table)
        for path, module in model.named_modules():
            # In a cut model, a weight without elements is a buffer.
            weights = dict(module.named_parameters(recurse=False))
            tensors = {**weights, **dict(module.named_buffers(recurse=False))}
            shapes = {name: full_shape(tensor) for name, tensor in tensors.items()}
            names = {name: f"{path}.{name}" if path else name for name in shapes}
            axes = {name: table[full] for name, full in names.items() if full in table}
            if not axes:
                continue
            mixin = next((m for stock, m in MIXINS.items() if isinstance(module, stock)), None)
            # A module whose parameters are all vectors is a norm; its class differs by family.
            is_norm = all(len(full_shape(weight)) == 1 for weight in weights.values())
            mixin = ElasticNorm if mixin is None and is_norm and "weight" in weights else mixin
            fills = any(axis and axis.kind in filling for part in axes.values() for axis in part)
            if mixin is None or (fills and mixin is ElasticNorm):
                continue  # works on all units, of which some are zero
            needs_heads = path in needing_heads
            elasticity = Elasticity(self._views, axes, shapes, needs_heads, filling)
            make_elastic(module, mixin, elasticity)

    def _prepare_attentions(
        self, model: PreTrainedModel, architecture: Architecture, table: Mapping[str, Axes]
    ) -> set[str]:
        """Return the paths of projections that must give one head of zeros if a view has none."""
        needing: set[str] = set()
        found = architecture.found_units(model.config)
        for _, owner, units in found.parts_with("heads"):
            makers = [f"{owner}.{path}" for path in units.makers]
            core = model.get_submodule(f"{owner}.{units.core}".removesuffix("."))
            needs_heads = not getattr(core, "handles_no_heads", False)
            needing |= {*makers} if needs_heads else set()
            is_split = found.heads.layers_run_narrow and hasattr(core, "split_size")
            if is_split or found.heads.can_lose_columns:
                axes = table[f"{makers[0]}.weight"]
                heads = tuple(axis for axis in axes if axis is not None and axis.kind == "heads")
                elasticity = Elasticity(self._views, {"heads": heads}, needs_heads=needs_heads)
                make_elastic(core, ElasticHeads, elasticity)
        return needing

    @contextmanager
    def viewing(self, view: View | None) -> Iterator[None]:
        """Run the model as a view of itself inside the context; the innermost context counts.

        The view is the same on all ranks; None runs the model as `keep` has left it, by default
        whole.
        """
        cut = self._views.base
        if view is not None:
            check_view(view, self.prunable)
            cut = Cut(None, view._replace(width=None) if view.width == self.units.width else view)
        with self._views.at(cut):
            yield

    def keep(self, cut: Cut | None) -> None:
        """Run the model as a cut of itself, the same on all ranks, from now on; None: whole.

        The outputs are those of the model that is cut in this way (`cut_state`). Weights that are
        not kept get gradients of zero.
        """
        if cut is not None and cut.view is not None:
            check_view(cut.view, self.prunable)
        self._views.keep(cut)

    def follow(self, linear: nn.Module) -> None:
        """Let a linear map [O, D] outside the model take the kept columns of the hidden states.

        Its `weights_in_view` then have only the kept columns.
        """
        axes = {"weight": (None, WIDTH)}
        shapes = {name: full_shape(weight) for name, weight in linear.named_parameters()}
        make_elastic(linear, ElasticLinear, Elasticity(self._views, axes, shapes))

    @contextmanager
    def sharing_embeddings(self) -> Iterator[None]:
        """Compute the embeddings once per input inside the context, with one dropout for all views.

        The gradient of the embeddings is the sum over all views, which must go through one
        backward. A view shares embeddings only with views of the same residual width.
        """
        former, self._views.shared = self._views.shared, {}
        try:
            yield
        finally:
            self._views.shared = former
