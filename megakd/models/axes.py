"""Which dimension of which weight belongs to which units: one table for all that is cut.

Slicing a forward, sorting by importance, cutting, scoring weights and counting parameters read
the same table, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megakd.contract.units import Axes, Axis, UnitOrder, View
from megakd.engine.sharding import full_shape
from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megakd.models.architectures import Architecture

WIDTH = Axis("width")


def weight_axes(model: PreTrainedModel) -> Mapping[str, Axes]:
    """The axes of every parameter that units can be taken out of, by its name on the model.

    Args:
        model: any model of a known family, on any device, sharded or not.
    """
    architecture = architecture_of(model.config)
    table = dict(_of_layers(model, architecture))
    width = architecture.hidden_width(model.config)
    attentions = [f"{paths.core}." for paths in architecture.attentions(model.config)]
    outputs = output_modules(model, architecture)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            # What else an attention has is as wide as one head (the norms of Qwen3), or has a
            # column for each head there ever was (the positions of T5): it is never cut.
            if full not in table and not full.startswith(tuple(attentions)):
                shape = full_shape(parameter)
                table[full] = _outside_layers(module, shape, width, path in outputs)
    return {name: axes for name, axes in table.items() if any(axes)}


def output_modules(model: PreTrainedModel, architecture: Architecture) -> set[str]:
    """The modules whose outputs are classes or tokens: the last one of each head."""
    heads = [architecture.head, *([architecture.masked.decoder] if architecture.masked else [])]
    last = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            last |= {head: path for head in heads if f"{path}.".startswith(f"{head}.")}
    return set(last.values())


def _of_layers(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[str, Axes]]:
    config = model.config
    heads = architecture.heads(config)
    shared = heads.queries // heads.keys
    for number, paths in enumerate(architecture.attentions(config)):
        queries = Axis("heads", number, heads.width * shared)
        keys = Axis("heads", number, heads.width)
        parts = 3 if paths.is_fused else 1
        for path, axis in zip(paths.projections, (queries, keys, keys), strict=True):
            yield from _linear(model, path, axis._replace(parts=parts), WIDTH)
        yield from _linear(model, paths.output, WIDTH, queries)
    for number, paths in enumerate(architecture.feed_forwards(config)):
        neurons = Axis("neurons", number)
        for path in paths.inputs:
            yield from _linear(model, path, neurons, WIDTH)
        yield from _linear(model, paths.output, WIDTH, neurons)


def _linear(
    model: PreTrainedModel, path: str, outputs: Axis, inputs: Axis
) -> Iterator[tuple[str, Axes]]:
    module = model.get_submodule(path)
    # GPT-2's Conv1D keeps its weight the other way round.
    yield (
        f"{path}.weight",
        (outputs, inputs) if isinstance(module, nn.Linear) else (inputs, outputs),
    )
    if getattr(module, "bias", None) is not None:
        yield f"{path}.bias", (outputs,)


def _outside_layers(
    module: nn.Module,
    shape: torch.Size,
    width: int,
    is_output: bool,  # noqa: FBT001
) -> Axes:
    """Embeddings, norms, poolers and heads: what is as wide as the hidden states follows them."""
    axes = [WIDTH if size == width else None for size in shape]
    if isinstance(module, nn.Embedding) or is_output:
        axes[0] = None  # tokens, positions, classes: as many as there are by chance or not
    return tuple(axes)


def narrowed(tensor: Tensor, axes: Axes, view: View) -> Tensor:
    """The part of a whole weight that a view keeps, its units being in order of importance.

    Args:
        tensor: the weight; the result shares its memory where one prefix is kept per dimension.
        axes: of this weight.
        view: what is kept.
    """
    for dimension, axis in enumerate(axes):
        kept = None if axis is None else axis.kept(view)
        if axis is None or kept is None:
            continue
        whole = tensor.unflatten(dimension, (axis.parts, -1))
        tensor = whole.narrow(dimension + 1, 0, kept * axis.size).flatten(dimension, dimension + 1)
    return tensor


def ordered(tensor: Tensor, axes: Axes, order: UnitOrder) -> Tensor:
    """A whole weight with its units in the given order; the model computes what it did."""
    for dimension, axis in enumerate(axes):
        units = None if axis is None else order.of(axis.kind, axis.number)
        if axis is None or units is None:
            continue
        index = torch.tensor(units, dtype=torch.long, device=tensor.device)
        cut = tensor.unflatten(dimension, (axis.parts, len(units), axis.size))
        tensor = cut.index_select(dimension + 1, index).flatten(dimension, dimension + 2)
    return tensor


def lengths(shape: torch.Size, axes: Axes, view: View) -> tuple[int, ...]:
    """The shape that a view leaves of a weight."""
    kept = [None if axis is None else axis.length(view) for axis in axes]
    return tuple(
        size if length is None else length for size, length in zip(shape, kept, strict=True)
    )
