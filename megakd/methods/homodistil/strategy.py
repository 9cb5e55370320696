"""The strategy that prunes the student while it learns, and the scores of units.

Scores are computed from this rank's shards of the weights and of their gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megakd.data.batch import Pass
from megakd.engine.collectives import all_reduce_, broadcast
from megakd.methods.homodistil import ROWS, Schedule, Target
from megakd.models.views import Axis, Columns, Cut, Kind, Maker, UnitOrder, View
from megakd.stage import WHOLE, Metric, Scores, StepReport, Strategy, Verdict
from megakd.training.record import Row

BETA = 0.85
"""Decay of the average sensitivity."""


class Group(NamedTuple):
    """Units that are ranked together: those of one attention, one feed-forward, or the width.

    columns: the columns inside the heads of an attention; None for whole units.
    """

    kind: Kind
    number: int
    columns: Columns | None


Chosen = dict[Group, list[int]]
"""Kept units of every group, rising; columns inside heads are numbered over all heads."""


class PruningStrategy(Strategy):
    """Removes the least sensitive units a few at a time, as the schedule says.

    teacher: name of the teacher.
    target: the units of the teacher and of the student.
    schedule: when units are removed.
    metric: ranks evaluations.
    size: function from units to the number of weights of a model with these units.
    cut: how the student is cut to the units that it keeps.
    """

    def __init__(
        self,
        teacher: str,
        target: Target,
        schedule: Schedule,
        *,
        metric: Metric,
        size: Callable[[View], int],
    ) -> None:
        self.teacher, self.target, self.schedule = teacher, target, schedule
        self.metric, self.size = metric, size
        self.cut = Cut(None, None)
        self._size: dict[str, int] = {}
        self._rows: list[Row] = []
        self._kept: Chosen | None = None  # before the window begins
        self._scores: Tensor | None = None  # of the last step, if units are removed after it
        self._student: Any = None

    def begin(self, student: Any, step: int) -> None:
        """Run the student as the cut of itself that it was at the last step."""
        self._student, is_new = student, self._kept is None
        self._choose(self._kept or everything(student), step)
        if not is_new:
            student.keep(self.cut)

    def _choose(self, kept: Chosen, step: int) -> None:
        view = self.target.at(self.schedule.left(step))
        self._kept, self.cut = kept, Cut(order_of(self._student, kept), view)
        self._size = {"width": view.width or 0, "parameters": self.size(view)}

    def passes(self, step: int) -> tuple[Pass, ...]:
        return (Pass(teacher=self.teacher),)

    def before_update(self, step: int, student: Any) -> None:
        """Add the sensitivities of the step to the averages, and score the units if they are due.

        The gradients are complete and not clipped, and the weights are those of the gradients.
        """
        values: dict[str, tuple[Tensor, int]] = {}
        for shard in student.local_shards():
            if shard.name in student.makers:
                values[shard.name] = update_averages(student.averages, shard), shard.offset
        if self.schedule.prunes_after(step + 1):
            here = unit_sums(values, student.makers, student.units, self.cut)
            # Ranks may round differently, and would then remove different units.
            self._scores = broadcast(all_reduce_(here))

    def after_update(self, report: StepReport) -> dict[str, float]:
        """Remove the units with the lowest scores if a removal is due; return the size."""
        if self._scores is not None and self._kept is not None:
            step = report.step + 1
            view = self.target.at(self.schedule.left(step))
            self._choose(select(self._scores, self._kept, view, self._student), step)
            self._student.keep(self.cut)
            self._scores = None
        return {f"pruning/{name}": number for name, number in self._size.items()}

    def judge(self, scores: Scores, step: int) -> Verdict:
        """Return the score of the student and how it is cut now; add a row to the report.

        Before the end of pruning, the student is too large to be compared.
        """
        metrics, done = scores[WHOLE], self.schedule.left(step) == 0
        distance = metrics.get("soft_target_kl")
        self._rows.append({"step": step, **self._size, "teacher_kl": distance})
        score = self.metric.worth(metrics) if done else float("nan")
        return Verdict(score, WHOLE, cut=self.cut, counts=done)

    def state_dict(self) -> dict[str, Any]:
        kept = self._kept or {}
        return {
            "kept": [[list(group), units] for group, units in kept.items()],
            "rows": self._rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._kept = {Group(*group): list(units) for group, units in state["kept"]} or None
        self._rows = list(state["rows"])

    def files(self) -> Mapping[str, bytes]:
        """Return the file with the rows of the report."""
        return {ROWS: json.dumps(self._rows).encode()}


def update_averages(averages: dict[str, Tensor], shard: Any) -> Tensor:
    """Add the sensitivities of a step to the exponential average of a shard, and return it.

    The sensitivity of a weight is |weight * gradient|, the first-order estimate of the change of
    the loss without the weight. Its average is beta * average + (1 - beta) * sensitivity.
    """
    value = (shard.weight.detach() * shard.gradient).abs_()
    # Under fp16 a step may overflow; its update is skipped, and an infinite value would stay.
    value.nan_to_num_(nan=0.0, posinf=0.0)
    # The average of a weight is on the device of its gradient, and zero at the start.
    average = averages.get(shard.name)
    average = torch.zeros_like(value) if average is None else average.to(value.device)
    averages[shard.name] = average.lerp_(value, 1 - BETA)
    return averages[shard.name]


def group_sizes(makers: Mapping[str, Maker], units: View) -> dict[Group, int]:
    """Return the number of scores of every group, in a fixed order."""
    sizes: dict[Group, int] = {}
    for maker in makers.values():
        axis = maker.axis
        group = Group(axis.kind, axis.number, axis.columns)
        sizes[group] = (axis.kept(units) or 0) * (axis.size if axis.columns else 1)
    return sizes


def unit_sums(
    values: Mapping[str, tuple[Tensor, int]], makers: Mapping[str, Maker], units: View, cut: Cut
) -> Tensor:
    """Return the L1 scores of all groups side by side, fp64, of this rank's elements.

    The score of a unit is the sum over the weights that produce the unit, except for weights whose
    input is removed. The sum over all ranks is the score of the whole model. The values [n] of this
    rank stand by name of the weight, with their offset in the weight.
    """
    sizes = group_sizes(makers, units)
    sums = {group: torch.zeros(size, dtype=torch.float64) for group, size in sizes.items()}
    for name, maker in makers.items():
        if name not in values:
            continue
        axis = maker.axis
        lines = line_sums(*values[name], maker, cut)
        if axis.blocks:
            count = len(lines) // axis.size
            parts = lines.split([count * size for size in axis.blocks])
            lines = torch.stack([part.view(count, -1).sum(1) for part in parts]).sum(0)
        else:
            lines = lines.view(axis.parts, -1).sum(0)
            lines = lines if axis.columns else lines.view(-1, axis.size).sum(1)
        sums[Group(axis.kind, axis.number, axis.columns)] += lines
    return torch.cat(list(sums.values()))


def line_sums(values: Tensor, offset: int, maker: Maker, cut: Cut) -> Tensor:
    """Return the sums of values over a part of a matrix, fp64, per row or column.

    The values [n] are consecutive elements of the flattened matrix, from `offset` on; only values
    with kept inputs count.
    """
    columns, dimension = maker.shape[1], maker.dimension
    first, before = divmod(offset, columns)
    count = -(-(before + len(values)) // columns)
    lines = values.new_zeros(count * columns)
    lines[before : before + len(values)] = values
    length = maker.shape[1 - dimension]
    kept = torch.ones(length)
    if maker.inputs is not None:
        kept = torch.zeros(length)
        kept[maker.inputs.rows(cut, length)] = 1
    grid, kept = lines.view(count, columns), kept.to(values.device)
    sums = torch.zeros(maker.shape[dimension], dtype=torch.float64)
    if dimension == 0:
        sums[first : first + count] = (grid * kept).sum(1, dtype=torch.float64).cpu()
    else:
        sums += (grid * kept[first : first + count, None]).sum(0, dtype=torch.float64).cpu()
    return sums


def everything(student: Any) -> Chosen:
    """Return all units of a student's groups."""
    sizes = group_sizes(student.makers, student.units)
    return {group: [*range(size)] for group, size in sizes.items()}


