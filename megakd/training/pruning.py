"""The importance of units and layers, and the tools of a lab for methods that cut models.

The importance of a unit is the expected sensitivity of MiniDisc (Zhang et al. 2024,
https://arxiv.org/abs/2205.14570), as in the authors' code: the sum over batches of
|d loss / d gate|, with the loss on labels, without dropout. A batch has `BATCH_ROWS`
rows over all ranks. Signed gradients are summed over the ranks and
micro-batches of a batch, and divided by the batch's number of labels. The absolute value is taken
afterwards, so that the scores do not depend on the split into ranks and micro-batches. A
micro-batch has at most `train.per_device_train_batch_size` rows, or the rows that fit into
`train.tokens_per_rank`, which fit into device memory.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from megakd.config.run import RunConfig
from megakd.config.task import TEACHER, TaskConfig, TaskType
from megakd.data.arrow import recalled, remember, rows_key
from megakd.data.batch import Batch, LossInputs, count_units
from megakd.data.loader import StepShape, global_batches, lengths_of_rows
from megakd.engine.collectives import agree, all_reduce_, doing, gather, on_main, told
from megakd.engine.initialize import Engine, frozen_engine
from megakd.engine.memory import (
    destroy,
    forget_models,
    freed_memory_returned,
    peak_memory_bytes,
    reset_peak_memory,
)
from megakd.engine.sharding import weights_let_go
from megakd.errors import DataError, ModelError, TeacherError
from megakd.losses.objective import Objective, label_objective
from megakd.models.cutting import cut_config, is_stock, reshape_folder, why_rigid
from megakd.models.elastic import weight_axes, weights_inside
from megakd.models.fitting import ModelSource, ReadyTeacher, build_empty, valueless_model
from megakd.models.layers import check_depth, left_out, naming
from megakd.models.onnx import batches_of, by_turns, calls_of, sample_lengths
from megakd.models.proposed_units import lengths
from megakd.models.structure import architecture_of, for_task
from megakd.models.views import Axes, Kind, ParameterCounts, View
from megakd.process.files import RESULT
from megakd.stage import StageResult
from megakd.teachers.frozen import FrozenModel, FrozenTeacher
from megakd.training.allocation import (
    SortedTeacher,
    UnitScores,
    unit_order,
)
from megakd.training.assembly import Assembly
from megakd.training.evaluation import few
from megakd.training.lab import Pruning
from megakd.training.precision import TORCH_DTYPE, scoring_dtype
from megakd.training.served_teachers import model_identity
from megakd.training.stage_folder import result_text
from megakd.training.student import device_batch

logger = logging.getLogger(__name__)

FEW_ROWS = 16
"""Fewest held-out rows that rank layers without a warning."""

BATCH_ROWS = 32
"""Rows of a batch over all ranks, of whose gradient the absolute value is taken."""


class GateGradients(nn.Module):
    """The module of the engine: a frozen model whose forward returns the gradients of its gates.

    The backward runs inside the engine's forward, where ZeRO 3 gathers the weights that a module
    needs to propagate a gradient, trained or frozen. Outside, an engine would treat the backward as
    a training step. No gradient of a weight is computed.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        objective: Objective,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.objective = objective
        self.gates = Gates(frozen.model, device)  # type: ignore[arg-type]
        self.per_unit = dict.fromkeys(objective.counters, torch.ones((), device=device))

    def forward(self, batch: Batch) -> Tensor:
        """Return [units + 1] fp32: gradients of the summed loss, and the number of labels."""
        with torch.enable_grad(), weights_let_go(), self.gates.in_place():
            reading = LossInputs(
                student=self.frozen.read(batch),
                teacher=None,
                batch=batch,
                weights=self.objective.weights,
                per_unit=self.per_unit,
                kernels=self.frozen.kernels,
            )
            gradients = self.gates.gradients(self.objective([reading])[0].total)
        labels = count_units([batch])["targets"]
        return torch.cat([gradients, labels[None].float()])


