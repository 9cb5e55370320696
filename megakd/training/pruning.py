"""The tools of a lab for methods that cut models: sizes, sorted teachers, cut models, times."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.contract.lab import Pruning
from megakd.contract.results import ParameterCounts
from megakd.contract.stage import StageResult
from megakd.contract.tasks import TEACHER, TaskType
from megakd.contract.views import Allocation, Axes, View
from megakd.data.loader import lengths_of_rows
from megakd.engine.collectives import doing, gather, on_main
from megakd.engine.memory import forget_models, peak_memory_bytes, reset_peak_memory
from megakd.errors import ModelError
from megakd.models.axes import weight_axes, weights_inside
from megakd.models.cutting import cut_config, is_stock, reshape_folder
from megakd.models.fitting import build_empty, valueless_model
from megakd.models.forwards import batches_of, by_turns, calls_of, sample_lengths
from megakd.models.layers import check_depth, naming
from megakd.models.narrowing import why_rigid
from megakd.models.source import ModelSource
from megakd.models.structure import for_task
from megakd.models.unit_axes import lengths
from megakd.process.run_folder import RESULT
from megakd.training.allocation import (
    UnitScores,
    scores_from_json,
    scores_to_json,
    unit_order,
    view_at,
)
from megakd.training.assembly import Assembly
from megakd.training.importance import BATCH_ROWS, measure_importance, measure_layers
from megakd.training.precision import TORCH_DTYPE, scoring_dtype
from megakd.training.scorer import few
from megakd.training.stage_folder import result_text

UNITS = "units.json"
logger = logging.getLogger(__name__)
Weights = tuple[tuple[str, torch.Size, Axes, bool], ...]
"""Name, shape and units along each dimension of every weight, and whether it is in the encoder."""


@dataclass(frozen=True, kw_only=True)
class SortedTeacher:
    """A model with units sorted by importance, the most important first, and the scores.

    scores: scores of the units in the teacher's original order.
    """

    source: ModelSource
    scores: UnitScores

    def view_at(
        self,
        sparsity: float,
        *,
        allocation: Allocation,
        round_to: int,
        with_heads: Collection[int] = (),
    ) -> View:
        """Return the prefix of every layer that remains at a sparsity; see `contract.lab`."""
        architecture, config = self.source.architecture, self.source.config
        if not architecture.found_units(config).heads.to_zero:
            with_heads = [number for number, one in enumerate(self.scores.heads) if one]
        return view_at(
            self.scores.scaled(),
            sparsity,
            allocation=allocation,
            round_to=round_to,
            head_width=architecture.rows_of_heads(config),
            with_heads=with_heads,
        )


def unscored(source: ModelSource) -> SortedTeacher:
    """Return a model with equal scores of all units, to check a grid of sparsities in advance."""
    units = source.architecture.units(source.config)
    heads = tuple((1.0,) * count for count in units.heads)
    neurons = tuple((1.0,) * count for count in units.neurons)
    return SortedTeacher(source=source, scores=UnitScores(heads, neurons))


class Shapes(Pruning):
    """Shapes of cut models by their configs, without weights.

    classes: the classes of the data, for which a head is made anew; None: those of each config.
    """

    def __init__(
        self, config: RunConfig, sources: Mapping[str, ModelSource], *, classes: int | None = None
    ) -> None:
        self.config, self._sources, self._classes = config, sources, classes
        self._weights: dict[str, Weights] = {}

    def unscored(self) -> SortedTeacher:
        return unscored(self._sources[TEACHER])

    def why_rigid(self, source: ModelSource) -> str | None:
        return why_rigid(source.config, source.architecture)

    def has_stock_config(self, source: ModelSource, view: View) -> bool:
        try:
            return is_stock(cut_config(source.config, view))
        except ModelError:
            return False

    def check_layers(self, source: ModelSource, view: View) -> None:
        if view.layers is not None:
            check_depth(source, view.layers, where=source.where)

    def parameters(self, source: ModelSource, view: View) -> ParameterCounts:
        return counts_in_view(self._weights_of(source), source, view)

    def _weights_of(self, source: ModelSource) -> Weights:
        model = source.config.to_json_string()
        if model not in self._weights:
            config = copy.deepcopy(source.config)
            if self._classes is not None:
                config.num_labels = self._classes or 1
            counted = dataclasses.replace(source, config=config)
            self._weights[model] = weights_of(counted, self.config.task)
        return self._weights[model]


class ModelPruning(Shapes):
    """The builder of model folders in `stages/` without training; each folder is built once.

    Every method is a collective.
    """

    def __init__(
        self,
        assembly: Assembly,
        results: list[StageResult],
        *,
        source: Callable[[Path], ModelSource],
        close: Callable[[], None],
    ) -> None:
        prepared = assembly.prepared
        super().__init__(assembly.config, prepared.sources, classes=prepared.classes)
        self.assembly, self._results = assembly, results
        self._source, self._close = source, close

    def sorted_teacher(self, teacher: str) -> SortedTeacher:
        self._close()
        ready = self.assembly.teachers[teacher]

        def order() -> dict[str, Any]:
            rows = self.assembly.prepared.encoded.validation
            scores = measure_importance(self.assembly, ready, rows, batch_size=BATCH_ROWS)
            return {"order": unit_order(scores), "extra": {UNITS: scores_to_json(scores)}}

        result = self._listed(self._written("specification", ready.source, order))
        path = result.folder / UNITS
        text = on_main(lambda: path.read_text(encoding="utf-8"))
        scores = scores_from_json(text, where=str(path))
        return SortedTeacher(source=self._source(result.folder), scores=scores)

    def layer_scores(self, teacher: str) -> tuple[float, ...]:
        self._close()
        ready = self.assembly.teachers[teacher]
        rows = few(self.assembly.prepared.encoded.validation, self.config.task.type)

        def measure() -> Mapping[str, float]:
            scores = measure_layers(self.assembly, ready, rows)
            return {f"layer_{number}": score for number, score in enumerate(scores, start=1)}

        result = self.assembly.measured_once("layers", measure)
        # As metrics of a stage, the scores would be a column for each layer in the report.
        self._listed(dataclasses.replace(result, metrics={}))
        layers = range(1, len(result.metrics) + 1)
        scores = [result.metrics[f"layer_{number}"] for number in layers]
        try:
            check_depth(ready.source, layers[1:] or layers, where="student.layers")
        except ModelError:  # the first layer of ModernBERT has no norm, and must stay the first
            scores[0] = math.inf
        return tuple(scores)

    def relative_times(
        self, source: ModelSource, views: Mapping[str, View], name: str
    ) -> Mapping[str, float]:
        """Return the median ratios of paired forwards; see `contract.lab`."""
        self._close()
        task, device = self.config.task, self.assembly.ranks.device
        dtype = TORCH_DTYPE[scoring_dtype(self.config.train, device.type)]
        rows, batch = self.assembly.prepared.encoded.validation, batches_of(task.type)[-1]
        texts = sample_lengths(lengths_of_rows(rows).tolist(), batch)
        build = partial(_random_model, source, task, device=device, dtype=dtype)

        def ratios() -> Mapping[str, float]:
            whole, times = calls_of(build(source.config), texts), dict[str, float]()
            for known, view in views.items():  # two models are in memory at a time
                rounds = by_turns([calls_of(build(cut_config(source.config, view)), texts), whole])
                times[known] = statistics.median(cut / other for cut, other in rounds)
                logger.info("%s: %.1f times as fast as the whole model", known, 1 / times[known])
            return times

        with doing("timing shapes"):
            result = self.assembly.measured_once(name, lambda: on_main(ratios))
        self._listed(dataclasses.replace(result, metrics={}))
        return result.metrics

    def _listed(self, result: StageResult) -> StageResult:
        if all(known.name != result.name for known in self._results):
            self._results.append(result)
        return result

    def cut(self, source: ModelSource, view: View, name: str) -> ModelSource:
        """Return a model cut to a view in `stages/<name>`, untrained; `source` for a whole view."""
        whole, every = source.whole, tuple(range(1, source.depth + 1))
        if not view.heads and view.layers == every:
            return source
        if view._replace(width=view.width or whole.width) == whole:
            return source
        return self._source(self._written(name, source, lambda: {"view": view}).folder)

    def _written(
        self, name: str, source: ModelSource, change: Callable[[], Mapping[str, Any]]
    ) -> StageResult:
        """Write a changed model once; `change` is a collective, see `reshape_folder`."""

        def make(folder: Path) -> None:
            began, device = time.perf_counter(), self.assembly.ranks.device
            reset_peak_memory(device)
            options = dict(change())
            others = max(gather(peak_memory_bytes(device)))

            def text() -> str:  # of result.json, once the weights are written
                result = StageResult(
                    name=name,
                    folder=folder,
                    seconds=time.perf_counter() - began,
                    peak_memory_bytes=max(others, peak_memory_bytes(device)),
                )
                return result_text(result, {})

            forget_models()
            prepared = self.assembly.prepared
            options["extra"] = {**options.get("extra", {}), RESULT: text}
            on_main(
                lambda: reshape_folder(
                    source,
                    folder,
                    task=self.config.task,
                    label_names=prepared.splits.label_names,
                    tokenizer=prepared.tokenizer,
                    **options,
                )
            )

        return self.assembly.once(name, make)


def _random_model(
    source: ModelSource,
    task: TaskConfig,
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    model = build_empty(source, task, config, dtype).eval()
    torch.nn.Module.to(model, device)  # transformers' own `to` is typed wrongly
    generator = torch.Generator(device).manual_seed(0)  # not the run's random state
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
    return model


def shape_of_cut(source: ModelSource, view: View, task: TaskType) -> ModelSource:
    """Return a model as it will be after a cut to a view, without weights."""
    config = cut_config(source.config, view)
    return dataclasses.replace(
        source, config=config, architecture=for_task(config, task), folder=None, stored={}
    )


def weights_of(source: ModelSource, task: TaskConfig) -> Weights:
    """Return the facts of `Weights` on a model, without loading the weights."""
    empty = valueless_model(source, task, source.config)
    axes, inside = weight_axes(empty), weights_inside(empty)
    return tuple(
        (name, weight.shape, axes.get(name, (None,) * weight.dim()), name in inside)
        for name, weight in empty.named_parameters()
    )


def counts_in_view(weights: Weights, source: ModelSource, view: View) -> ParameterCounts:
    """Return the number of weights of the model that a cut to a view writes."""
    rename, total, encoder = naming(source.config, view), 0, 0
    for name, shape, axes, is_inside in weights:
        if rename(name) is not None:
            count = math.prod(lengths(shape, axes, view))
            total, encoder = total + count, encoder + count * is_inside
    return ParameterCounts(total, encoder)