def select(scores: Tensor, kept: Chosen, view: View, student: Any) -> Chosen:
    """Return the units with the highest scores in every group; of equal scores, the first units.

    The scores are those of `unit_sums`. Only units that are kept now can be kept.
    """
    chosen: Chosen = {}
    groups = group_sizes(student.makers, student.units)
    for (group, size), values in zip(groups.items(), scores.split([*groups.values()]), strict=True):
        allowed = torch.full((size,), -1.0, dtype=torch.float64)
        allowed[kept[group]] = values[kept[group]].clamp(min=0).nan_to_num(0.0)
        if group.columns is None:
            count = Axis(group.kind, group.number).kept(view) or 0
            chosen[group] = _highest(allowed[None], count)[0]
            continue
        heads = student.units.heads[group.number]
        width = size // max(heads, 1)
        best = _highest(allowed.view(heads, width), view.head_width or 0)
        chosen[group] = [head * width + column for head, row in enumerate(best) for column in row]
    return chosen


def _highest(scores: Tensor, count: int) -> list[list[int]]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return order.sort(dim=1).values.tolist()


def order_of(student: Any, kept: Chosen) -> UnitOrder:
    """Return the order of a student's units that begins with the kept units, in stored order."""
    units = student.units

    def listed(kind: Kind, number: int, count: int) -> tuple[int, ...]:
        return _kept_first(kept.get(Group(kind, number, None), ()), count)

    heads = tuple(listed("heads", number, count) for number, count in enumerate(units.heads))
    neurons = tuple(listed("neurons", number, count) for number, count in enumerate(units.neurons))
    width = listed("width", 0, units.width or 0)
    inside = {
        columns: tuple(
            _inside(kept.get(Group("heads", number, columns), ()), count, units.head_width)
            for number, count in enumerate(units.heads)
        )
        for columns in (("queries", "values") if units.head_width else ())
    }
    return UnitOrder(heads, neurons, width, inside.get("queries"), inside.get("values"))


def _kept_first(kept: Sequence[int], count: int) -> tuple[int, ...]:
    chosen = {*kept}
    return (*kept, *(unit for unit in range(count) if unit not in chosen))


def _inside(kept: Sequence[int], heads: int, width: int) -> tuple[tuple[int, ...], ...]:
    of_heads = ([c - head * width for c in kept if c // width == head] for head in range(heads))
    return tuple(_kept_first(columns, width) for columns in of_heads)