@doing("measuring the importance of units")
def measure_importance(
    assembly: Assembly,
    ready: ReadyTeacher,
    rows: Dataset,
    *,
    batch_size: int,
) -> UnitScores:
    """Return the scores of all units of a model, the same on every rank; a collective.

    The rows carry labels, such as those of the validation split, which the paper's code uses. A
    batch has `batch_size` rows over all ranks.
    """
    source = ready.source
    train, ranks = assembly.config.train, assembly.ranks
    ds, dtype = assembly.frozen_ds(ready), assembly.teacher_dtype(ready)
    most = train.rows_at_once(assembly.config.task.row_length)
    shape = StepShape.of_batch(batch_size, most, rank=ranks.rank, world=ranks.world_size)
    frozen = assembly.frozen_module(ready, ds)
    objective = label_objective(source, assembly.config.task.type, assembly.prepared.classes)
    device, scorer = ranks.device, assembly.scorer()
    module = GateGradients(frozen, objective, device)
    engine = frozen_engine(module, ds=ds, dtype=dtype, rows=shape.per_device)
    try:
        # ZeRO 3 allocates blocks of many sizes; if they were kept, the heap would grow to twice
        # their size.
        with freed_memory_returned():
            batches = global_batches(
                rows, scorer.collate, shape=shape, batch_size=batch_size, masking=scorer.masking
            )
            totals = _totals(engine, ((device_batch(b, device) for b in of) for of in batches))
    finally:
        destroy(engine)
    if totals is None:
        raise DataError(
            f"none of the {len(rows)} rows that importance is measured on has a label; label "
            "rows of the validation split"
        )
    # The last digits of a sum may differ between ranks, but the order of units must be equal.
    return module.gates.scores(agree(totals.cpu()))


@torch.no_grad()
def _totals(engine: Engine, batches: Iterable[Iterable[Batch]]) -> Tensor | None:
    # Return [units] fp64: absolute gradients of the mean loss per label, summed over batches.
    # Returns None if no batch has a label on any rank.
    totals, labels = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        # In fp64, because another split into micro-batches changes the order of additions.
        sums = all_reduce_(torch.stack([engine(part).double() for part in batch]).sum(0))
        gradients, count = sums[:-1], sums[-1]
        totals = totals + (gradients / count.clamp(min=1)).abs()
        labels = labels + count
    return None if labels == 0 else totals


class Gates:
    """The gates of all heads and neurons of a model, sharded or not.

    A gate is a factor 1 that multiplies the values of a unit before the next module. Its gradient
    is the sum over the unit's weights of weight times gradient, without computing a gradient of a
    weight (Michel et al. 2019, https://arxiv.org/abs/1905.10650).

    Gates are plain tensors outside the model, equal on all ranks. No engine shards, casts or trains
    the gates.

    tensors: per attention one gate per key-value group, then per feed-forward one gate per neuron.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        architecture, table = architecture_of(model.config), weight_axes(model)
        found = architecture.found_units(model.config)
        self._attentions = len(found.heads.layers)
        self.tensors = [
            torch.ones(count, device=device, requires_grad=True)
            for count in (*found.heads.counts, *found.neurons.counts)
        ]
        # A part without units has no gates, and needs no module.
        self._modules: list[nn.Module | None] = [None] * len(self.tensors)
        self._sizes = [1] * len(self.tensors)
        firsts: tuple[tuple[Kind, int], ...] = ("heads", 0), ("neurons", self._attentions)
        for kind, first in firsts:
            for number, owner, units in found.of(kind):
                output = f"{owner}.{units.output}"
                self._modules[first + number] = model.get_submodule(output)
                axes = (axis for axis in table[f"{output}.weight"] if axis is not None)
                self._sizes[first + number] = next(a.size for a in axes if a.kind == kind)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Insert the gates into all forwards in the body."""
        with ExitStack() as hooks:
            for module, gate, size in zip(self._modules, self.tensors, self._sizes, strict=True):
                if module is not None:
                    hooks.callback(module.register_forward_pre_hook(_through(gate, size)).remove)
            yield

    def gradients(self, loss: Tensor) -> Tensor:
        """Return [units] fp32 gradients of all gates for a scalar loss of a forward with gates."""
        pairs = zip(self.tensors, self._modules, strict=True)
        in_use = [gates for gates, module in pairs if module is not None]  # others have no units
        return torch.cat(torch.autograd.grad(loss, in_use))

    def scores(self, totals: Tensor) -> UnitScores:
        """Return the scores of all units.

        Args:
            totals: [units], sums of absolute gradients in the order of `gradients`.
        """
        parts = totals.double().cpu().split([gate.numel() for gate in self.tensors])
        names = [f"heads of attention {number + 1}" for number in range(self._attentions)]
        others = range(len(self.tensors) - self._attentions)
        names += [f"neurons of feed-forward {number + 1}" for number in others]
        for name, part in zip(names, parts, strict=True):
            if not part.isfinite().all():
                raise TeacherError(
                    f"the importance of the {name} is not finite: the teacher's loss or its "
                    "gradient overflows; set teacher.dtype to bf16 or fp32, or train the teacher "
                    "again"
                )
        layers = tuple(tuple(part.tolist()) for part in parts)
        return UnitScores(layers[: self._attentions], layers[self._attentions :])


