"""The dimensions of weights along which units lie, and weights that are cut along them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from megakd.contract.views import Axes, Axis, Columns, Cut, Kind, View
from megakd.engine.sharding import full_shape
from megakd.models.proposed_units import Cuttable, FoundUnits, Units

WIDTH = Axis("width")


def axes_of(model: nn.Module, found: FoundUnits) -> Mapping[str, Axes]:
    """Return the axes of all parameters that contain units, by name on the model."""
    table: dict[str, Axes] = {}
    # In a cut model, a weight without elements is a buffer.
    buffers = {name: one for name, one in model.named_buffers() if not one.numel()}
    named = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    for name, tensor in named.items():
        dimensions, wide = range(len(full_shape(tensor))), found.width.get(found.starred(name), ())
        if wide:
            table[name] = tuple(WIDTH if n in wide else None for n in dimensions)
    for name, dimension, axis in _of_units(found):
        axes = [*table.get(name, (None,) * len(full_shape(named[name])))]
        axes[dimension] = axis
        table[name] = tuple(axes)
    return table


def _of_units(found: FoundUnits) -> Iterator[tuple[str, int, Axis]]:
    kinds: tuple[tuple[Kind, Cuttable], ...] = ("heads", found.heads), ("neurons", found.neurons)
    for kind, cuttable in kinds:
        for number, owner, units in found.of(kind):
            for name, (dimension, blocks) in units.parts.items():
                if len({*blocks}) == 1:
                    columns = _columns(units, name) if cuttable.columns else None
                    axis = Axis(kind, number, blocks[0], len(blocks), columns)
                else:
                    axis = Axis(kind, number, sum(blocks), blocks=blocks)
                yield f"{owner}.{name}", dimension, axis


def _columns(units: Units, name: str) -> Columns:
    scores = tuple(f"{path}." for path in units.makers[:2])
    return "queries" if name.startswith(scores) else "values"


def cut_part(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Return a whole weight with its units reordered, and then cut to a view.

    The part shares the memory of the weight if each dimension keeps one prefix.
    """
    for dimension, axis in enumerate(axes):
        if axis is None or (axis.length(cut.view) is None and not axis.is_listed_in(cut.order)):
            continue
        if axis.keeps_prefix(cut):
            length = (axis.length(cut.view) or 0) // axis.parts
            whole = tensor.unflatten(dimension, (axis.parts, -1)).narrow(dimension + 1, 0, length)
            tensor = whole.flatten(dimension, dimension + 1)
        else:
            rows = axis.rows(cut, tensor.shape[dimension])
            places = torch.tensor(rows, dtype=torch.long, device=tensor.device)
            tensor = tensor.index_select(dimension, places)
    return tensor


def lengths(shape: torch.Size, axes: Axes, view: View) -> tuple[int, ...]:
    """Return the shape of a weight that is cut to a view."""
    kept = [None if axis is None else axis.length(view) for axis in axes]
    return tuple(
        size if length is None else length for size, length in zip(shape, kept, strict=True)
    )
