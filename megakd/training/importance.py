"""The importance of units.

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

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from megakd.data.batch import Batch, LossInputs, count_units
from megakd.data.loader import StepShape, global_batches
from megakd.engine.collectives import activity, all_reduce_, broadcast
from megakd.engine.initialize import Engine, frozen_engine
from megakd.engine.memory import (
    destroy,
    freed_memory_returned,
)
from megakd.engine.sharding import weights_let_go
from megakd.errors import DataError, TeacherError
from megakd.losses.objective import Objective, label_objective
from megakd.models.elastic import weight_axes
from megakd.models.fitting import ReadyTeacher
from megakd.models.structure import architecture_of
from megakd.models.views import Kind
from megakd.teachers.frozen import FrozenModel
from megakd.training.allocation import (
    UnitScores,
)
from megakd.training.assembly import Assembly
from megakd.training.evaluation import scorer_for
from megakd.training.student import device_batch

logger = logging.getLogger(__name__)


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
            inputs = LossInputs(
                student=self.frozen.read(batch),
                teacher=None,
                batch=batch,
                weights=self.objective.weights,
                per_unit=self.per_unit,
                kernels=self.frozen.kernels,
            )
            gradients = self.gates.gradients(self.objective([inputs])[0].total)
        labels = count_units([batch])["targets"]
        return torch.cat([gradients, labels[None].float()])


@activity("measuring the importance of units")
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
    device, scorer = ranks.device, scorer_for(assembly)
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
    return module.gates.scores(broadcast(totals.cpu()))


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
            for number, owner, units in found.parts_with(kind):
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