def _through(gate: Tensor, size: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (Gate.apply(inputs[0], gate, size), *inputs[1:])

    return hook


class Gate(torch.autograd.Function):
    """Multiplication by ones, which returns the values unchanged and sums gradients in fp32.

    A real product would keep an fp32 copy of every activation of a bf16 model, or round the sums.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor, size: int) -> Tensor:
        """Return the values [..., units * size] unchanged; `gate` [units] holds ones."""
        ctx.save_for_backward(values)
        ctx.shape = (gate.numel(), size)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the values' gradient unchanged, and the gate's [units], summed over positions."""
        (values,), (gradient,) = ctx.saved_tensors, gradients
        products = (values.float() * gradient.float()).flatten(0, -2).sum(0)
        return gradient, products.unflatten(0, ctx.shape).sum(1), None


@doing("measuring the importance of layers")
def measure_layers(assembly: Assembly, ready: ReadyTeacher, rows: Dataset) -> tuple[float, ...]:
    """Return the rise of the loss without each layer, in nats per target; a collective.

    Each layer is left out alone, from the whole model, as in Shortened LLaMA (Kim et al. 2024,
    https://arxiv.org/abs/2402.02834, section 3.2, criterion PPL, which ranks layers in the same
    order). A loss is measured once for a model, rows and ranks: a stopped measurement goes on, and
    another size of the student needs none.
    """
    config, ranks, scorer = assembly.config, assembly.ranks, assembly.scorer()
    source, place, dtype = ready.source, ready.spec.deepspeed, assembly.teacher_dtype(ready)
    of_model = on_main(lambda: model_identity(source, seed=config.seed))
    of_rows = (on_main(lambda: rows_key(rows)), scorer.batch_size, repr(scorer.masking))
    parts = ("loss", config.task.type, of_model, dtype, of_rows)
    parts += (ranks.world_size, ranks.device.type, str(place))
    if len(rows) < FEW_ROWS:
        logger.warning(
            "layers are ranked on %d held-out rows, of which chance decides; add rows of "
            "validation, at least %d",
            *(len(rows), FEW_ROWS),
        )
    losses: list[float] = []
    count = source.architecture.number_of_layers(source.config) + 1
    with ExitStack() as opened:
        model: FrozenTeacher | None = None
        for layer in told(range(count), total=count, unit="passes, the first with all layers"):
            loss = on_main(partial(recalled, *parts, layer))
            if loss is None:
                model = model or opened.enter_context(assembly.loaded(ready))
                with left_out(model.model, layer) if layer else nullcontext():
                    loss = scorer.loss(model.predict, rows)
                on_main(partial(remember, loss, *parts, layer))
            losses.append(loss)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        where = f"without layer {bad[0]}" if bad[0] else "with all layers"
        raise TeacherError(
            f"the loss of the teacher on the held-out rows {where} is {losses[bad[0]]}, so that "
            "layers cannot be ranked; set teacher.dtype to fp32, or use another teacher"
        )
    # Processors may round differently, but the order of layers must be equal on all ranks.
    scores = agree(tuple(loss - losses[0] for loss in losses[1:]))
    text = "layers: the loss on %d held-out rows is %.3f; without layer 1, 2, … it rises by %s"
    logger.info(text, len(rows), losses[0], " ".join(f"{score:.3f}" for score in scores))
    return scores


UNITS = "units.json"


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
        # Name, shape and units along each dimension of every weight, and if it is in the encoder.
        self._weights: dict[str, list[tuple[str, torch.Size, Axes, bool]]] = {}

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
        model = source.config.to_json_string()
        if model not in self._weights:
            config = copy.deepcopy(source.config)
            if self._classes is not None:
                config.num_labels = self._classes or 1
            counted = dataclasses.replace(source, config=config)
            empty = valueless_model(counted, self.config.task, config)
            axes, inside = weight_axes(empty), weights_inside(empty)
            self._weights[model] = [
                (name, weight.shape, axes.get(name, (None,) * weight.dim()), name in inside)
                for name, weight in empty.named_parameters()
            ]
        rename, total, encoder = naming(source.config, view), 0, 0
        for name, shape, axes, is_inside in self._weights[model]:
            if rename(name) is not None:
                count = math.prod(lengths(shape, axes, view))
                total, encoder = total + count, encoder + count * is_inside
        return ParameterCounts(total, encoder)


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
            text = json.dumps(scores._asdict())
            return {"order": unit_order(scores), "extra": {UNITS: text}}

        result = self._listed(self._written("sorted-teacher", ready.source, order))
        # The folder's checksums were compared.
        tree = json.loads(on_main(lambda: (result.folder / UNITS).read_text(encoding="utf-8")))
        heads, neurons = (tuple(map(tuple, tree[kind])) for kind in UnitScores._fields)
        return SortedTeacher(source=self._source(result.folder), scores=UnitScores(heads, neurons))

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
        """Return the median ratios of paired forwards."""
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
