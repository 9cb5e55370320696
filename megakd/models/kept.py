"""The kept part of every weight of an elastic model, as the current cut of the model defines it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.contract.views import Axes, Axis, Cut


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
    """Return the kept prefixes as a view, in which every dimension becomes two: [parts, length]."""
    for dimension, (length, parts, _) in reversed(list(enumerate(kept))):
        size = whole.shape[dimension] // parts
        whole = whole.unflatten(dimension, (parts, size)).narrow(dimension + 1, 0, length)
    return whole


def taken(whole: Tensor, kept: Dimensions) -> Tensor:
    """Return the kept part of a weight, which shares memory if each dimension keeps one prefix."""
    firsts = _prefixes(kept, whole.shape)
    part = _prefix_view(whole, firsts).reshape([k.length * k.parts for k in firsts])
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
    target = _prefix_view(whole, _prefixes(kept, shape))
    target.copy_(part.reshape(target.shape))
    return whole


def _prefixes(kept: Dimensions, shape: torch.Size) -> Dimensions:
    return tuple(k if k.rows is None else Kept(size) for k, size in zip(kept, shape, strict=True))


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
        if cut is not self.base:
            return _rows_of(axis.rows(cut, size), size, device)
        # Copied to the device once per cut, not once per forward.
        key = (axis, size, device)
        if key not in self._rows:
            self._rows[key] = _rows_of(axis.rows(cut, size), size, device)
        return self._rows[key]


def _rows_of(rows: list[int], size: int, device: torch.device) -> Kept:
    if rows == [*range(size)]:
        return Kept(size)
    return Kept(len(rows), 1, torch.tensor(rows, dtype=torch.long, device=device))


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

    @property
    def cut(self) -> Cut | None:
        return self.views.current

    def kept(self, name: str, device: torch.device) -> Dimensions | None:
        """Return the kept part of a parameter now; None: the whole parameter."""
        axes = self.axes.get(name)
        if self.views.current is None or axes is None:
            return None
        shape = self.shapes[name]
        kept = tuple(
            self.views.kept(axis, size, device) for axis, size in zip(axes, shape, strict=True)
        )
        is_whole = all(
            k.rows is None and k.length * k.parts == size
            for k, size in zip(kept, shape, strict=True)
        )
        return None if is_whole else kept
