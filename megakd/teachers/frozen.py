"""A frozen teacher with its own inference engine, DeepSpeed config and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megakd.contract.batch import Batch, Knowledge, Predictions, TopK
from megakd.contract.joined_batches import joined, split
from megakd.contract.tasks import Dtype, Kernels
from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import destroy
from megakd.engine.sharding import Prefetch
from megakd.models.generation import TokenCounts, drawn, most_likely
from megakd.models.knowledge import LanguageModelHead, Needs, predict, read_knowledge


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
    ) -> Knowledge | Predictions | TopK | TokenCounts:
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

    def read(self, batch: Batch) -> Knowledge:
        """Return the model's outputs for a micro-batch; called inside the engine's forward."""
        read = read_knowledge(self.model, batch, self.needs)
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
    def __call__(self, batch: Batch) -> Knowledge:
        self._prefetch.wait()
        read: Knowledge = self._engine(batch)
        if read.hidden is None:
            return read
        return read._replace(head=LanguageModelHead(self.model))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Knowledge]:
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
        """Return draws of next tokens of a language model, see `generation.drawn`."""
        return self._engine(batch, numbers=numbers)

    @property
    def model(self) -> nn.Module:
        """The model itself, whose parameters may be sharded."""
        return self._engine.module.model

    def destroy(self) -> None:
        self._prefetch.drop()
        destroy(self._engine)
