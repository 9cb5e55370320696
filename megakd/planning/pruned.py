"""A stage that prunes its learner while the learner trains: its masks, and what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megakd.contract.views import Cut, UnitOrder, View
from megakd.models.axes import lengths
from megakd.planning.engines import FP32
from megakd.planning.moments import Amount, Inventory, Parameter, amount_of

if TYPE_CHECKING:
    from megakd.losses.bundle import StudentBundle


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What is left at the end of a stage with `pruned_to`.

    left: the weights that the engine trains, as they are cut, in the order of the engine's module.
    makers: numbers of the weights that produce units; the strategy keeps values for them.
    parameters, width: size of the learner, without projections and heads of the losses.
    """

    left: Inventory
    makers: frozenset[int]
    parameters: int
    width: int

    def state(self, *, values: int, kept: int) -> Amount:
        """Return the memory of the training state for the next window, whole tensors in fp32.

        Args:
            values: values of the optimizer for every weight.
            kept: values of the strategy for every weight that produces units.
        """
        each = (
            [parameter.numel * FP32] * (values + (kept if number in self.makers else 0))
            for number, parameter in enumerate(self.left)
        )
        return amount_of(size for sizes in each for size in sizes)


def pruned(bundle: StudentBundle, end: View) -> Pruned:
    """Return what is left of a bundle whose first learner is cut to the units `end`."""
    axes, student = bundle.axes, bundle.student
    names = bundle.elastic.makers if bundle.elastic else ()
    made = {id(student.get_parameter(name)) for name in names}
    weights = list(bundle.named_parameters())
    shapes = [
        lengths(weight.shape, axes.get(name, (None,) * weight.dim()), end)
        for name, weight in weights
    ]
    left = Inventory(Parameter(math.prod(shape), len(shape) > 1) for shape in shapes)
    own = {id(weight) for weight in student.parameters()}
    learner = [number for number, (_, weight) in enumerate(weights) if id(weight) in own]
    makers = frozenset(number for number, (_, weight) in enumerate(weights) if id(weight) in made)
    return Pruned(left=left, makers=makers, parameters=left.of(learner).numel, width=end.width or 0)


def largest_mask(units: View, end: View) -> Cut | None:
    """Return the largest part of a learner that loses units; None if no unit is lost.

    The first steps after a removal need the most memory: the activations are nearly whole, and the
    forward copies the kept part of every weight. Here every kind of units that shrinks loses one
    unit, the first, so that no part is a prefix of its weight, which would not be copied.
    """
    view = View(
        tuple(map(_less, units.heads, end.heads)),
        tuple(map(_less, units.neurons, end.neurons)),
        None if units.width is None else _less(units.width, end.width),
        None if units.head_width is None else _less(units.head_width, end.head_width),
    )
    return None if view == units else Cut(_order(units, view), view)


def _less(count: int, end: int | None) -> int:
    """Return the count without one unit, if units are lost."""
    return count if end is None else max(end, count - 1)


def _order(units: View, view: View) -> UnitOrder:
    inside = None
    if units.head_width is not None:
        columns = _last(units.head_width, view.head_width)
        inside = tuple((columns,) * heads for heads in units.heads)
    return UnitOrder(
        tuple(map(_last, units.heads, view.heads)),
        tuple(map(_last, units.neurons, view.neurons)),
        None if units.width is None else _last(units.width, view.width),
        inside,
        inside,
    )


def _last(count: int, kept: int | None) -> tuple[int, ...]:
    """Return all units, the last `kept` first."""
    lost = 0 if kept is None else count - kept
    return (*range(lost, count), *range(lost))
