"""Frozen teachers: models that answer, each with an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megakd.config.task import Dtype, Kernels
from megakd.data.batch import IGNORE, Batch, Documents, Outputs, Predictions, TopK
from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import destroy
from megakd.engine.sharding import Prefetch
from megakd.models.draws import TokenCounts, drawn, most_likely
from megakd.models.outputs import LanguageModelHead, Needs, predict, read_outputs


def joined(batches: Sequence[Batch]) -> Batch:
    """Return the rows of all micro-batches of a task, padded to the longest row.

    The rows have no numbers, and one vocabulary: frozen models answer.
    """
    length = max(batch.valid.shape[1] for batch in batches)
    return Batch(
        inputs={
            name: torch.cat([_longer(name, batch.inputs[name], length) for batch in batches])
            for name in batches[0].inputs
        },
        labels=torch.cat([_longer("labels", batch.labels, length) for batch in batches]),
        valid=torch.cat([_longer("valid", batch.valid, length) for batch in batches]),
        targets=_targets(batches, length),
        documents=_documents(batches, length),
    )


def _longer(name: str, values: Tensor, length: int) -> Tensor:
    # [B, length]; padding is a document of its own, and no target.
    # Labels by class are no positions.
    is_text = values.dim() > 1 and not values.is_floating_point()
    more = length - values.shape[1] if is_text else 0
    if more == 0:
        return values
    if name == "position_ids":
        positions = torch.arange(more, device=values.device).expand(len(values), more)
        return torch.cat([values, positions], dim=1)
    return functional.pad(values, (0, more), value=IGNORE if name == "labels" else 0)


def _targets(batches: Sequence[Batch], length: int) -> Tensor | None:
    moved, first = [], 0
    for batch in batches:
        if batch.targets is None:
            return None
        rows, shorter = batch.valid.shape
        moved.append(_moved(batch.targets, shorter, length) + first * length)
        first += rows
    return torch.cat(moved)


def _moved(positions: Tensor, shorter: int, length: int) -> Tensor:
    return positions + positions.div(shorter, rounding_mode="floor") * (length - shorter)


def _documents(batches: Sequence[Batch], length: int) -> Documents | None:
    starts, longest, first = [], 0, 0
    for batch in batches:
        if batch.documents is None:
            return None
        rows, shorter = batch.valid.shape
        document_starts = batch.documents.starts[:-1]
        starts.append(_moved(document_starts, shorter, length) + first * length)
        if shorter < length:  # the added positions of each row
            numbers = torch.arange(rows, device=document_starts.device, dtype=document_starts.dtype)
            starts.append((numbers + first) * length + shorter)
        longest = max(longest, batch.documents.longest, length - shorter)
        first += rows
    end = torch.full((1,), first * length, device=starts[0].device, dtype=starts[0].dtype)
    return Documents(torch.cat([*starts, end]).sort().values, longest)


def split(outputs: Outputs, batches: Sequence[Batch]) -> Iterator[Outputs]:
    """Yield the outputs for each micro-batch of `joined(batches)`, without a copy."""
    row = target = 0
    for batch in batches:
        rows, length = batch.valid.shape
        targets = 0 if batch.targets is None else len(batch.targets)
        yield _part(outputs, slice(row, row + rows), length, slice(target, target + targets))
        row, target = row + rows, target + targets


def _part(outputs: Outputs, rows: slice, length: int, targets: slice) -> Outputs:
    def cut(values: Tensor) -> Tensor:
        return values[rows, :length]

    def hidden(values: Tensor) -> Tensor:  # [N, D] at the targets, or [B, T, D]
        return values[targets] if values.dim() == 2 else cut(values)

    return outputs.mapped(lambda logits: logits[rows], hidden, cut)


class FrozenModel(nn.Module):
    """The module of the teacher's engine: a model, and the code that reads its outputs.

    label_order: puts the teacher's classes into the data's order; None keeps the order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        needs: Needs,
        label_order: Sequence[int] | None,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.needs = needs
        self.kernels: Kernels = kernels
        self.label_order = None if label_order is None else torch.tensor(list(label_order))

    def forward(
        self,
        batch: Batch,
        *,
        scoring: bool = False,
        top_k: int | None = None,
        numbers: torch.Tensor | None = None,
    ) -> Outputs | Predictions | TopK | TokenCounts:
        """Return the outputs for the student's losses, predictions, `top_k` tokens, or draws."""
        if top_k is not None:
            return most_likely(self.model, batch, top_k)
        if numbers is not None:
            return drawn(self.model, batch, numbers)
        if scoring:
            predicted = predict(self.model, batch, self.kernels)
            return predicted._replace(outputs=self._ordered(predicted.outputs))
        # The student's engine reads the head; DeepSpeed cannot handle a module in the outputs.
        return self.read(batch)._replace(head=None)

    def read(self, batch: Batch) -> Outputs:
        """Return the model's outputs for a micro-batch; called inside the engine's forward."""
        read = read_outputs(self.model, batch, self.needs)
        return read._replace(logits=self._ordered(read.logits))

    def _ordered(self, logits: torch.Tensor | None) -> torch.Tensor | None:
        if logits is None or self.label_order is None:
            return logits
        # Moved once: a list or a tensor on another device would be copied at every micro-batch.
        self.label_order = self.label_order.to(logits.device)
        return logits[:, self.label_order]


class FrozenTeacher:
    """A teacher that answers micro-batches; a collective under ZeRO-3.

    joins: whether one forward, for which a sharded teacher is gathered, answers all of a step.
    """

    def __init__(
        self, module: FrozenModel, *, ds: Mapping[str, Any], dtype: Dtype, rows: int
    ) -> None:
        self.joins = False
        self._engine = frozen_engine(module, ds=ds, dtype=dtype, rows=rows)
        self._prefetch = Prefetch(module)

    def ask_for(self, needs: Needs, *, joins: bool) -> None:
        """Set the outputs that a stage reads, and whether micro-batches share a forward."""
        self.evict()  # the last stage may have prefetched a step that it did not take
        self._engine.module.needs = needs
        self.joins = joins

    def prefetch(self) -> None:
        self._prefetch.start()

    def evict(self) -> None:
        self._prefetch.drop()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        self._prefetch.wait()
        read: Outputs = self._engine(batch)
        if read.hidden is None:
            return read
        return read._replace(head=LanguageModelHead(self.model))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Outputs]:
        """Yield the outputs for every micro-batch of a step."""
        if self.joins and len(batches) > 1:
            yield from split(self(joined(batches)), batches)
        else:
            yield from map(self, batches)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Predictions:
        """Return predictions for one micro-batch, for the teacher's own metrics."""
        return self._engine(batch, scoring=True)

    @torch.no_grad()
    def top_k(self, batch: Batch, count: int) -> TopK:
        """Return the most likely next tokens of a language model at every position."""
        return self._engine(batch, top_k=count)

    @torch.no_grad()
    def draw(self, batch: Batch, numbers: torch.Tensor) -> TokenCounts:
        """Return draws of next tokens of a language model, see `draws.drawn`."""
        return self._engine(batch, numbers=numbers)

    @property
    def model(self) -> nn.Module:
        """The model itself, whose parameters may be sharded."""
        return self._engine.module.model

    def destroy(self) -> None:
        self._prefetch.drop()
        destroy(self._engine)
