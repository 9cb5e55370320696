"""Squared errors between the weights of two models that learn together, through shared projections.

Zhao et al. 2019 (arXiv 1909.11687 v1): no activations are compared. Every weight of a layer of the
teacher is mapped to the shape of the student's weight (`down`), or the student's weight is mapped
to the teacher's shape (`up`). A vector has a projection on one side. A matrix belongs to a pair of
sizes, and all layers and all weights with an axis of these sizes share the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megakd.config.terms import Unit
from megakd.data.batch import Batch, LossInputs, UnitCounter
from megakd.engine.sharding import full_shape
from megakd.losses.targets import Evaluated, TermGroup
from megakd.methods.mixed_vocabulary import ParameterProjection
from megakd.models.second_vocabulary import second_vocabulary
from megakd.models.structure import architecture_of

NAME = "parameter_projection"


def _one(batch: Batch) -> Tensor:
    """Count a micro-batch, so that the mean over all micro-batches is the loss, counted once."""
    return torch.ones((), dtype=torch.long, device=batch.valid.device)


class Place(NamedTuple):
    """A weight in its module; the weight is read there, because ZeRO 3 gathers it when it is read.

    shape: shape of the whole weight.
    """

    module: nn.Module
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the weight; under ZeRO-3 only inside a module's forward."""
        return getattr(self.module, self.name)


class Compared(NamedTuple):
    """A weight of one model, which is mapped, and the weight of the other in whose shape it ends.

    is_table: whether the weights are tables of embeddings, whose rows are the same pieces.
    """

    mapped: Place
    other: Place
    is_table: bool = False

    @property
    def sides(self) -> Iterator[tuple[str, str, int, int]]:
        """The key of each matrix, the side that it maps, and the sizes before and after."""
        sizes = zip(self.mapped.shape, self.other.shape, strict=True)
        for side, (before, after) in zip(("rows", "columns"), sizes, strict=False):
            if side == "columns" or not self.is_table:
                yield f"{side}_{before}_to_{after}", side, before, after


class SharedProjections(nn.ParameterDict):
    """The matrices of all pairs of sizes, for rows and for columns."""

    def need(self, compared: Compared) -> None:
        """Create the matrices for a pair of weights, unless they exist.

        The entries are drawn from a normal distribution with variance 1 / (size that is mapped).
        """
        for key, side, before, after in compared.sides:
            if key not in self:
                shape = (after, before) if side == "rows" else (before, after)
                self[key] = nn.Parameter(torch.randn(shape) * before**-0.5)

    def errors(self, compared: Compared) -> Tensor:
        """Return the differences between the mapped and the other weight, in fp32."""
        value = compared.mapped.read()
        for key, side, _, _ in compared.sides:
            value = self[key] @ value if side == "rows" else value @ self[key]
        return value.float() - compared.other.read().float()


class LayerErrors(nn.Module):
    """The sum of squared errors of one layer.

    Under ZeRO 3 the weights of one layer of each model are gathered for this module's forward, and
    again for its backward.
    """

    def __init__(self, compared: tuple[Compared, ...], projections: SharedProjections) -> None:
        super().__init__()
        # Tuples, so that the modules are not registered a second time.
        self._compared, self._projections = compared, (projections,)

    def forward(self) -> Tensor:
        (projections,) = self._projections
        sums = [projections.errors(compared).square().sum() for compared in self._compared]
        return torch.stack(sums).sum()


class ParameterProjections(TermGroup):
    """`parameter_projection`: the mean squared error over all compared elements.

    With `epsilon` the loss is the paper's sum of squared errors divided by epsilon, which is the
    weight of the cross-entropies there. The loss is counted once per step (`once`): every rank
    computes the same loss.
    """

    units: Mapping[str, Unit] = MappingProxyType({NAME: "once"})
    counters: Mapping[Unit, UnitCounter] = MappingProxyType({"once": _one})

    def __init__(self, term: ParameterProjection) -> None:
        super().__init__()
        self.term = term
        self.projections = SharedProjections()
        self.layers = nn.ModuleList()
        self.elements = 0

    def bind(self, learners: Mapping[str, nn.Module]) -> None:
        student, teacher = learners.values()

        def ends(ours: Any, theirs: Any) -> tuple[Any, Any]:
            return (theirs, ours) if self.term.direction == "down" else (ours, theirs)

        # One family and depth, see `ParameterProjection.check`.
        layers = [
            [Compared(mapped[name], other[name]) for name in mapped]
            for mapped, other in zip(*ends(_blocks(student), _blocks(teacher)), strict=True)
        ]
        second = second_vocabulary(teacher)
        if second is not None:  # a teacher that reads the student's pieces
            tables: Any = student.get_input_embeddings(), second.table  # type: ignore[operator]
            places = (Place(table, "weight", tuple(full_shape(table.weight))) for table in tables)
            layers.append([Compared(*ends(*places), is_table=True)])
        for compared in layers:
            for pair in compared:
                self.projections.need(pair)
                self.elements += math.prod(pair.other.shape)
            self.layers.append(LayerErrors(tuple(compared), self.projections))

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the loss, which does not depend on the batch."""
        total = torch.stack([layer() for layer in self.layers]).sum()
        total = total / (self.term.epsilon or self.elements)
        scale = inputs.weights[NAME] * inputs.per_unit["once"]
        return Evaluated(total * scale, {NAME: total.detach()})


def _blocks(model: nn.Module) -> list[dict[str, Place]]:
    """Return the weights of every layer by name, see `Place`."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    count = architecture.number_of_layers(model.config)  # type: ignore[arg-type]
    blocks = (architecture.block_of(model, layer) for layer in range(1, count + 1))
    return [
        {
            f"{path}.{name}": Place(module, name, tuple(full_shape(parameter)))
            for path, module in block.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        for block in blocks
    ]
