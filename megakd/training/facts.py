"""What is known of a run without any work: sizes of cut models, rows, steps, and the metric."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch

from megakd.config.run import RunConfig
from megakd.config.sections import TrainConfig, total_steps
from megakd.config.task import TEACHER, TaskType
from megakd.data.arrow import column_of
from megakd.data.batch import ROUTE, teacher_number
from megakd.data.loader import StepShape, rows_with_targets
from megakd.errors import ModelError
from megakd.models.cutting import cut_config, is_stock, why_rigid
from megakd.models.elastic import weight_axes
from megakd.models.fitting import ModelSource, valueless_model
from megakd.models.layers import RemainingLayers, check_depth, chosen_layers
from megakd.models.proposed_units import lengths
from megakd.models.structure import for_task, weights_inside
from megakd.models.views import Axes, ParameterCounts, View
from megakd.stage import Metric
from megakd.training.allocation import SortedTeacher, UnitScores
from megakd.training.inputs import RunInputs, UnencodedInputs
from megakd.training.metrics import check_weighed

UNKNOWN_STEPS = 10**6
"""Steps of a stage that trains for epochs of rows that are not read."""


class RunFacts:
    """Facts of one run, the same on every rank.

    config, sources: the run config, and its models by role.
    inputs: the data of the run, maybe not encoded yet; None: a plan without data, whose models
        have the classes of their configs.
    world: number of ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        sources: Mapping[str, ModelSource],
        *,
        world: int,
        inputs: UnencodedInputs | None = None,
    ) -> None:
        self.config, self.sources, self.world, self.inputs = config, sources, world, inputs
        # Name, shape and units along each dimension of every weight, and if it is in the encoder.
        self._weights: dict[str, list[tuple[str, torch.Size, Axes, bool]]] = {}

    def metric(self, *, weighed: bool = True) -> Metric:
        """Return the metric that ranks evaluations.

        Raises:
            ConfigError: the metric is `weighed` against sparsity, and is not between 0 and 1.
        """
        if self.inputs is None:
            return Metric(name="", parts=("",), higher_is_better=True)
        if weighed:
            check_weighed(self.inputs.metric, self.inputs.metrics.names)
        return self.inputs.metric

    def steps(self, train: TrainConfig) -> int:
        """Return the number of optimizer steps if all rows are used."""
        if not isinstance(self.inputs, RunInputs):
            return train.max_steps or UNKNOWN_STEPS
        shape = StepShape(
            train.per_device_train_batch_size, train.gradient_accumulation_steps, 0, self.world
        )
        return total_steps(train, shape.steps_per_epoch(self._learned))

    @cached_property
    def _learned(self) -> int:
        # Every stage asks, and the lengths of all rows are read for the answer.
        rows = self.inputs.encoded.train if isinstance(self.inputs, RunInputs) else None
        return 0 if rows is None else len(rows_with_targets(rows))

    def rows_of_teachers(self) -> dict[str, int]:
        """Return the number of training rows that name each teacher of the config."""
        if not isinstance(self.inputs, RunInputs):
            return dict.fromkeys(self.config.teacher_specs, 1)
        counts = Counter(column_of(self.inputs.encoded.train, ROUTE).tolist())
        return {name: counts[teacher_number(name)] for name in self.config.teacher_specs}

    def unscored(self) -> SortedTeacher:
        """Return the teacher with equal importance for all units, before the teacher is trained."""
        return unscored(self.sources[TEACHER])

    def why_rigid(self, source: ModelSource) -> str | None:
        """Return the reason why hidden states cannot lose columns; None: they can."""
        return why_rigid(source.config, source.architecture)

    def has_stock_config(self, source: ModelSource, view: View) -> bool:
        """Return whether transformers' own class of the family can have the shape of a cut."""
        try:
            return is_stock(cut_config(source.config, view))
        except ModelError:
            return False

    def check_layers(self, source: ModelSource, view: View) -> None:
        """Raise if the layers of a view would not compute alone what they compute in the model."""
        if view.layers is not None:
            check_depth(source, view.layers, where=source.where)

    def layers(
        self, source: ModelSource, count: int, scores: Sequence[float] | None = None
    ) -> tuple[int, ...]:
        """Return the layers that stay of a model that keeps a number of them; from 1."""
        return chosen_layers(source, count, scores)

    def parameters(self, source: ModelSource, view: View) -> ParameterCounts:
        """Return the number of weights of a view."""
        model = source.config.to_json_string()
        if model not in self._weights:
            config = copy.deepcopy(source.config)
            if self.inputs is not None:  # a head for the classes of the data is made anew
                config.num_labels = self.inputs.classes or 1
            counted = dataclasses.replace(source, config=config)
            empty = valueless_model(counted, self.config.task, config)
            axes, inside = weight_axes(empty), weights_inside(empty)
            self._weights[model] = [
                (name, weight.shape, axes.get(name, (None,) * weight.dim()), name in inside)
                for name, weight in empty.named_parameters()
            ]
        remaining, total, encoder = RemainingLayers(source.config, view.layers), 0, 0
        for name, shape, axes, is_inside in self._weights[model]:
            if remaining.name(name) is not None:
                sizes = [*lengths(shape, axes, view)]
                block = remaining.block(name, sizes)
                if block is not None:
                    sizes[block[0]] = len(block[1])
                total += math.prod(sizes)
                encoder += math.prod(sizes) * is_inside
        return ParameterCounts(total, encoder)


def unscored(source: ModelSource) -> SortedTeacher:
    """Return a model with equal scores of all units, to check a grid of sparsities in advance."""
    units = source.architecture.units(source.config)
    heads = tuple((1.0,) * count for count in units.heads)
    neurons = tuple((1.0,) * count for count in units.neurons)
    return SortedTeacher(source=source, scores=UnitScores(heads, neurons))


def shape_of_cut(source: ModelSource, view: View, task: TaskType) -> ModelSource:
    """Return a model as it will be after a cut to a view, without weights."""
    config = cut_config(source.config, view)
    return dataclasses.replace(
        source, config=config, architecture=for_task(config, task), folder=None, stored={}
    )
