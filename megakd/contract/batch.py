"""One micro-batch, and what models say of it: the values that losses are computed from.

Shapes: B rows of a micro-batch, T positions, V vocabulary or classes, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megakd.contract.tasks import Kernels

if TYPE_CHECKING:
    from torch import Tensor

Unit = str
"""What the sum of a loss term runs over; `unit_counts` names the units of every run."""
Counts = Mapping[Unit, "Tensor"]
"""int64 scalars by unit: of a rank, or summed over all ranks."""
IGNORE = -100


class Batch(NamedTuple):
    """One micro-batch of one rank, aligned so that no loss shifts anything.

    inputs: what the model's forward takes (`input_ids` [B, T], `attention_mask`, …).
    labels: [B] class numbers, [B] scores (float, NaN = none) or [B, T] tokens: the next ones,
        already shifted, or those under the masks; -100 = no label.
    valid: [B, T] bool, False at padding and in rows that only keep the ranks in step.
    rows: [B] int64 numbers of the training rows, on the CPU; -1 where a row only keeps the ranks in
        step, None where nobody counts.
    targets: [N] int64 positions of the flattened [B * T] that a language model is asked about,
        which are the labelled ones, or one at least; None asks about all.
    others: by role, the same rows as models with another tokenizer read them.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    valid: Tensor
    targets: Tensor | None = None
    rows: Tensor | None = None
    others: Mapping[str, Batch] | None = None

    def of(self, role: str | None) -> Batch:
        """Return the rows as the model of a role reads them; None stands for the first learner."""
        return self.others.get(role, self) if self.others and role else self

    @property
    def target_labels(self) -> Tensor:
        """The labels of what is asked: [N] where there are `targets`, else all of them."""
        return self.labels if self.targets is None else self.labels.flatten()[self.targets]


class Head(Protocol):
    """The output matrix of a language model, [V, D], perhaps sharded until it is opened."""

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, D], bias [V] or None), readable while the head is open."""
        ...

    def open(self) -> AbstractContextManager[object]:
        """Keeps the whole weight readable while the context lasts."""
        ...


class AttentionVectors(NamedTuple):
    """What a layer's attention compares and mixes: its heads side by side.

    queries: [B, T, heads * width], turned by their positions where the family does that.
    keys: [B, T, key heads * width], likewise; there may be fewer heads than of queries.
    values: [B, T, key heads * width].
    width: of one head.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    width: int

    def detached(self) -> AttentionVectors:
        """Return the same vectors as constants."""
        queries, keys, values = (p.detach() for p in (self.queries, self.keys, self.values))
        return AttentionVectors(queries, keys, values, self.width)


class TopK(NamedTuple):
    """A language model's most likely next tokens.

    ids: [B, T, k] token numbers; below 0 where there is nothing to say.
    logprobs: [B, T, k] natural logarithms of its softmax over all ids.
    """

    ids: Tensor
    logprobs: Tensor


class Knowledge(NamedTuple):
    """What was read from one model on one micro-batch; a teacher's carries no gradient.

    logits: [B, C] of a classifier or regressor, None for a language model.
    hidden: [B, T, D] input of the LM head, [N, D] at the batch's `targets` where it has them;
        None for a classifier.
    head: the LM head; with `hidden` it stands for logits that are never formed.
    hidden_states: L + 1 tensors [B, T, D] (0 is the embedding output), or empty.
    attention: by layer, numbered as hidden states are; None at 0 and where nobody asked.
    top_k: what is left of a language model's logits in a cache; in place of `hidden` and `head`.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    hidden_states: tuple[Tensor, ...] = ()
    attention: tuple[AttentionVectors | None, ...] = ()
    top_k: TopK | None = None

    def detached(self) -> Knowledge:
        """Return the same answers as constants."""
        return Knowledge(
            logits=None if self.logits is None else self.logits.detach(),
            hidden=None if self.hidden is None else self.hidden.detach(),
            head=self.head,
            hidden_states=tuple(states.detach() for states in self.hidden_states),
            attention=tuple(None if one is None else one.detached() for one in self.attention),
            top_k=self.top_k,
        )


class Losses(NamedTuple):
    """What the student's forward returns; a NamedTuple, or ZeRO-3 does not see the tensors.

    total: scalar with gradient, the sum over passes of scale * weight * sum / count * world.
    parts: detached scalars, sum / count without weight and world size, keyed `[view/]loss`.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Predictions(NamedTuple):
    """What the student's or teacher's forward returns without a plan.

    outputs: [B, C] fp32 logits or scores; None for a language model.
    sums: for a language model `[3]` fp64: summed cross-entropy in nats, right tokens, targets.
    """

    outputs: Tensor | None
    sums: Tensor | None


@dataclass(frozen=True)
class LossInputs:
    """What a group of terms computes from.

    kernels: the code path of megakd_kernels, as `train.kernels` names it.
    scale: of the pass that it is read for.
    left_out: terms that the pass does without.
    """

    student: Knowledge
    teacher: Knowledge | None
    batch: Batch
    weights: Mapping[str, float]
    per_unit: Mapping[Unit, Tensor]
    kernels: Kernels = "auto"
    scale: float = 1.0
    left_out: frozenset[str] = frozenset()

    @property
    def taught(self) -> Knowledge:
        """What the teacher said, as a constant; `teacher` has the gradient of one that learns."""
        if self.teacher is None:
            raise TypeError("a term that compares with a teacher was planned without one")
        return self.teacher.detached()
