"""Measurement of the importance of a model's units on data, at the model's ZeRO stage.

The importance is the expected sensitivity of MiniDisc (Zhang et al. 2024,
https://arxiv.org/abs/2205.14570), as in the authors' code: the sum over batches of
|d loss / d gate|, with the loss on labels, without dropout. A batch has
`method.importance_batch_size` rows over all ranks. Signed gradients are summed over the ranks and
micro-batches of a batch, and divided by the batch's number of labels. The absolute value is taken
afterwards, so that the scores do not depend on the split into ranks and micro-batches. A
micro-batch has at most `train.per_device_train_batch_size` rows, or the rows that fit into
`train.tokens_per_rank`, which fit into device memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megakd.config.deepspeed import load_ds_config
from megakd.contract.batch import LossInputs
from megakd.contract.unit_counts import count_units
from megakd.data.loader import global_batches
from megakd.data.step_layout import StepShape
from megakd.engine.activity import doing, reached
from megakd.engine.collectives import agree, all_reduce_
from megakd.engine.initialize import Engine, frozen_engine
from megakd.engine.memory import destroy, freed_memory_returned
from megakd.engine.sharding import weights_let_go
from megakd.engine.student import device_batch
from megakd.errors import DataError
from megakd.losses.objective import Objective
from megakd.losses.stage_losses import label_objective
from megakd.models.knowledge import Needs
from megakd.pruning.gates import Gates

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.contract.batch import Batch
    from megakd.models.source import ReadyTeacher
    from megakd.pruning.allocation import UnitScores
    from megakd.teachers.frozen import FrozenModel
    from megakd.training.engines import Assembly


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
        *,
        with_width: bool = False,
    ) -> None:
        super().__init__()
        self.frozen = frozen
        self.objective = objective
        self.gates = Gates(frozen.model, device, with_width=with_width)  # type: ignore[arg-type]
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
    with_width: bool = False,
) -> UnitScores:
    """Return the scores of all units of a model, the same on every rank; a collective.

    Args:
        assembly: the run, with the task that determines the loss and the tokenizer for padding.
        ready: the model, and its config.
        rows: labelled examples, such as the validation split, which the paper's code uses.
        batch_size: rows of a batch over all ranks.
        with_width: whether the columns of the hidden states are scored too.

    Raises:
        DataError: no row carries a label.
        TeacherError: an importance is not finite.
        MegakdError: the model or its DeepSpeed config cannot be used.
    """
    source = ready.source
    ds = load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")
    dtype = assembly.teacher_dtype(ready)
    train, ranks = assembly.config.train, assembly.ranks
    most = train.rows_at_once(assembly.config.task.row_length)
    shape = StepShape.of_batch(batch_size, most, rank=ranks.rank, world=ranks.world_size)
    frozen = assembly.frozen_module(source, ds, dtype=dtype, needs=Needs())
    objective = label_objective(source, assembly.config.task.type, assembly.prepared.classes)
    device = ranks.device
    module = GateGradients(frozen, objective, device, with_width=with_width)
    engine = frozen_engine(module, ds=ds, dtype=dtype, rows=shape.per_device)
    try:
        # ZeRO 3 allocates blocks of many sizes; if they were kept, the heap would grow to twice
        # their size.
        with freed_memory_returned():
            totals = _totals(engine, _dealt(assembly, rows, shape, batch_size))
    finally:
        destroy(engine)
    if totals is None:
        raise DataError(
            f"none of the {len(rows)} rows that importance is measured on has a label; set "
            "method.importance_split to a split with labels"
        )
    # The last digits of a sum may differ between ranks, but the order of units must be equal.
    return module.gates.scores(agree(totals.cpu()))


def _dealt(
    assembly: Assembly, rows: Dataset, shape: StepShape, batch_size: int
) -> Iterator[Iterator[Batch]]:
    scorer, device = assembly.scorer(), assembly.ranks.device
    for batch in global_batches(
        rows, scorer.collate, shape=shape, batch_size=batch_size, masking=scorer.masking
    ):
        yield (device_batch(micro_batch, device) for micro_batch in batch)


@torch.no_grad()
def _totals(engine: Engine, batches: Iterable[Iterable[Batch]]) -> Tensor | None:
    """Return [units] fp64: absolute gradients of the mean loss per label, summed over batches.

    Returns None if no batch has a label on any rank.
    """
    totals, labels = torch.zeros(2, dtype=torch.float64)
    for number, batch in enumerate(batches, start=1):
        reached(f"batch {number}")
        # In fp64, because another split into micro-batches changes the order of additions.
        found = all_reduce_(torch.stack([engine(part).double() for part in batch]).sum(0))
        gradients, count = found[:-1], found[-1]
        totals = totals + (gradients / count.clamp(min=1)).abs()
        labels = labels + count
    return None if labels == 0 else totals
